"""Pictures of another hand, to see what `mqt-llava-tiny` knows beyond the generator that it learned from.

    python -m recipes.tiny.families [--model mqt_llava/checkpoints/mqt-llava-tiny] [--pictures 30] [--output_dir docs/accuracy]

Nothing here is shared with `recipes.tiny.scenes`, and nothing of here is trained on. Four families, five questions a picture:
`grid` (3 x 3 places, plain background, 500 to 1500 pixels), `free` (things anywhere, apart from each other), `small` (things at
16 % of the side) and `landscape` (3:2). A list is right with the right things in any order, every other answer letter for letter.
Then contradictions: of the answers to whether and how many there are of each kind, how many things there are and what is at
each place, the share that is at odds with the list which the model itself gave.
"""

import argparse
import random
import re
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor

import mqt_llava


FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
GLYPHS = dict(
    zip(
        "cat dog rabbit tiger pig frog owl bee crab whale apple lemon banana carrot pizza cake car bus rocket house tree rose "
        "star guitar clock key robot".split(),
        "🐱🐶🐰🐯🐷🐸🦉🐝🦀🐳🍎🍋🍌🥕🍕🎂🚗🚌🚀🏠🌳🌹⭐🎸⏰🔑🤖",
    )
)
COLOURS = {
    "red": "#c62f2f",
    "green": "#3f9f4a",
    "blue": "#3560c8",
    "yellow": "#f2da42",
    "white": "#f4f4f4",
    "black": "#202020",
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
WORDS = ("Zero", "One", "Two", "Three", "Four")
FAMILIES = ("grid", "free", "small", "landscape")
NUM_VISUAL_TOKENS = (1, 4, 16, 64)


def paint(family: str, seed: int):
    """`(picture, colour, things)`: things are `(name, row, column)`, the latter `None` where a place has no plain word."""
    chance = random.Random(f"{family} {seed}")
    side = chance.randint(500, 1500)
    width, height = (side * 3 // 2, side) if family == "landscape" else (side, side)
    colour = chance.choice(list(COLOURS))
    picture = Image.new("RGB", (width, height), COLOURS[colour])
    glyph_side = round(min(width, height) * (0.16 if family == "small" else chance.uniform(0.2, 0.28)))
    count, things, taken = chance.randint(1, 4), [], []
    cells = chance.sample([(row, column) for row in range(3) for column in range(3)], count)
    names = [chance.choice(list(GLYPHS)) for _ in range(count)]
    if count > 1 and chance.random() < 0.4:
        names[1] = names[0]
    for name, (row, column) in zip(names, sorted(cells)):
        if family == "free":
            for _ in range(1000):
                x, y = (chance.uniform(glyph_side / 2, length - glyph_side / 2) for length in (width, height))
                if all(max(abs(x - other_x), abs(y - other_y)) > 1.15 * glyph_side for other_x, other_y in taken):
                    break
            row = column = None
        else:
            x, y = (column + 0.5) * width / 3, (row + 0.5) * height / 3
        taken.append((x, y))
        things.append((name, row, column))
        glyph = (
            draw_glyph(GLYPHS[name])
            .resize((glyph_side, glyph_side))
            .rotate(chance.uniform(-20, 20), Image.Resampling.BICUBIC)
        )
        picture.paste(glyph, (round(x - glyph_side / 2), round(y - glyph_side / 2)), glyph)
    return picture, colour, things


def draw_glyph(character: str) -> Image.Image:
    canvas = Image.new("RGBA", (150, 150))
    font = ImageFont.truetype(FONT, 109)  # the one size that it has
    ImageDraw.Draw(canvas).text((75, 75), character, font=font, embedded_color=True, anchor="mm")
    left, top, right, bottom = canvas.getbbox()
    half = max(right - left, bottom - top) / 2
    middle = (left + right) / 2, (top + bottom) / 2
    return canvas.crop((middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half))


def questions(colour: str, things: list, seed: int) -> list[tuple[str, str, object]]:
    """Five `(type, question, answer)`; the answer to a list is a `Counter`."""
    chance = random.Random(f"questions {seed}")
    counts = Counter(name for name, *_ in things)
    absent = [name for name in GLYPHS if name not in counts]
    asked = chance.choice(list(counts) if chance.random() < 0.5 else absent)
    counted = chance.choice(list(counts))
    placed = [thing for thing in things if thing[1] is not None]
    found = [
        ("colour", "What colour is the background?", f"{colour.capitalize()}."),
        ("exists", f"Is there {with_article(asked)}?", "Yes." if asked in counts else "No."),
        ("count", f"How many {plural(counted)} are there?", f"{WORDS[counts[counted]]}."),
        ("list", "List everything.", counts),
    ]
    if placed:
        name, row, column = chance.choice(placed)
        found.append(("at", f"What is {place(row, column)}?", f"{with_article(name).capitalize()}."))
    else:
        found.append(("total", "How many things are there?", f"{WORDS[len(things)]}."))
    return found


def place(row: int, column: int) -> str:
    if row == column == 1:
        return "in the middle"
    words = [word for word in (ROWS[row], COLUMNS[column]) if word != "middle"]
    return f"at the {' '.join(words)}"


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def say(counts: Counter) -> str:
    """A list as the model may say it."""
    return ", ".join(with_article(name) for name in counts.elements()) + "."


def read_list(answer: str) -> Counter:
    """The things that an answer names: `A cat, a cat and the number 4.`, `Two cats and the number 4.`"""
    plurals = {plural(name): name for name in GLYPHS}
    things = Counter()
    for part in re.split(r",| and ", answer.strip().rstrip(".").lower()):
        number, _, name = part.strip().partition(" ")
        if number.capitalize() in WORDS and name in plurals:
            things[plurals[name]] += WORDS.index(number.capitalize())
        elif number:
            things[re.sub(r"^(an?|the) ", "", part.strip())] += 1
    return things


@torch.no_grad()
def answer_all(model, processor, samples: list[tuple[Image.Image, str]], m: int, batch_size: int = 64) -> list[str]:
    answers = []
    for start in range(0, len(samples), batch_size):
        pictures, asked = zip(*samples[start : start + batch_size])
        turns = [[{"role": "user", "content": f"<image>\n{question}"}] for question in asked]
        prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
        options = {"num_visual_tokens": m, "add_special_tokens": False, "padding": True, "return_tensors": "pt"}
        inputs = processor(images=list(pictures), text=prompts, **options)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def contradicts(kind: str, question: str, answer: str, listed: Counter) -> bool:
    """Whether an answer is at odds with the list that the model gave of the same picture."""
    if kind == "exists":
        (name,) = (name for name in GLYPHS if question == f"Is there {with_article(name)}?")
        return answer != ("Yes." if listed[name] else "No.")
    if kind == "at":
        return bool(read_list(answer) - listed)
    if kind == "count":
        (name,) = (name for name in GLYPHS if question == f"How many {plural(name)} are there?")
        number = listed[name]
    else:
        number = listed.total()
    return number >= len(WORDS) or answer != f"{WORDS[number]}."


def consistency_questions(things: list, seed: int) -> list[tuple[str, str]]:
    """`[(type, question), ...]`: whether and how many there are of each kind that is there and of two that are not, how many
    things there are, and what is at each place that has something."""
    kinds = sorted({name for name, *_ in things} | set(random.Random(seed).sample(list(GLYPHS), 2)))
    asked = [("exists", f"Is there {with_article(kind)}?") for kind in kinds]
    asked += [("count", f"How many {plural(kind)} are there?") for kind in kinds]
    asked.append(("total", "How many things are there?"))
    return asked + [("at", f"What is {place(row, column)}?") for _, row, column in things if row is not None]


def evaluate(model, processor, family: str, num_pictures: int, m: int) -> dict[str, float]:
    """Per cent right: of all questions, and of lists; and per cent of answers that contradict the list."""
    asked, again = [], []
    for seed in range(num_pictures):
        picture, colour, things = paint(family, seed)
        asked += [(picture, *question) for question in questions(colour, things, seed)]
        again += [(picture, seed, *question) for question in consistency_questions(things, seed)]
    answers = answer_all(model, processor, [(picture, question) for picture, _, question, _ in asked], m)
    right, lists = {"all": [], "list": []}, []
    for (_, kind, _, expected), answer in zip(asked, answers):
        correct = read_list(answer) == expected if kind == "list" else answer == expected
        right["all"].append(correct)
        if kind == "list":
            right["list"].append(correct)
            lists.append(read_list(answer))
    answers = answer_all(model, processor, [(picture, question) for picture, _, _, question in again], m)
    odd = [contradicts(*question, answer, lists[seed]) for (_, seed, *question), answer in zip(again, answers)]
    result = {name: 100 * sum(values) / len(values) for name, values in right.items()}
    return result | {"contradictions": 100 * sum(odd) / len(odd)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mqt_llava.TINY_CHECKPOINT)
    parser.add_argument("--pictures", type=int, default=30, help="of each family")
    parser.add_argument("--output_dir", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=False)
    lines = ["| family | what | " + " | ".join(f"m = {m}" for m in NUM_VISUAL_TOKENS) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(NUM_VISUAL_TOKENS))
    for family in FAMILIES:
        results = [evaluate(model, processor, family, arguments.pictures, m) for m in NUM_VISUAL_TOKENS]
        for name in results[0]:
            lines.append(f"| {family} | {name} | " + " | ".join(f"{result[name]:.1f}" for result in results) + " |")
            print(lines[-1], flush=True)
    table = (
        f"Per cent, of {arguments.pictures} pictures a family and five questions each.\n\n" + "\n".join(lines) + "\n"
    )
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "families.md").write_text(table)


if __name__ == "__main__":
    main()
