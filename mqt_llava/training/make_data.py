"""Write training data in LLaVA's format: JSON lists of conversations beside a folder of pictures.

    python -m mqt_llava.training.make_data --output_dir runs/data

`captions.json` (stage 1), `conversations.json` and `short.json` (stage 2) speak of the pictures in `images/`. `text.json` has no
pictures: there the user says in words what a scene shows, and the language model learns to answer from that.
"""

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np

from . import scenes


TEXT_SEED = 5_000_000  # scenes told in words are others than those drawn


def turns(*pairs):
    """LLaVA's list of turns for `(question, answer)` pairs."""
    speakers = ("human", "gpt")
    return [{"from": speaker, "value": value} for pair in pairs for speaker, value in zip(speakers, pair)]


def caption_sample(seed):
    """Stage 1: describe the picture."""
    pair = ("<image>\nDescribe the picture.", scenes.caption(scenes.make_scene(seed)))
    return {"id": f"{seed}", "image": f"{seed:07d}.png", "conversations": turns(pair)}


def conversation_sample(seed, questions):
    """Stage 2: several questions about one picture."""
    pairs = [pair for _, *pair in scenes.conversation(scenes.make_scene(seed), questions)]
    pairs[0][0] = "<image>\n" + pairs[0][0]
    return {"id": f"{seed}", "image": f"{seed:07d}.png", "conversations": turns(*pairs)}


def short_sample(seed, questions=3):
    """The end of stage 2: few questions about a picture, in any order, the hard types more often.

    In `conversations.json` "List everything." always comes last, where earlier answers help. Here it comes first too.
    """
    scene = scenes.make_scene(seed)
    rng = np.random.default_rng([seed, 4])
    weights = {"list": 4, "at": 3, "beside": 3, "count": 2, "exists": 2, "total": 1.5}
    weights = np.array([weights.get(kind, 0.5) for kind in scenes.QUESTION_TYPES])
    kinds = rng.choice(scenes.QUESTION_TYPES, questions, replace=False, p=weights / weights.sum())
    pairs = [list(pair) for kind in kinds if (pair := scenes.ask(scene, str(kind), rng))]
    pairs = pairs or [["List everything.", scenes.ask(scene, "list", rng)[1]]]
    pairs[0][0] = "<image>\n" + pairs[0][0]
    return {"id": f"{seed}", "image": f"{seed:07d}.png", "conversations": turns(*pairs)}


def text_sample(seed, questions):
    """No picture: the user tells the scene, things in any order, and asks."""
    scene = scenes.make_scene(TEXT_SEED + seed)
    pairs = [pair for _, *pair in scenes.conversation(scene, questions)]
    things = [scene.things[i] for i in np.random.default_rng([seed, 3]).permutation(len(scene.things))]
    told = scenes.caption(scenes.Scene(scene.seed, scene.colour, scene.texture, tuple(things)))
    if seed % 4 == 0:
        pairs.insert(0, ["Describe the picture.", scenes.caption(scene)])
    pairs[0][0] = f"{told}\n{pairs[0][0]}"
    return {"id": f"text-{seed}", "conversations": turns(*pairs)}


def draw_picture(path, seed, size):
    scenes.draw(scenes.make_scene(seed), size).save(path, compress_level=1)


def write_json(path, samples):
    """Write aside and move into place, so that an interrupted run leaves no half file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(samples), encoding="utf-8")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=8, help="questions about each picture, at most")
    parser.add_argument("--image_size", type=int, default=96)
    arguments = parser.parse_args()

    images = arguments.output_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.pictures)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        jobs = ((images / f"{seed:07d}.png", seed, arguments.image_size) for seed in seeds)
        pool.starmap(draw_picture, jobs, chunksize=500)
    write_json(arguments.output_dir / "captions.json", [caption_sample(seed) for seed in seeds])
    samples = [conversation_sample(seed, arguments.questions) for seed in seeds]
    write_json(arguments.output_dir / "conversations.json", samples)
    write_json(arguments.output_dir / "short.json", [short_sample(seed) for seed in seeds])
    samples = [text_sample(seed, arguments.questions) for seed in range(arguments.texts)]
    write_json(arguments.output_dir / "text.json", samples)


if __name__ == "__main__":
    main()
