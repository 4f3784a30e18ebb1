"""Synthetic pictures and questions, from which `mqt-llava-tiny` learns everything that it knows.

A scene is a background and up to four things, each in one cell of a 3 x 3 grid: objects of 64 kinds, drawn with Noto
Color Emoji (SIL Open Font License; Debian package `fonts-noto-color-emoji`), and at most one printed digit. Size,
rotation and place inside the cell are random. A scene is a pure function of its seed, at any picture size.
"""

import functools
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont


EMOJI_FONT = os.environ.get("MQT_LLAVA_EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

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
PLURALS = {"mouse": "mice", "fox": "foxes", "butterfly": "butterflies", "octopus": "octopuses", "fish": "fish",
           "strawberry": "strawberries", "bus": "buses", "cactus": "cacti"}  # fmt: skip
DIGITS = tuple("0123456789")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
MAX_THINGS = 4

BACKGROUNDS = {  # name -> RGB around which a scene's own shade varies
    "red": (200, 45, 45), "orange": (240, 140, 30), "yellow": (245, 220, 60), "green": (60, 160, 70),
    "blue": (50, 90, 200), "purple": (130, 60, 170), "white": (245, 245, 245), "black": (28, 28, 28),
}  # fmt: skip
COLOURS = tuple(BACKGROUNDS)
TEXTURES = ("plain", "gradient", "stripes", "checks", "noise")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One object or printed digit. `cell` counts the 3 x 3 grid in raster order; `x`, `y` (centre) and `size` are
    fractions of the picture's side; `angle` is in degrees."""

    name: str
    cell: int
    x: float
    y: float
    size: float
    angle: float

    @property
    def is_digit(self):
        return self.name in DIGITS


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `things` stand in raster order of their cells."""

    seed: int
    colour: str
    texture: str
    things: tuple[Thing, ...]

    def at(self, cell):
        """The thing in a cell, or None."""
        return next((thing for thing in self.things if thing.cell == cell), None)


def make_scene(seed):
    """Draw a scene's content. The same seed gives the same scene everywhere."""
    rng = np.random.default_rng([seed, 0])
    cells = sorted(rng.choice(9, rng.integers(1, MAX_THINGS + 1), replace=False).tolist())
    names = [KINDS[i] for i in rng.integers(len(KINDS), size=len(cells))]
    for i in range(1, len(names)):  # repeats make "how many" a question worth asking
        if rng.random() < 0.25:
            names[i] = names[rng.integers(i)]
    if rng.random() < 0.4:
        names[rng.integers(len(names))] = DIGITS[rng.integers(10)]
    things = []
    for name, cell in zip(names, cells):
        size = rng.uniform(0.23, 0.33)
        slack = (1 / 3 - size) / 2 + 0.02
        x, y = (cell % 3 + 0.5) / 3 + rng.uniform(-slack, slack), (cell // 3 + 0.5) / 3 + rng.uniform(-slack, slack)
        angle = rng.uniform(-12, 12) if name in DIGITS else rng.uniform(-30, 30)
        things.append(Thing(name, cell, *(float(v) for v in (x, y, size, angle))))
    return Scene(seed, COLOURS[rng.integers(len(COLOURS))], TEXTURES[rng.integers(len(TEXTURES))], tuple(things))


@functools.cache
def _sprite(name):
    """The 128 x 128 RGBA drawing of an object or digit, cropped to its ink and centred."""
    canvas = Image.new("RGBA", (160, 160))
    if name in DIGITS:
        font = ImageFont.load_default(size=120)  # the scalable face that Pillow carries
        ImageDraw.Draw(canvas).text((80, 80), name, font=font, fill="white", anchor="mm", stroke_width=3)
    else:
        if not os.path.exists(EMOJI_FONT):
            raise FileNotFoundError(
                f"{EMOJI_FONT} not found. Install Debian's `fonts-noto-color-emoji`, or point the environment variable "
                "MQT_LLAVA_EMOJI_FONT to NotoColorEmoji.ttf."
            )
        font = ImageFont.truetype(EMOJI_FONT, 109)  # the only size that this bitmap font has
        ImageDraw.Draw(canvas).text((8, 8), OBJECTS[name], font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = 128 / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BICUBIC)
    sprite = Image.new("RGBA", (128, 128))
    sprite.paste(ink, ((128 - ink.width) // 2, (128 - ink.height) // 2))
    return sprite


def _background(scene, size, rng):
    """A `(size, size, 3)` uint8 background in a shade of the scene's colour."""
    shade = np.array(BACKGROUNDS[scene.colour], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    if scene.texture == "plain":
        light = np.zeros((size, size), np.float32)
    elif scene.texture == "gradient":
        turn = rng.uniform(0, 2 * np.pi)
        light = 36 * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))
    elif scene.texture == "stripes":
        turn, count = rng.uniform(0, np.pi), rng.integers(3, 9)
        light = 14 * np.sign(np.sin(2 * np.pi * count * (x * np.cos(turn) + y * np.sin(turn))))
    elif scene.texture == "checks":
        count = rng.integers(2, 7)
        light = 28 * ((np.floor(x * count) + np.floor(y * count)) % 2) - 14
    else:
        grain = rng.normal(0, 12, (48, 48)).astype(np.float32)
        light = np.asarray(Image.fromarray(grain).resize((size, size), Image.Resampling.BILINEAR))
    return np.clip(shade + light[:, :, None], 0, 255).astype(np.uint8)


def draw(scene, size=96, grid=None):
    """Paint a scene as an RGB picture of `size` x `size` pixels.

    With `grid`, also return an int64 `(grid, grid)` map of what covers each patch, as vision pretraining wants it:
    0 for background, else 1 + the index into `KINDS + DIGITS` of the thing that covers most, at least a fifth, of it.
    """
    rng = np.random.default_rng([scene.seed, 1])
    picture = Image.fromarray(_background(scene, size, rng))
    ink = (245, 245, 245) if scene.colour in ("black", "red", "green", "blue", "purple") else (25, 25, 25)
    cover = np.full((1 + len(scene.things), grid, grid), 0.2, np.float32) if grid else None
    for i, thing in enumerate(scene.things):
        side = max(4, round(thing.size * size))
        sprite = _sprite(thing.name).resize((side, side), Image.Resampling.BICUBIC)
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        place = (round(thing.x * size - sprite.width / 2), round(thing.y * size - sprite.height / 2))
        mask = sprite.getchannel("A")
        picture.paste(
            ink if thing.is_digit else sprite, (*place, place[0] + sprite.width, place[1] + sprite.height), mask
        )
        if grid:
            alpha = Image.new("L", (size, size))
            alpha.paste(mask, place)
            cover[i + 1] = np.asarray(alpha).reshape(grid, size // grid, grid, size // grid).mean((1, 3)) / 255
    if not grid:
        return picture
    names = np.array([0, *(1 + (KINDS + DIGITS).index(thing.name) for thing in scene.things)])
    return picture, names[cover.argmax(0)]


# --------------------------------------------------------------------------------------------------------- language

COARSE = ("colour", "total", "number?")
FINE = ("exists", "count", "at", "beside", "digit", "list")
QUESTION_TYPES = COARSE + FINE


def _article(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name):
    return PLURALS.get(name, name + "s")


def _noun(thing):
    return f"the number {thing.name}" if thing.is_digit else _article(thing.name)


def _sentence(text):
    return text[0].upper() + text[1:] + "."


def _join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _where(cell):
    return f"in the {PLACES[cell]}" if PLACES[cell] == "middle" else f"at the {PLACES[cell]}"


def caption(scene):
    """What stage 1 learns to say of a picture: the background, then every thing with its place."""
    return f"A {scene.colour} background with {_join([f'{_noun(t)} {_where(t.cell)}' for t in scene.things])}."


def ask(scene, kind, rng):
    """A `(question, answer)` of a type in `QUESTION_TYPES`, or None where the scene admits none of that type."""
    objects = [t for t in scene.things if not t.is_digit]
    digits = [t for t in scene.things if t.is_digit]
    present = [t.name for t in objects]

    def any_kind(present_probability):
        if present and rng.random() < present_probability:
            return present[rng.integers(len(present))]
        absent = [name for name in KINDS if name not in present]
        return absent[rng.integers(len(absent))]

    if kind == "colour":
        return "What colour is the background?", _sentence(scene.colour)
    if kind == "total":
        return "How many things are there?", _sentence(NUMBER_WORDS[len(scene.things)])
    if kind == "number?":
        return "Is there a number?", "Yes." if digits else "No."
    if kind == "exists":
        name = any_kind(0.5)
        return f"Is there {_article(name)}?", "Yes." if name in present else "No."
    if kind == "count":
        name = any_kind(0.8)
        return f"How many {_plural(name)} are there?", _sentence(NUMBER_WORDS[present.count(name)])
    if kind == "at":
        occupied = [t.cell for t in scene.things]
        empty = [cell for cell in range(9) if cell not in occupied]
        pool = occupied if rng.random() < 0.85 else empty
        cell = pool[rng.integers(len(pool))]
        thing = scene.at(cell)
        return f"What is {_where(cell)}?", _sentence(_noun(thing)) if thing else "Nothing."
    if kind == "beside":
        pairs = [
            (direction, thing, other)
            for thing in objects
            if present.count(thing.name) == 1
            for direction, step, line in (("left of", -1, 3), ("right of", 1, 3), ("above", -3, 1), ("below", 3, 1))
            for other in [_next_thing(scene, thing.cell, step)]
            if other is not None
        ]
        if not pairs:
            return None
        direction, thing, other = pairs[rng.integers(len(pairs))]
        return f"What is {direction} the {thing.name}?", _sentence(_noun(other))
    if kind == "digit":
        return ("Which number is printed?", f"{digits[0].name}.") if digits else None
    if kind == "list":
        return "List everything.", _sentence(_join([_noun(t) for t in scene.things]))
    raise ValueError(f"unknown question type {kind!r}; allowed: {', '.join(QUESTION_TYPES)}")


def _next_thing(scene, cell, step):
    """The nearest thing from `cell` in steps of -1 (left), 1 (right), -3 (up) or 3 (down), inside its row or column."""
    row, column = divmod(cell, 3)
    reach = {-1: column, 1: 2 - column, -3: row, 3: 2 - row}[step]
    return next((t for i in range(1, reach + 1) if (t := scene.at(cell + i * step))), None)


def conversation(scene, questions=None):
    """`[(type, question, answer), ...]` about a scene, at most one question of each type and place, in random order.

    `questions` limits their number. "List everything" comes last, so that no answer can be read off an earlier one.
    """
    rng = np.random.default_rng([scene.seed, 2])
    kinds = [k for k in (*QUESTION_TYPES, "exists", "exists", "count", "at", "at", "beside") if k != "list"]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    turns, seen = [], set()
    for kind in kinds:
        turn = ask(scene, kind, rng)
        if turn is not None and turn[0] not in seen:
            seen.add(turn[0])
            turns.append((kind, *turn))
    turns = turns[: None if questions is None else questions - 1]
    return [*turns, ("list", *ask(scene, "list", rng))]
