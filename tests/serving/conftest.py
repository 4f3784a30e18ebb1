from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

import mqt_llava


ROOT = Path(__file__).parents[2]
if find_spec("vllm") is None:  # nor are the packages that it brings
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """mqt-llava-tiny with its code, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny")
    AutoModelForImageTextToText.from_pretrained(mqt_llava.TINY_CHECKPOINT).save_pretrained(folder)
    AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Files of a scene and of two others made of it: mirrored, and a quarter of it."""
    folder = tmp_path_factory.mktemp("pictures")
    scene = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    width, height = scene.size
    others = ImageOps.mirror(scene), scene.crop((0, 0, width // 2, height // 3))
    for number, picture in enumerate([scene, *others]):
        picture.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]
