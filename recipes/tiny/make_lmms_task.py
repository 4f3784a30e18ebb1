"""Write the questions and pictures of `examples/lmms_eval`, a task for lmms-eval that needs no download.

    python -m recipes.tiny.make_lmms_task --output_dir examples/lmms_eval

`questions.json` is in LLaVA's format, so that `mqt-llava evaluate` reads it too. The scenes are among those never trained on.
"""

import argparse
import json
from pathlib import Path

from .make_data import IMAGE_SIZE, paint, prepare
from .pretrain_vision import EVALUATION_SEED
from .scenes import QUESTION_TYPES, conversation, make_scene


QUESTIONS_PER_PICTURE = 3


def choose(scene, kinds):
    """Questions about a scene of the types that have been asked least so far."""
    turns = sorted(conversation(scene), key=lambda turn: kinds[turn[0]])[:QUESTIONS_PER_PICTURE]
    for kind, *_ in turns:
        kinds[kind] += 1
    return turns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=20)
    arguments = parser.parse_args()

    folder = arguments.output_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows, kinds = [], dict.fromkeys(QUESTION_TYPES, 0)
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + arguments.pictures):
        scene = make_scene(seed)
        # As small as the vision tower sees it, and in 64 colours: a file of a few kB
        picture = prepare(paint(scene, IMAGE_SIZE), IMAGE_SIZE).quantize(64)
        picture.save(folder / f"{seed}.png", optimize=True)
        for number, (kind, question, answer) in enumerate(choose(scene, kinds)):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            row = {"id": f"{seed}-{number}", "image": f"images/{seed}.png", "category": kind, "conversations": turns}
            rows.append(row)
    (arguments.output_dir / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
