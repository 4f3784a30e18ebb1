"""Write training data in LLaVA's format: JSON lists of conversations beside a folder of pictures.

    python -m recipes.tiny.make_data --output_dir runs/data

`captions.json` (stage 1) and `conversations.json` (stage 2) speak of the pictures in `images/`, which are padded and resized as the
processor does it, so that training need not. `patches.npy` has what every patch shows, for the vision tower. `text.json` has no
pictures: there the user says in words what a scene shows, and the language model learns to answer from that, first from drills.
"""

import argparse
import functools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mqt_llava import MQTLlavaImageProcessor

from . import scenes


TEXT_SEED = 50_000_000  # scenes told in words are others than those drawn
PAIR_SEED = 60_000_000
IMAGE_SIZE, GRID = 128, 8  # the vision tower's pixels and patches
PAIR_SHARE = 0.1  # of the conversations


@functools.cache
def image_processor(size):
    side = {"height": size, "width": size}
    return MQTLlavaImageProcessor(size=side, crop_size=side, do_normalize=False)


def prepare(picture, size):
    """The picture as the vision tower sees it, before normalization."""
    pixels = image_processor(size)(picture, return_tensors="np")["pixel_values"][0]
    return Image.fromarray((255 * pixels.transpose(1, 2, 0)).round().astype(np.uint8))


def paint(scene, size, **kwargs):
    """A scene at its own size, but not larger than makes a difference in what the vision tower sees."""
    return scenes.draw(scene, min(scene.pixels, 2 * size), **kwargs)


def draw_picture(folder, seed, size):
    """Write a scene's picture, and return what its patches show."""
    picture, patches, centres = paint(scenes.make_scene(seed), size, grid=GRID)
    prepare(picture, size).save(folder / f"{seed:07d}.png", compress_level=1)
    return np.stack([patches, centres]).astype(np.uint8)


def draw_pair(folder, seed, size):
    """Write two scenes' pictures."""
    for name, scene in zip("ab", scenes.ask_pair(seed)[0]):
        prepare(paint(scene, size), size).save(folder / f"{seed}{name}.png", compress_level=1)


def turns(*pairs):
    """LLaVA's list of turns for `(question, answer)` pairs."""
    speakers = ("human", "gpt")
    return [{"from": speaker, "value": value} for pair in pairs for speaker, value in zip(speakers, pair)]


def caption_sample(seed):
    """Stage 1: describe the picture."""
    pair = ("<image>\nDescribe the picture.", scenes.caption(scenes.make_scene(seed)))
    return {"id": f"{seed}", "image": f"{seed:07d}.png", "conversations": turns(pair)}


def conversation_sample(seed):
    """Stage 2: one to six questions about one picture, the hard types more often."""
    scene, rng = scenes.make_scene(seed), np.random.default_rng([seed, 4])
    weights = {"list": 3, "at": 3, "beside": 3, "count": 3, "exists": 2.5, "total": 1.5, "number": 1}
    weights = np.array([weights.get(kind, 0.5) for kind in scenes.QUESTION_TYPES])
    pairs = {}
    while not pairs:
        for kind in rng.choice(scenes.QUESTION_TYPES, rng.integers(1, 7), p=weights / weights.sum()):
            question = scenes.ask(scene, str(kind), rng)
            if question:
                pairs.setdefault(*question)
    pairs = [list(pair) for pair in pairs.items()]
    pairs[0][0] = "<image>\n" + pairs[0][0]
    return {"id": f"{seed}", "image": f"{seed:07d}.png", "conversations": turns(*pairs)}


def pair_sample(seed):
    """Stage 2: a question about two pictures."""
    _, question, answer = scenes.ask_pair(seed)
    pair = (f"<image>\n<image>\n{question}", answer)
    return {"id": f"{seed}", "image": [f"{seed}a.png", f"{seed}b.png"], "conversations": turns(pair)}


