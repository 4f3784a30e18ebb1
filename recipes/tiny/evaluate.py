"""Accuracy of a checkpoint on scenes never trained on, by type of question and number of visual tokens.

    python -m recipes.tiny.evaluate --model mqt_llava/checkpoints/mqt-llava-tiny --output_dir docs/accuracy

Writes `accuracy.json`, the table `accuracy.md` and the figure `accuracy.png`. Controls tell what can be guessed: the same
questions about a blank picture and about another scene's picture; of the answers about the blank picture, how many say
that nothing is there; and whether kinds are known as line drawings that training never drew so.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import mqt_llava  # noqa: F401  (registers the model)
from mqt_llava.evaluation import Question, answer_questions

from . import make_data, scenes
from .pretrain_vision import EVALUATION_SEED


NUM_VISUAL_TOKENS = (1, 2, 4, 8, 16, 32, 64)
SINGULARS = {scenes.PLURALS.get(kind, f"{kind}s"): kind for kind in scenes.KINDS} | {
    kind: kind for kind in scenes.KINDS
}


def evaluation_set(num_pictures, image_size=make_data.IMAGE_SIZE, first_seed=EVALUATION_SEED):
    """`[(pictures, type, question, answer), ...]`: one question of each type that a scene admits, and for each fifth scene
    one about two pictures. Pictures are drawn at their own size, and padded and resized once for all questions."""
    samples = []
    for seed in range(first_seed, first_seed + num_pictures):
        scene = scenes.make_scene(seed)
        pictures = [make_data.prepare(scenes.draw(scene), image_size)]
        asked = set()
        for kind, question, answer in scenes.conversation(scene):
            if kind not in asked:
                asked.add(kind)
                samples.append((pictures, kind, question, answer))
        if seed % 5 == 0:
            pair, question, answer = scenes.ask_pair(seed)
            pictures = [make_data.prepare(scenes.draw(scene), image_size) for scene in pair]
            samples.append((pictures, "pair", question, answer))
    return samples


def about_nothing(sample, blank):
    """The question of a sample about a blank picture, and the answer that is right there."""
    _, kind, question, _ = sample
    kind_asked = question.rpartition(" ")[2].rstrip("?")
    answers = {
        "colour": "Grey.",
        "total": "Zero.",
        "number?": "No.",
        "exists": "No.",
        "count": "Zero.",
        "at": "Nothing.",
    }
    answers |= {"beside": f"There is no {kind_asked}.", "number": "There is no number.", "list": "There is nothing."}
    return [blank], kind, question, answers[kind]


def line_drawings(kinds, number, image_size=make_data.IMAGE_SIZE):
    """Samples that ask what is drawn in lines, one thing a picture."""
    samples = []
    for i in range(number):
        rng = np.random.default_rng([i, 8])
        name, size = kinds[i % len(kinds)], float(rng.uniform(0.35, 0.7))
        x, y = (float(rng.uniform(size / 2, 1 - size / 2)) for _ in range(2))
        thing = scenes.Thing(name, x, y, size, float(rng.uniform(-30, 30)), is_line_drawing=True)
        colour, texture = scenes.COLOURS[rng.integers(len(scenes.COLOURS))], scenes.TEXTURES[i % len(scenes.TEXTURES)]
        scene = scenes.Scene(EVALUATION_SEED + i, colour, texture, 1.0, 1.0, 512, (thing,))
        picture = make_data.prepare(scenes.draw(scene), image_size)
        samples.append(([picture], "list", "List everything.", scenes.list_all(scene)))
    return samples


def read_answer(answer):
    """What an answer names and how often, in any order: `"Two cats and a dog."` and `"A dog, a cat and a cat."` are one."""
    counts = Counter()
    for part in re.split(r", | and ", answer.strip().rstrip(".").lower()):
        number, _, name = part.partition(" ")
        if name in SINGULARS and number in scenes.NUMBER_WORDS:
            counts[SINGULARS[name]] += scenes.NUMBER_WORDS.index(number)
        else:
            counts[re.sub(r"^(an?|the) ", "", part)] += 1
    return counts


def is_right_at(model, processor, samples, num_visual_tokens, batch_size=128):
    """`{m: [whether the greedy answer to each sample is the expected one]}`: letter for letter, things in any order."""
    questions = [
        Question(str(i), [{"role": "user", "content": "<image>\n" * len(pictures) + question}], pictures, [answer])
        for i, (pictures, _, question, answer) in enumerate(samples)
    ]
    expected = [read_answer(sample[3]) for sample in samples]
    right = {m: [False] * len(samples) for m in num_visual_tokens}
    answers = answer_questions(model, processor, questions, list(num_visual_tokens), 40, batch_size)
    for answer in tqdm(answers, total=len(samples) * len(right), unit="answer", mininterval=10):
        if answer.error:
            raise ValueError(answer.error)
        right[answer.num_visual_tokens][answer.index] = read_answer(answer.text) == expected[answer.index]
    return right


def is_right(model, processor, samples, num_visual_tokens, batch_size=128):
    """The same for one m."""
    return is_right_at(model, processor, samples, [num_visual_tokens], batch_size)[num_visual_tokens]


def accuracy_by_type(samples, right):
    """`{type: percentage}` with `all`, and the means over the coarse and over the fine-grained types."""
    by_type = defaultdict(list)
    for (_, kind, _, _), correct in zip(samples, right):
        by_type[kind].append(correct)
    kinds = (*scenes.QUESTION_TYPES, "pair")
    result = {kind: 100 * sum(by_type[kind]) / len(by_type[kind]) for kind in kinds if by_type[kind]}
    for group, kinds in (("coarse", scenes.COARSE), ("fine-grained", scenes.FINE)):
        present = [result[kind] for kind in kinds if kind in result]
        if present:
            result[group] = sum(present) / len(present)
    result["all"] = 100 * sum(right) / len(right)
    return result


def markdown_table(accuracy):
    """One row for each m or control, one column for each type of question."""
    columns = list(next(iter(accuracy.values())))
    lines = ["| m | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {m} | " + " | ".join(f"{row[c]:.1f}" if c in row else "" for c in columns) + " |"
        for m, row in accuracy.items()
    ]
    return "\n".join(lines) + "\n"


def figure(accuracy, path):
    """Accuracy against m: all questions, the coarse and the fine-grained ones, and each type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_visual_tokens = [m for m in accuracy if isinstance(m, int)]
    axes = plt.subplots(figsize=(7, 4.2), layout="constrained")[1]
    for kind in accuracy[num_visual_tokens[0]]:
        bold = kind in ("coarse", "fine-grained", "all")
        style = {"linewidth": 2.5, "marker": "o"} if bold else {"linewidth": 1, "alpha": 0.55, "linestyle": "--"}
        axes.plot(num_visual_tokens, [accuracy[m][kind] for m in num_visual_tokens], label=kind, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(num_visual_tokens, num_visual_tokens)
    axes.set(xlabel="visual tokens per image (m)", ylabel="exact match, %", ylim=(0, 102))
    axes.set_title("mqt-llava-tiny: one checkpoint, any number of visual tokens", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    plt.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=NUM_VISUAL_TOKENS)
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    samples = evaluation_set(arguments.pictures, processor.image_processor.side)
    right = is_right_at(model, processor, samples, arguments.num_visual_tokens)
    accuracy = {m: accuracy_by_type(samples, of_m) for m, of_m in right.items()}

    # A fifth of the questions is enough to see that nothing but guessing is left
    m, samples = max(arguments.num_visual_tokens), samples[: len(samples) // 5]
    samples = [sample for sample in samples if sample[1] != "pair"]
    blank = Image.new("RGB", (128, 128), (128, 128, 128))
    shift = len(samples) // 2
    controls = {
        "blank picture": [([blank], *rest) for _, *rest in samples],
        "another picture": [(samples[i - shift][0], *rest) for i, (_, *rest) in enumerate(samples)],
        "blank picture, as blank": [about_nothing(sample, blank) for sample in samples],
    }
    for name, control in controls.items():
        accuracy[f"{m}, {name}"] = accuracy_by_type(control, is_right(model, processor, control, m))

    # Does it know an apple, or a bitmap?
    others = [kind for kind in scenes.KINDS if kind not in scenes.HELD_OUT]
    for name, kinds in (("kinds that training drew so", others), ("kinds that it never drew so", scenes.HELD_OUT)):
        drawn = line_drawings(kinds, 224, processor.image_processor.side)
        accuracy[f"{m}, line drawings of {name}"] = accuracy_by_type(drawn, is_right(model, processor, drawn, m))

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    (arguments.output_dir / "accuracy.md").write_text(markdown_table(accuracy))
    figure(accuracy, arguments.output_dir / "accuracy.png")
    print(markdown_table(accuracy))


if __name__ == "__main__":
    main()
