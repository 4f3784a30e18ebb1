"""Synthetic pictures and questions, from which `mqt-llava-tiny` learns everything that it knows.

A scene is a background and up to six things: objects of 64 kinds and at most one printed number of one or two figures. They
stand in a 3 x 3 grid or anywhere, are 10 to 85 % of the picture's side large and may overlap a little; pictures are
square or up to twice as wide as high, or as high as wide, and 32 to 3000 pixels long. Some are empty. A scene is a pure
function of its seed.

Objects are drawn with Noto Color Emoji (SIL Open Font License; Debian's `fonts-noto-color-emoji`) and, where they are line
drawings, with Symbola ("free for any use"; Debian's `fonts-symbola`). Kinds in `HELD_OUT` are never line drawings in training: whether
those are recognised tells whether an apple was learned, or a bitmap.

**Places.** The picture is divided into 3 x 3 cells. A thing has a place word where its centre is inside a cell and not within `MARGIN`
of a line between two. What is in a cell is only asked where it has one thing with a place word and nothing of another
thing to speak of; that nothing is there, only where nothing reaches into it. One thing is left of another where it lies
within 31 degrees of that direction; where a third one is nearly as near, or another lies between 31 and 50
degrees, it is not asked.
"""

import functools
import io
import os
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


EMOJI_FONT = os.environ.get("MQT_LLAVA_EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LINE_FONT = os.environ.get("MQT_LLAVA_LINE_FONT", "/usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf")
FONTS = (EMOJI_FONT, LINE_FONT)

OBJECTS = {
    "cat": "🐱", "dog": "🐶", "mouse": "🐭", "rabbit": "🐰", "fox": "🦊", "bear": "🐻", "panda": "🐼", "tiger": "🐯",
    "cow": "🐮", "pig": "🐷", "frog": "🐸", "monkey": "🐵", "chicken": "🐔", "penguin": "🐧", "owl": "🦉", "bee": "🐝",
    "butterfly": "🦋", "snail": "🐌", "ladybug": "🐞", "turtle": "🐢", "octopus": "🐙", "crab": "🦀", "fish": "🐟",
    "whale": "🐳", "elephant": "🐘", "zebra": "🦓", "apple": "🍎", "pear": "🍐", "lemon": "🍋", "banana": "🍌",
    "watermelon": "🍉", "strawberry": "🍓", "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "burger": "🍔",
    "pizza": "🍕", "donut": "🍩", "cake": "🎂", "cookie": "🍪", "car": "🚗", "bus": "🚌", "bicycle": "🚲",
    "train": "🚂", "rocket": "🚀", "boat": "⛵", "house": "🏠", "tree": "🌳", "cactus": "🌵", "sunflower": "🌻",
    "rose": "🌹", "moon": "🌙", "star": "⭐", "umbrella": "☔", "ball": "⚽", "guitar": "🎸", "drum": "🥁",
    "camera": "📷", "clock": "⏰", "key": "🔑", "book": "📕", "balloon": "🎈", "hat": "🎩", "robot": "🤖",
}  # fmt: skip
KINDS = tuple(OBJECTS)
HELD_OUT = ("rabbit", "penguin", "apple", "mushroom", "bicycle", "rocket", "guitar", "key")
PLURALS = {"mouse": "mice", "fox": "foxes", "butterfly": "butterflies", "octopus": "octopuses", "fish": "fish",
           "strawberry": "strawberries", "bus": "buses", "cactus": "cacti"}  # fmt: skip
FIGURES = tuple("0123456789")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
MAX_THINGS = 6

BACKGROUNDS = {  # name -> RGB around which a scene's own shade varies
    "red": (200, 45, 45), "orange": (240, 140, 30), "yellow": (245, 220, 60), "green": (60, 160, 70),
    "blue": (50, 90, 200), "purple": (130, 60, 170), "white": (245, 245, 245), "black": (28, 28, 28),
    "grey": (130, 130, 130),
}  # fmt: skip
COLOURS = tuple(BACKGROUNDS)
TEXTURES = ("plain", "gradient", "stripes", "checks", "noise", "clouds", "discs", "grain")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
MARGIN = 0.03  # of width and height
SMALLEST = 0.1  # size of things
LINES_FROM = 0.2  # and of line drawings


@dataclass(frozen=True)
class Thing:
    """One object or printed number. `x` and `y` (centre) are fractions of the picture's width and height, `size` is its
    longer side as a fraction of the picture's longer side; `angle` is in degrees."""

    name: str
    x: float
    y: float
    size: float
    angle: float
    is_line_drawing: bool = False

    @property
    def is_number(self):
        return self.name.isdecimal()

    @property
    def place(self):
        """Its cell of the 3 x 3 grid in raster order, or None near a line between two."""
        if any(abs(at - line) < MARGIN for at in (self.x, self.y) for line in (1 / 3, 2 / 3)):
            return None
        return 3 * int(3 * self.y) + int(3 * self.x)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `width` and `height` are in units of the longer one, `pixels` is that one's length."""

    seed: int
    colour: str
    texture: str
    width: float
    height: float
    pixels: int
    things: tuple[Thing, ...]

    def count(self, name):
        return sum(thing.name == name for thing in self.things)


def make_scene(seed):
    """Draw a scene's content. The same seed gives the same scene everywhere."""
    rng = np.random.default_rng([seed, 0])
    aspect = 1.0 if rng.random() < 0.4 else 2 ** rng.uniform(-1, 1)
    width, height = min(1.0, aspect), min(1.0, 1 / aspect)
    number = 0 if rng.random() < 0.04 else 1 + rng.choice(MAX_THINGS, p=(0.22, 0.22, 0.19, 0.16, 0.12, 0.09))
    names = [KINDS[i] for i in rng.integers(len(KINDS), size=number)]
    for i in range(1, number):  # repeats make "how many" a question worth asking
        if rng.random() < 0.25:
            names[i] = names[rng.integers(i)]
    if number and rng.random() < 0.35:
        names[rng.integers(number)] = str(rng.integers(10) if rng.random() < 0.5 else rng.integers(10, 100))
    arrange = _in_grid if rng.random() < 0.45 else _anywhere
    smallest = [1.4 * SMALLEST if len(name) == 2 else SMALLEST for name in names]  # two figures are wide
    placed = list(arrange(rng, smallest, width, height))
    # Lines are lost in small drawings
    are_line_drawings = rng.random() < 0.12 and all(size >= LINES_FROM for *_, size in placed)
    things = []
    for name, (x, y, size) in zip(names, placed):
        is_number = name.isdecimal()
        angle = rng.uniform(-12, 12) if is_number else rng.uniform(-30, 30)
        is_line_drawing = bool(are_line_drawings and not is_number and name not in HELD_OUT)
        things.append(Thing(name, *(float(value) for value in (x, y, size, angle)), is_line_drawing))
    colour, texture = COLOURS[rng.integers(len(COLOURS))], TEXTURES[rng.integers(len(TEXTURES))]
    # Pictures of 32 pixels have room for what is large
    shortest = max([32, *(16 / thing.size for thing in things)])
    pixels = round(np.exp(rng.uniform(np.log(shortest), np.log(3000))))
    return Scene(seed, colour, texture, float(width), float(height), pixels, tuple(things))


def _in_grid(rng, smallest, width, height):
    """`(x, y, size)` of things in cells of their own."""
    cell = min(width, height) / 3
    size = _draw_size(rng, 0.95 * cell)
    for place, least in zip(rng.choice(9, len(smallest), replace=False), smallest):
        own = float(np.clip(size * rng.uniform(0.85, 1.15), least, max(least, 1.05 * cell)))
        slack_x, slack_y = (max(0, (side - own) / 2 / (3 * side)) for side in (width / 3, height / 3))
        x = (place % 3 + 0.5) / 3 + rng.uniform(-slack_x, slack_x)
        yield x, (place // 3 + 0.5) / 3 + rng.uniform(-slack_y, slack_y), own


def _anywhere(rng, smallest, width, height):
    """`(x, y, size)` of things anywhere, which overlap by at most a tenth of their sides."""
    number, side = len(smallest), 0.85 * min(width, height)
    size = _draw_size(rng, side if number < 2 else min(side, (0.4 * width * height / number) ** 0.5))
    while True:
        placed = []
        for least in smallest:
            own = float(np.clip(size * rng.uniform(0.8, 1.25), least, side))
            for _ in range(30):
                x, y = (rng.uniform(own / 2, side - own / 2) for side in (width, height))
                if all(max(abs(x - a), abs(y - b)) > 0.9 * (own + other) / 2 for a, b, other in placed):
                    placed.append((x, y, own))
                    break
        if len(placed) == number:
            return [(x / width, y / height, own) for x, y, own in placed]
        size = 0.85 * size


def _draw_size(rng, largest):
    """From `largest` down to a tenth, small sizes less often than large ones."""
    return largest * min(1, SMALLEST / largest) ** (rng.random() ** 1.5)


# --------------------------------------------------------------------------------------------------------- pictures


def _font(path, size, package):
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path} not found. Install Debian's `{package}`, or point the environment variable MQT_LLAVA_EMOJI_FONT or "
            "MQT_LLAVA_LINE_FONT to the font."
        )
    return ImageFont.truetype(path, size)


