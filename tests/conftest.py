"""Fixtures shared by all tests: a small random model, its processor and a checkpoint of both."""

import logging
import os
import sys
import tempfile
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["HF_DATASETS_CACHE"] = os.path.join(tempfile.gettempdir(), "mqt-llava-tests-datasets")

import pytest
import torch
from hypothesis import settings


pytest.register_assert_rewrite("tests.commands", "tests.modeling.common")  # or failing asserts there would not say why

from tests.small_model import make_images, make_model, make_processor


settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")
torch.set_num_threads(1)  # pytest-xdist runs one process for each core

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / folder) + os.sep for folder in ("modeling", "mqt_llava", "conversion"))


@pytest.fixture(autouse=True)
def deprecations_of_ours_are_errors(monkeypatch):
    """transformers logs some deprecations, once each. The caller is the first one outside of libraries, our `generate` apart,
    which passes on what it is given."""

    def checked(logger, message, *args, **kwargs):
        if "deprecat" in str(message):
            frame = sys._getframe(1)
            while frame and ("site-packages" in frame.f_code.co_filename or frame.f_code.co_name == "generate"):
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(OURS):
                raise AssertionError(f"{frame.f_code.co_filename}:{frame.f_lineno} uses what is deprecated: {message}")
        logger.warning(message, *args, **kwargs)

    monkeypatch.setattr(logging.Logger, "warning_once", checked)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    return make_images(1)[0]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with model and processor as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder
