"""Fixtures of the tests that run commands."""

import warnings

import pytest
from transformers.utils import logging

from tests.small_model import make_images


@pytest.fixture
def restore_global_settings(monkeypatch):
    """Commands silence transformers and Python's warnings for the whole process: tests that run one put both back."""
    verbosity, active = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    if active:
        logging.enable_progress_bar()


@pytest.fixture
def files(tmp_path):
    """Paths of two pictures."""
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path, picture in zip(paths, make_images(2)):
        picture.save(path)
    return [str(path) for path in paths]
