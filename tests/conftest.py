"""Fixtures shared by all tests: a small random model, its processor and a checkpoint of both."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["HF_DATASETS_CACHE"] = os.path.join(tempfile.gettempdir(), "mqt-llava-tests-datasets")

import pytest
import torch

from tests.small_model import make_images, make_model, make_processor


torch.set_num_threads(1)  # pytest-xdist runs one process for each core


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
