import json
import shutil
import warnings

import pytest
from transformers.utils import logging

from mqt_llava.conversion import convert
from tests.conversion.checkpoints import (
    QUERY_TRANSFORMER,
    VISION_TOWER,
    read_weights,
    train_tokenizer,
    write_authors,
    write_weights,
)


@pytest.fixture(autouse=True)
def restore_global_settings():
    """`mqt-llava convert` silences transformers and Python's warnings for the whole process."""
    verbosity, active = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    if active:
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    train_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def authors(tmp_path_factory, tokenizer_model):
    """A full checkpoint: two safetensors shards in bfloat16, the vision tower inside and, as `../clip`, beside it."""
    return write_authors(tmp_path_factory.mktemp("authors"), tokenizer_model)


@pytest.fixture(scope="session")
def weights(authors):
    return read_weights(authors)


@pytest.fixture(scope="session")
def converted(tmp_path_factory, authors):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(str(authors), folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, authors, weights):
    """The language model of the full checkpoint, in the layout of older transformers, as Vicuna is."""
    folder = tmp_path_factory.mktemp("base") / "vicuna"
    folder.mkdir()
    for path in authors.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    settings = json.loads((authors / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if not key.startswith(("mm_", "query_", "image_"))}
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    parts = (QUERY_TRANSFORMER, VISION_TOWER)
    write_weights(folder, {name: tensor for name, tensor in weights.items() if not name.startswith(parts)}, ".bin", 2)
    return folder


@pytest.fixture
def source(authors, tmp_path):
    """A copy of the checkpoint, to be changed."""
    shutil.copytree(authors.parent, tmp_path / "source")
    return tmp_path / "source" / "ckpt"