@functools.cache
def _sprite(name, is_line_drawing=False):
    """The 128 x 128 RGBA drawing of an object or a number, cropped to its ink and centred."""
    canvas = Image.new("RGBA", (320, 200))
    if name.isdecimal():
        font = ImageFont.load_default(size=120)  # the scalable face that Pillow carries
        ImageDraw.Draw(canvas).text((160, 100), name, font=font, fill="white", anchor="mm", stroke_width=3)
    elif is_line_drawing:
        font = _font(LINE_FONT, 120, "fonts-symbola")
        ImageDraw.Draw(canvas).text((160, 100), OBJECTS[name], font=font, fill="black", anchor="mm", stroke_width=1)
        outside = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 96 else 0)
        ImageDraw.floodfill(outside, (0, 0), 128)
        paper = Image.new("RGBA", canvas.size, "white")
        paper.putalpha(outside.point(lambda value: 0 if value == 128 else 255))  # what its lines enclose
        canvas = Image.alpha_composite(paper, canvas)
    else:
        font = _font(EMOJI_FONT, 109, "fonts-noto-color-emoji")  # the only size that this bitmap font has
        ImageDraw.Draw(canvas).text((8, 8), OBJECTS[name], font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = 128 / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BICUBIC)
    sprite = Image.new("RGBA", (128, 128))
    sprite.paste(ink, ((128 - ink.width) // 2, (128 - ink.height) // 2))
    return sprite


def _background(scene, width, height, rng):
    """A `(height, width, 3)` uint8 background in a shade of the scene's colour."""
    shade = np.array(BACKGROUNDS[scene.colour], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
    longest = max(width, height)
    y, x = np.ogrid[:height, :width]
    x, y = x.astype(np.float32) / longest, y.astype(np.float32) / longest
    turn = rng.uniform(0, 2 * np.pi)

    def smooth(cells):  # noise that changes from cell to cell
        grain = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BILINEAR))

    if scene.texture == "plain":
        light = np.zeros((1, 1), np.float32)
    elif scene.texture == "gradient":
        light = rng.uniform(20, 60) * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))
    elif scene.texture == "stripes":
        light = 14 * np.sign(np.sin(2 * np.pi * rng.integers(3, 9) * (x * np.cos(turn) + y * np.sin(turn))))
    elif scene.texture == "checks":
        count = rng.integers(2, 7)
        light = 28 * ((np.floor(x * count) + np.floor(y * count)) % 2) - 14
    elif scene.texture == "noise":
        light = 12 * smooth(48)
    elif scene.texture == "clouds":
        light = 16 * smooth(3) + 9 * smooth(8) + 5 * smooth(20)
    elif scene.texture == "discs":  # lights out of focus
        light = np.zeros((height, width), np.float32)
        for _ in range(rng.integers(4, 16)):
            radius, strength = rng.uniform(0.03, 0.2), rng.uniform(-25, 25)
            distance = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1)) / radius
            light += strength * np.clip(4 * (1 - distance), 0, 1)
    else:
        light = rng.normal(0, 10, (height, width)).astype(np.float32) + 12 * smooth(3)
    light = light[:, :, None]
    if scene.texture in ("clouds", "grain"):  # colours vary too, as in a photograph
        light = light + np.stack([5 * smooth(4) for _ in range(3)], -1)
    return np.broadcast_to(np.clip(shade + light, 0, 255).astype(np.uint8), (height, width, 3))


