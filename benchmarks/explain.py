"""How far heat maps can be trusted: whether they point at the thing that an answer is about, where that is known.

    python -m benchmarks.explain --model mqt_llava/checkpoints/mqt-llava-tiny --num_pictures 200 --output_dir docs/benchmarks

The model is asked what is at a place ("What is at the top left?") of scenes that were never trained on, in which one thing and
nothing else to speak of is there. Each method's heat map for the whole answer is then judged in two ways.

By the picture: the share of the heat in the thing's own of the 3 x 3 cells, and how often the hottest patch has its centre there,
over the answers that are right. A map that is even over the picture has a ninth of its heat in the cell; one that covers the thing's
own box and nothing else has what the row "the thing itself" says, since things reach over their cells. Heat on the padding counts
as heat outside.

By the model: patches turn grey, the hottest first (deletion), or come back into a grey picture, the hottest first (insertion). The area
under the curve of the answer's probability, over all answers; small for deletion and large for insertion are good
(https://arxiv.org/abs/1806.07421). `--curve_pictures` says for how many pictures, since each takes many passes.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import mqt_llava
from benchmarks.measure import machine
from mqt_llava.explain import METHODS, AskedQuestion, EncodedImages
from recipes.tiny import scenes
from recipes.tiny.evaluate import read_answer
from recipes.tiny.pretrain_vision import EVALUATION_SEED


NUM_VISUAL_TOKENS = (1, 4, 16, 64)
CHANCE, THING = "evenly", "the thing itself"
STEPS = np.linspace(0, 1, 9)  # shares of patches that are deleted or inserted


def questions(number):
    """`[(scene, cell, thing), ...]`, one for each scene that has a cell of which it is plain what it shows."""
    found, seed = [], EVALUATION_SEED
    while len(found) < number:
        scene = scenes.make_scene(seed)
        occupied = scenes.clear_cells(scene)[0]
        if occupied:
            cell = sorted(occupied)[np.random.default_rng([seed, 17]).integers(len(occupied))]
            found.append((scene, cell, occupied[cell]))
        seed += 1
    return found


def shares_in_box(scene, box, side):
    """Which share of each patch is in a box of a scene, `(side, side)`. The box, left, top, right and bottom, is in units of the
    picture's width and height; patches lie on the picture padded to a square."""
    edges, spans = np.arange(side + 1) / side, []
    for low, high, length in ((box[1], box[3], scene.height), (box[0], box[2], scene.width)):
        low, high = ((1 - length) / 2 + at * length for at in (low, high))
        spans.append(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * side)
    return torch.tensor(np.outer(*spans), dtype=torch.float32)


def known_maps(scene, cell, thing, side):
    """The thing's cell, and heat maps of what is known: all of the picture, and the thing's box."""
    row, column = divmod(cell, 3)
    own = shares_in_box(scene, (column / 3, row / 3, (column + 1) / 3, (row + 1) / 3), side)
    half = 0.45 * thing.size / scene.width, 0.45 * thing.size / scene.height
    box = thing.x - half[0], thing.y - half[1], thing.x + half[0], thing.y + half[1]
    maps = {CHANCE: shares_in_box(scene, (0, 0, 1, 1), side), THING: shares_in_box(scene, box, side)}
    return own, {name: heat / heat.sum() for name, heat in maps.items()}


def curves(asked, heats, batch_size):
    """The answer's probability as patches are deleted and inserted, the hottest first: `{name: (deletion, insertion)}`, each of
    shape `(len(STEPS),)`. Patches that are equally hot come in random order."""
    rng, covered = np.random.default_rng(0), []
    for heat in heats.values():
        order = np.lexsort([rng.random(heat.numel()), -heat.flatten().numpy()])
        rank = torch.empty(heat.numel(), dtype=torch.long)
        rank[torch.from_numpy(order)] = torch.arange(heat.numel())
        deleted = rank < torch.from_numpy(STEPS * heat.numel()).round().long()[:, None]
        covered.append(torch.stack([deleted, ~deleted]))
    rows = torch.stack(covered).flatten(0, 2).to(asked.ids.device)
    probabilities = asked.log_probs_without(0, rows, batch_size).sum(-1).exp().cpu()
    return dict(zip(heats, probabilities.view(len(heats), 2, -1).numpy()))


