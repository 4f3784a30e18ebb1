"""What `mqt_scenes.yaml` asks, and how answers are scored."""

from pathlib import Path

from PIL import Image

from mqt_llava.evaluation import METRICS


FOLDER = Path(__file__).parent


def doc_to_visual(doc):
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def doc_to_text(doc):
    return doc["conversations"][0]["value"].removeprefix("<image>\n")


def doc_to_target(doc):
    return doc["conversations"][1]["value"]


def process_results(doc, results):
    return {"exact_match": METRICS["exact_match"](results[0], [doc_to_target(doc)])}