def draw(scene, pixels=None, grid=None):
    """
    Paint a scene.

    Args:
        pixels (`int`, *optional*): of the longer side, instead of the scene's own.
        grid (`int`, *optional*): also tell what the patches show, of the picture padded to a square of `grid` x `grid`.

    Returns:
        An RGB picture; with `grid` also two int64 maps of shape `(grid, grid)`: what covers most, at least an eighth, of each patch, and
        of which thing it holds the centre. 0 is nothing, else 1 + the index into `KINDS + FIGURES`.
    """
    rng = np.random.default_rng([scene.seed, 1])
    pixels = pixels or scene.pixels
    width, height = (max(1, round(side * pixels)) for side in (scene.width, scene.height))
    picture = Image.fromarray(_background(scene, width, height, rng))
    ink = (245, 245, 245) if scene.colour in ("black", "red", "green", "blue", "purple") else (25, 25, 25)
    left, top = ((1 - side) / 2 for side in (scene.width, scene.height))  # of the square
    cover, labels = [np.full((grid, grid), 0.12, np.float32)] if grid else None, [0]
    centres = np.zeros((grid, grid), np.int64) if grid else None
    for thing in scene.things:
        side = max(4, round(thing.size * pixels))
        sprite = _sprite(thing.name, thing.is_line_drawing)
        stretch = np.exp(rng.uniform(-0.15, 0.15))
        size = [max(4, round(side * min(1, factor))) for factor in (stretch, 1 / stretch)]
        sprite = sprite.resize(size, Image.Resampling.BICUBIC)
        if rng.random() < 0.5 and not thing.is_number:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tint = rng.uniform(0.85, 1.1, 3) if rng.random() < 0.5 else np.ones(3)
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        mask = sprite.getchannel("A")
        corner = (round(thing.x * width - sprite.width / 2), round(thing.y * height - sprite.height / 2))
        box = (*corner, corner[0] + sprite.width, corner[1] + sprite.height)
        if thing.is_number:
            picture.paste(ink, box, mask)
        else:
            levels = np.clip(np.asarray(sprite.convert("RGB"), np.float32) * tint, 0, 255).astype(np.uint8)
            picture.paste(Image.fromarray(levels), box, mask)
        if grid:
            x, y = left + thing.x * scene.width, top + thing.y * scene.height
            size = sprite.width / pixels, sprite.height / pixels
            parts = thing.name if thing.is_number else [thing.name]
            names = [1 + (KINDS + FIGURES).index(part) for part in parts]
            covered = _cover(mask, x - size[0] / 2, y - size[1] / 2, pixels, grid)
            column = np.arange(grid)
            for i, name in enumerate(names):  # the figures of a number, side by side
                middle = (x + (i - (len(names) - 1) / 2) * size[0] / len(names)) * grid
                nearest = np.abs(column + 0.5 - middle) <= size[0] * grid / len(names) / 2 + 0.5 / len(names)
                cover.append(covered * nearest if len(names) > 1 else covered)
                labels.append(name)
            row, column = (min(grid - 1, max(0, int(at * grid))) for at in (y, x))
            centres[row, column] = names[0]
    picture = _develop(picture, rng)
    if not grid:
        return picture
    return picture, np.array(labels)[np.argmax(cover, 0)], centres