def measure(model, processor, samples, num_visual_tokens, methods, num_curves, batch_size):
    """One row for each picture, m and method."""
    rows = []
    for number, (scene, cell, thing) in enumerate(tqdm(samples, mininterval=10)):
        images = EncodedImages(model, processor, [scenes.draw(scene)], max(num_visual_tokens))
        own, known = known_maps(scene, cell, thing, images.side)
        question = f"What is {scenes.where(cell)}?"
        expected = read_answer(scenes.sentence(scenes.noun(thing.name)))
        for m in num_visual_tokens:
            asked = AskedQuestion(model, processor, images, question, m, per_word=False)
            heats, taken = dict(known), {}
            for method in methods:
                start = time.perf_counter()
                heats[method] = asked.explain(method, batch_size).heat()[0]
                taken[method] = time.perf_counter() - start
            areas = {}
            if number < num_curves:
                areas = {
                    name: (c[:, 1:] + c[:, :-1]).mean(-1) / 2 for name, c in curves(asked, heats, batch_size).items()
                }
            for name, heat in heats.items():
                has_heat = bool(heat.sum() > 0)
                deletion, insertion = areas.get(name, (None, None))
                rows.append(
                    {
                        "picture": scene.seed,
                        "m": m,
                        "method": name,
                        "right": read_answer(asked.answer) == expected,
                        "mass": float((heat * own).sum()) if has_heat else 1 / 9,
                        "hottest": float(own.flatten()[heat.argmax()] > 0.5) if has_heat else 1 / 9,
                        "deletion": deletion,
                        "insertion": insertion,
                        "seconds": taken.get(name),
                    }
                )
    return rows


def mean(values):
    values = [float(value) for value in values if value is not None]
    return np.mean(values) if values else float("nan")


def interval(values):
    """Half the width of a mean's 95 % interval."""
    return 1.96 * np.std(values) / max(len(values), 1) ** 0.5 if len(values) else float("nan")


def markdown(rows, num_visual_tokens, methods):
    lines = ["| m | method | heat in the cell, % | hottest patch in it, % | deletion | insertion | s |"]
    lines.append("| ---: | --- |" + " ---: |" * 5)
    for m in num_visual_tokens:
        for method in (CHANCE, *methods, THING):
            some = [row for row in rows if row["m"] == m and row["method"] == method]
            right = [row for row in some if row["right"]]
            mass = [100 * row["mass"] for row in right]
            cells = [f"{mean(mass):.1f} ± {interval(mass):.1f}"]
            # All patches of an even map are the hottest
            hottest = 100 / 9 if method == CHANCE else 100 * mean(row["hottest"] for row in right)
            cells.append(f"{hottest:.0f}")
            cells += [f"{mean(row[name] for row in some):.3f}" for name in ("deletion", "insertion")]
            seconds = mean(row["seconds"] for row in some)
            cells.append("" if np.isnan(seconds) else f"{seconds:.2f}")
            lines.append(f"| {m} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mqt_llava.TINY_CHECKPOINT)
    parser.add_argument("--num_pictures", type=int, default=200)
    parser.add_argument("--curve_pictures", type=int, default=50, help="for deletion and insertion")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=NUM_VISUAL_TOKENS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output_dir", type=Path, help="where to write the table and what it is made of")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=False)
    where, samples = machine(model.device), questions(arguments.num_pictures)
    settings = arguments.num_visual_tokens, arguments.methods, arguments.curve_pictures, arguments.batch_size
    rows = measure(model, processor, samples, *settings)
    right = {}
    for row in rows:
        right.setdefault(row["m"], {})[row["picture"]] = row["right"]
    right = ", ".join(f"{sum(of_m.values())} at m = {m}" for m, of_m in right.items())
    table = (
        f"{where}. {len(samples)} pictures, one question each, right: {right}. Heat of right answers, ± 95 % interval; deletion and "
        f"insertion of the first {min(arguments.curve_pictures, len(samples))} pictures.\n\n"
        f"{markdown(rows, arguments.num_visual_tokens, arguments.methods)}\n"
    )
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "explain.md").write_text(table)
        with (arguments.output_dir / "explain.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {arguments.output_dir}", file=sys.stderr)


if __name__ == "__main__":
    main()
