"""Twelve conversations, of which every fourth pair has no picture."""

import json

from tests.small_model import make_images


def write_conversations(folder):
    """LLaVA's JSON: rows 2, 3, 6, 7, ... are text alone, so that every second batch of two is."""
    rows = []
    for i, image in enumerate(make_images(12)):
        has_image = i % 4 < 2
        question = "<image>\n" * has_image + f"{i}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {i}. " * (i % 3 + 1)}]
        rows.append({"id": i, "conversations": turns})
        if has_image:
            image.save(folder / f"{i}.png")
            rows[-1]["image"] = f"{i}.png"
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"