def text_sample(seed):
    """No picture: the user tells the scene, things in any order, and asks."""
    scene, rng = scenes.make_scene(TEXT_SEED + seed), np.random.default_rng([seed, 3])
    # What stands beside what is not told
    pairs = [
        pair for kind, *pair in scenes.conversation(scene) if kind != "beside" or pair[1].startswith("There is no")
    ]
    pairs = pairs[: rng.integers(2, 9)]
    if seed % 4 == 0:
        pairs.insert(0, ["Describe the picture.", scenes.caption(scene)])
    told = scenes.caption(scene, [scene.things[i] for i in rng.permutation(len(scene.things))])
    pairs[0][0] = f"{told}\n{pairs[0][0]}"
    return {"id": f"text-{seed}", "conversations": turns(*pairs)}


def drill_sample(seed, with_places=False):
    """No picture either: up to four things told, and eight questions whether, how many and where, some of them twice. To find
    what was asked for in what was told is the one skill that all answers need; from whole scenes alone it was not learned in
    400 steps."""
    rng = np.random.default_rng([seed, 7])
    number, kinds = int(rng.integers(1, 5)), scenes.KINDS
    names = [kinds[i] for i in rng.integers(len(kinds), size=number)]
    cells = rng.choice(9, number, replace=False) if with_places else []
    pairs = []
    for _ in range(8):
        i = rng.integers(number)
        name = names[i] if rng.random() < 0.5 else kinds[rng.integers(len(kinds))]
        if with_places and rng.random() < 0.6:
            pairs.append((f"What is {scenes.where(cells[i])}?", scenes.sentence(scenes.noun(names[i]))))
        elif rng.random() < 0.7:
            pairs.append((f"Is there {scenes.noun(name)}?", "Yes." if name in names else "No."))
        else:
            word = scenes.NUMBER_WORDS[names.count(name)]
            pairs.append((f"How many {scenes.plural(name)} are there?", scenes.sentence(word)))
    told = [scenes.noun(name) for name in names]
    told = [f"{noun} {scenes.where(cell)}" for noun, cell in zip(told, cells)] or told
    (question, answer), *rest = pairs
    pairs = [(f"{scenes.sentence(scenes.join(told))}\n{question}", answer), *rest]
    return {"id": f"drill-{seed}", "conversations": turns(*pairs)}


def by_length(samples, chunk=1280):
    """Samples of like length beside each other, so that batches need little padding; otherwise in their order."""
    chunks = (samples[start : start + chunk] for start in range(0, len(samples), chunk))
    return [sample for part in chunks for sample in sorted(part, key=lambda sample: len(json.dumps(sample)))]


def write_json(path, samples):
    """Write aside and move into place, so that an interrupted run leaves no half file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(samples), encoding="utf-8")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=150_000)
    parser.add_argument("--drills", type=int, default=28_800, help="the last third with places")
    parser.add_argument("--texts", type=int, default=60_000)
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    arguments = parser.parse_args()

    images, size = arguments.output_dir / "images", arguments.image_size
    images.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.pictures)
    pairs = range(PAIR_SEED, PAIR_SEED + round(PAIR_SHARE * arguments.pictures))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        drills = ((seed, 3 * seed >= 2 * arguments.drills) for seed in range(arguments.drills))
        text = pool.starmap(drill_sample, drills) + pool.map(text_sample, range(arguments.texts))
        write_json(arguments.output_dir / "text.json", by_length(text))
        write_json(arguments.output_dir / "captions.json", pool.map(caption_sample, seeds, chunksize=500))
        samples = pool.map(conversation_sample, seeds, chunksize=500) + pool.map(pair_sample, pairs, chunksize=500)
        write_json(arguments.output_dir / "conversations.json", samples)
        pool.starmap(draw_pair, ((images, seed, size) for seed in pairs), chunksize=100)
        patches = pool.starmap(draw_picture, ((images, seed, size) for seed in seeds), chunksize=100)
    partial = arguments.output_dir / "patches.partial.npy"
    np.save(partial, np.stack(patches))
    partial.replace(arguments.output_dir / "patches.npy")


if __name__ == "__main__":
    main()
