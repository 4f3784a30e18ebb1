import pytest

from mqt_llava.conversion import convert
from tests.conversion.checkpoints import read_weights, train_tokenizer, write_authors


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


@pytest.fixture
def source(authors, tmp_path):
    """A copy of the checkpoint, to be changed."""
    from shutil import copytree

    copytree(authors.parent, tmp_path / "source")
    return tmp_path / "source" / "ckpt"
