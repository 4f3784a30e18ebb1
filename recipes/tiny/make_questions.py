"""Write pictures never trained on, and questions about them in LLaVA's format, which every command of `mqt-llava` reads.

    python -m recipes.tiny.make_questions --output_dir runs/calibration --first_seed 30000000 --pictures 4500 --per_picture 1

With `--colors 64` a picture takes a few kB: so was `examples/lmms_eval` made, a task for lmms-eval that needs no download
(`--output_dir examples/lmms_eval --pictures 20 --per_picture 3 --colors 64`).
"""

import argparse
import json
from pathlib import Path

from .make_data import IMAGE_SIZE, paint, prepare
from .pretrain_vision import EVALUATION_SEED
from .scenes import QUESTION_TYPES, conversation, make_scene


def choose(scene, kinds, number):
    """Questions about a scene of the types that have been asked least so far."""
    turns = sorted(conversation(scene), key=lambda turn: kinds[turn[0]])[:number]
    for kind, *_ in turns:
        kinds[kind] += 1
    return turns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--first_seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--per_picture", type=int, default=1, help="questions about each")
    parser.add_argument("--colors", type=int, help="of a picture, at most")
    arguments = parser.parse_args()

    folder = arguments.output_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows, kinds = [], dict.fromkeys(QUESTION_TYPES, 0)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.pictures):
        scene = make_scene(seed)
        picture = prepare(paint(scene, IMAGE_SIZE), IMAGE_SIZE)  # as small as the vision tower sees it
        if arguments.colors:
            picture = picture.quantize(arguments.colors)
        picture.save(folder / f"{seed}.png", optimize=True)
        for number, (kind, question, answer) in enumerate(choose(scene, kinds, arguments.per_picture)):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            row = {"id": f"{seed}-{number}", "image": f"images/{seed}.png", "category": kind, "conversations": turns}
            rows.append(row)
    (arguments.output_dir / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
