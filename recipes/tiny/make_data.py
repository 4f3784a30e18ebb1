"""Write training data in LLaVA's format: JSON lists of conversations beside a folder of pictures.

    python -m recipes.tiny.make_data --output_dir runs/data

`captions.json` and `conversations.json` speak of the pictures in `images/`, which are padded and resized as the
processor does it, so that training need not. `patches.npy` has what every patch shows, from which the vision tower and the language
model learn.
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
    """Describe the picture."""
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


def write_json(path, samples):
    """Write aside and move into place, so that an interrupted run leaves no half file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(samples), encoding="utf-8")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=150_000)
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    arguments = parser.parse_args()

    images, size = arguments.output_dir / "images", arguments.image_size
    images.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.pictures)
    pairs = range(PAIR_SEED, PAIR_SEED + round(PAIR_SHARE * arguments.pictures))
    with multiprocessing.Pool(os.cpu_count()) as pool:
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