def _cover(mask, left, top, pixels, grid):
    """What share of each patch a mask covers, at a place in units of the square's side."""
    fine = 8 * grid
    square = Image.new("L", (fine, fine))
    size = [max(1, round(side / pixels * fine)) for side in mask.size]
    square.paste(mask.resize(size, Image.Resampling.BOX), (round(left * fine), round(top * fine)))
    return np.asarray(square, np.float32).reshape(grid, 8, grid, 8).mean((1, 3)) / 255


def _develop(picture, rng):
    """What a camera and a file format do to a picture: a little blur, noise, another contrast, JPEG."""
    longest = max(picture.size)
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.001, 0.004) * longest))
    if rng.random() < 0.3:
        levels = np.asarray(picture, np.float32)
        levels = (levels - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-10, 10)
        if rng.random() < 0.5:
            levels = levels + rng.normal(0, rng.uniform(2, 8), levels.shape).astype(np.float32)
        picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(40, 96)))
        picture = Image.open(file).convert("RGB")
    return picture


# --------------------------------------------------------------------------------------------------------- language

COARSE = ("colour", "total", "number?")
FINE = ("exists", "count", "at", "beside", "number", "list")
QUESTION_TYPES = COARSE + FINE
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _article(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name):
    return PLURALS.get(name, name + "s")


def noun(name):
    return f"the number {name}" if name.isdecimal() else _article(name)


def sentence(text):
    return text[0].upper() + text[1:] + "."


def join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def where(cell):
    return f"in the {PLACES[cell]}" if PLACES[cell] == "middle" else f"at the {PLACES[cell]}"


def _sorted(things):
    """By name, numbers last: things anywhere have no order of their own."""
    return sorted(things, key=lambda thing: (thing.is_number, thing.name, 9 if thing.place is None else thing.place))


def describe(colour, placed):
    """The background, then `[(cell or None, name), ...]`, each with its place in front of it."""
    parts = [noun(name) if cell is None else f"{where(cell)} {noun(name)}" for cell, name in placed]
    background = f"{_article(colour).capitalize()} background"
    return f"{background}. {sentence(join(parts))}" if parts else f"{background} with nothing on it."


def caption(scene):
    """A description: the background, then what is at which place in raster order, then the rest."""
    things = sorted(_sorted(scene.things), key=lambda thing: 9 if thing.place is None else thing.place)
    return describe(scene.colour, [(thing.place, thing.name) for thing in things])


def list_all(scene):
    """`"Two cats, a dog and the number 42."`"""
    names = dict.fromkeys(thing.name for thing in _sorted(scene.things))
    counts = {name: scene.count(name) for name in names}
    parts = [noun(name) if n == 1 else f"{NUMBER_WORDS[n]} {plural(name)}" for name, n in counts.items()]
    return sentence(join(parts)) if parts else "There is nothing."


def ask(scene, kind, rng):
    """A `(question, answer)` of a type in `QUESTION_TYPES`, or None where the scene admits none of that type."""
    objects = [t for t in scene.things if not t.is_number]
    numbers = [t for t in scene.things if t.is_number]
    present = [t.name for t in objects]

    def any_kind(present_probability):
        if present and rng.random() < present_probability:
            return present[rng.integers(len(present))]
        absent = [name for name in KINDS if name not in present]
        return absent[rng.integers(len(absent))]

    if kind == "colour":
        return "What colour is the background?", sentence(scene.colour)
    if kind == "total":
        return "How many things are there?", sentence(NUMBER_WORDS[len(scene.things)])
    if kind == "number?":
        return "Is there a number?", "Yes." if numbers else "No."
    if kind == "exists":
        name = any_kind(0.5)
        return f"Is there {_article(name)}?", "Yes." if name in present else "No."
    if kind == "count":
        name = any_kind(0.8)
        return f"How many {plural(name)} are there?", sentence(NUMBER_WORDS[present.count(name)])
    if kind == "at":
        occupied, empty = clear_cells(scene)
        if not (occupied or empty):
            return None
        from_occupied = occupied and (not empty or rng.random() < 0.85)
        pool = sorted(occupied) if from_occupied else empty
        cell = pool[rng.integers(len(pool))]
        return f"What is {where(cell)}?", sentence(noun(occupied[cell].name)) if from_occupied else "Nothing."
    if kind == "beside":
        if rng.random() < 0.08:
            name, direction = any_kind(0), list(DIRECTIONS)[rng.integers(4)]
            return f"What is {direction} the {name}?", f"There is no {name}."
        neighbours = _neighbours(scene)
        found = [pair for pair in neighbours if pair[2] is not None]
        pool = found if found and rng.random() < 0.85 else neighbours
        if not pool:
            return None
        direction, thing, other = pool[rng.integers(len(pool))]
        return f"What is {direction} the {thing.name}?", sentence(noun(other.name)) if other else "Nothing."
    if kind == "number":
        if numbers:
            return "Which number is printed?", f"{numbers[0].name}."
        return ("Which number is printed?", "There is no number.") if rng.random() < 0.15 else None
    if kind == "list":
        return "List everything.", list_all(scene)
    raise ValueError(f"unknown question type {kind!r}; allowed: {', '.join(QUESTION_TYPES)}")


def clear_cells(scene):
    """`({cell: its thing}, [cells that nothing reaches into])`, without cells of which it is not plain what they show."""
    edges = np.arange(4) / 3
    shares = np.zeros((len(scene.things), 9))  # of each cell, covered by each thing
    for i, thing in enumerate(scene.things):
        spans = []
        for at, side in ((thing.x, scene.width), (thing.y, scene.height)):
            half = 0.45 * thing.size / side
            spans.append(np.clip(np.minimum(at + half, edges[1:]) - np.maximum(at - half, edges[:-1]), 0, None) * 3)
        shares[i] = np.outer(spans[1], spans[0]).reshape(9)
    occupied, empty = {}, []
    for cell in range(9):
        centred = [i for i, t in enumerate(scene.things) if 3 * int(2.999 * t.y) + int(2.999 * t.x) == cell]
        if not centred and shares[:, cell].sum() < 0.05:
            empty.append(cell)
        if len(centred) == 1 and scene.things[centred[0]].place == cell:
            others = np.delete(shares[:, cell], centred[0])
            if others.sum() < 0.2:
                occupied[cell] = scene.things[centred[0]]
    return occupied, empty


def _neighbours(scene):
    """`[(direction, thing, the nearest in that direction or None), ...]` for things that are the only one of their kind."""
    result = []
    for thing in scene.things:
        if thing.is_number or scene.count(thing.name) > 1:
            continue
        for direction, (step_x, step_y) in DIRECTIONS.items():
            inside, unclear = [], False
            for other in scene.things:
                x, y = (other.x - thing.x) * scene.width, (other.y - thing.y) * scene.height
                along, across = x * step_x + y * step_y, abs(x * step_y) + abs(y * step_x)
                if other is thing or along <= 0:
                    continue
                if across <= 0.6 * along:
                    inside.append((along, other))
                elif across <= 1.2 * along:
                    unclear = True
            inside.sort(key=lambda pair: pair[0])
            if unclear or (len(inside) > 1 and inside[1][0] < 1.25 * inside[0][0]):
                continue
            result.append((direction, thing, inside[0][1] if inside else None))
    return result


def conversation(scene):
    """`[(type, question, answer), ...]` about a scene, no question twice, in random order."""
    rng = np.random.default_rng([scene.seed, 2])
    kinds = [*QUESTION_TYPES, "exists", "exists", "count", "count", "at", "at", "beside"]
    turns = {}
    for i in rng.permutation(len(kinds)):
        turn = ask(scene, kinds[i], rng)
        if turn is not None:
            turns.setdefault(turn[0], (kinds[i], *turn))
    return list(turns.values())


# --------------------------------------------------------------------------------------------------- two pictures


def change(scene):
    """`(first, second, what differs)`: the scene before or after a change of one thing or of its background."""
    rng = np.random.default_rng([scene.seed, 6])
    objects = [thing for thing in scene.things if not thing.is_number]
    kind = ("colour", "gone", "new", "other", "nothing")[rng.choice(5, p=(0.2, 0.2, 0.2, 0.25, 0.15))]
    if kind in ("gone", "new", "other") and not objects:
        kind = "colour"
    same = replace(scene, seed=scene.seed + 1_000_000_000)  # another shade, other noise
    if kind == "nothing":
        return scene, same, "Nothing."
    if kind == "colour":
        colour = [name for name in COLOURS if name != scene.colour][rng.integers(len(COLOURS) - 1)]
        return scene, replace(same, colour=colour), "The background."
    changed = objects[rng.integers(len(objects))]
    if kind == "other":
        absent = [name for name in KINDS if not scene.count(name)]
        other = replace(changed, name=absent[rng.integers(len(absent))], is_line_drawing=False)
        things = tuple(other if thing is changed else thing for thing in scene.things)
        answer = f"{_article(other.name).capitalize()} instead of {_article(changed.name)}."
        return scene, replace(same, things=things), answer
    rest = tuple(thing for thing in scene.things if thing is not changed)
    answer = f"{_article(changed.name).capitalize()} is {kind}."
    if kind == "gone":
        return scene, replace(same, things=rest), answer
    return replace(scene, things=rest), same, answer


def ask_pair(seed):
    """`([scene, scene], question, answer)` about two pictures."""
    rng = np.random.default_rng([seed, 5])
    first, second = make_scene(seed), make_scene(seed + 500_000_000)
    kind = ("differs", "which", "list", "colour")[rng.choice(4, p=(0.4, 0.25, 0.2, 0.15))]
    if kind == "differs":
        first, second, answer = change(first)
        return [first, second], "What differs?", answer
    if kind == "which":
        names = sorted({t.name for t in (*first.things, *second.things) if not t.is_number})
        name = names[rng.integers(len(names))] if names and rng.random() < 0.9 else KINDS[rng.integers(len(KINDS))]
        answer = {
            (True, False): "The first.",
            (False, True): "The second.",
            (True, True): "Both.",
            (False, False): "Neither.",
        }
        return (
            [first, second],
            f"Which picture shows {_article(name)}?",
            answer[first.count(name) > 0, second.count(name) > 0],
        )
    number = int(rng.integers(2))
    if kind == "list":
        question = f"List everything in the {('first', 'second')[number]} picture."
        return [first, second], question, list_all((first, second)[number])
    question = f"What colour is the background of the {('first', 'second')[number]} picture?"
    return [first, second], question, sentence((first, second)[number].colour)
