"""What `mqt-llava ask` refuses: images, options, questions and models."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image
from typer.testing import CliRunner

from mqt_llava import cli
from mqt_llava.cli import images, models
from tests.commands import QUESTION, assert_refused
from tests.small_model import NUM_QUERY_TOKENS, make_config, make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


def write_truncated(path):
    make_images(1)[0].resize((200, 200)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:5000])


def write_broken_chunk(path):
    make_images(1)[0].save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)


BAD_FILES = {
    "truncated.png": (write_truncated, "damaged or truncated"),
    "truncated.jpg": (
        lambda path: (make_images(1)[0].save(path), path.write_bytes(path.read_bytes()[:700])),
        "damaged",
    ),
    "broken.png": (write_broken_chunk, "damaged or truncated"),
    "text.png": (lambda path: path.write_text("no picture"), "not an image"),
    "empty.png": (lambda path: path.touch(), "not an image"),
    "folder": (lambda path: path.mkdir(), "directory"),
    "missing.png": (lambda path: None, "file not found"),
    "missing": (lambda path: None, "file not found"),
    "two\nlines.png": (lambda path: None, "file not found"),
    "warned-bomb.png": (lambda path: Image.new("1", (9500, 9500)).save(path), "too many pixels"),
    "bomb.png": (lambda path: Image.new("1", (13500, 13500)).save(path), "too many pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_image_file(ask, files, tmp_path, name):
    make, words = BAD_FILES[name]
    make(tmp_path / name)
    shown = str(tmp_path / name).replace("\n", " ")
    assert_refused(ask(tmp_path / name, QUESTION), words, shown)
    assert_refused(ask(files[0], tmp_path / name, QUESTION), words, shown)


def test_missing_image_is_not_taken_for_a_question(ask, files):
    assert_refused(ask("nosuch.png"), "file not found: nosuch.png")
    assert_refused(ask(files[0], "nosuch.JPEG"), "file not found: nosuch.JPEG")
    assert_refused(ask(QUESTION), f"file not found: {QUESTION}")


def test_question_without_quotes(ask, files):
    assert_refused(
        ask(files[0], "List", "every", "thing."),
        'file not found: List. A question must be in quotes: "List every thing."',
    )


def test_existing_file_is_not_taken_for_a_question(ask, files, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("What is this?")
    assert_refused(ask(files[0], notes), "not an image", str(notes))


def test_bad_stdin_image(ask, files):
    assert_refused(ask("-", QUESTION, stdin=b"no picture"), "not an image", "stdin")
    assert_refused(ask("-", QUESTION, stdin=b""), "not an image", "stdin")
    assert_refused(ask("-", QUESTION, stdin=Path(files[0]).read_bytes()[:500]), "truncated", "stdin")
    assert_refused(ask("-", stdin=Path(files[0]).read_bytes()), "question")
    assert_refused(ask("-", "-", QUESTION, stdin=Path(files[0]).read_bytes()), "only one image")


def test_bad_url(ask, server, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    assert_refused(ask(f"{server}/nosuch.png", QUESTION), "HTTP 404", f"{server}/nosuch.png")
    assert_refused(ask(f"{server}/page.png", QUESTION), "not an image", f"{server}/page.png")
    assert_refused(ask("http://127.0.0.1:1/a.png", QUESTION), "cannot download http://127.0.0.1:1/a.png")
    assert_refused(ask("http://[bad/a.png", QUESTION), "cannot download")


def test_endless_download_is_refused(ask, files, server, monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)
    assert_refused(ask(f"{server}/first.png", QUESTION), "more than 1000 bytes")


@pytest.mark.parametrize("m", [0, -1, NUM_QUERY_TOKENS + 1])
def test_wrong_m(ask, files, m):
    assert_refused(ask(files[0], QUESTION, "--num-visual-tokens", m), f"from 1 to {NUM_QUERY_TOKENS}", f"got {m}")
    assert_refused(ask(files[0], QUESTION, "--compare", f"1,{m}"), f"from 1 to {NUM_QUERY_TOKENS}", f"got {m}")
    assert_refused(ask(files[0], "--num-visual-tokens", m, stdin="What?"), f"got {m}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-visual-tokens", "2.7"], "integer; got '2.7'"),
        (["--num-visual-tokens", "many"], "many"),
        (["--compare", "1,two"], "'two'"),
        (["--compare", ""], "integer; got ''"),
        (["--compare", "1,,4"], "integer; got ''"),
        (["--compare", "1,4", "--num-visual-tokens", "4"], "are mutually exclusive"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "meta"], "meta"),
        (["--dtype", "int8"], "int8"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_options(ask, files, options, words):
    assert_refused(ask(files[0], QUESTION, *options), words)


def test_wrong_questions(ask, files):
    assert_refused(ask(files[0], "  "), "empty")
    assert_refused(ask(files[0], "What <image>?"), "<image>")
    assert_refused(ask(files[0], stdin=""), "no question")
    assert_refused(ask(files[0], stdin="\n\n"), "no question")
    assert_refused(ask(files[0], stdin=Path(files[0]).read_bytes()), "not text")
    assert_refused(ask(files[0], "--compare", "1,4", stdin="What?"), "--compare needs a question")
    assert_refused(CliRunner().invoke(cli.app, ["ask"]), "IMAGE")
    assert_refused(CliRunner().invoke(cli.app, ["nonsense"]), "nonsense")


def test_prompt_longer_than_the_context(ask, files):
    assert_refused(ask(files[0], "x" * 512), "the model takes 512")


def test_answer_ends_with_the_context(ask, files):
    used = json.loads(ask(files[0], "x", "--json").stdout)["prompt_tokens"]
    record = json.loads(ask(files[0], "x" * (512 - used - 2), "--json").stdout)
    assert record["prompt_tokens"] + record["new_tokens"] == 512


def test_wrong_models(ask, files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(ask(files[0], QUESTION, model=tmp_path / "nosuch"), "cannot load the model", "nosuch")
    assert_refused(ask(files[0], QUESTION, model="nosuch/nosuch"), "cannot load the model nosuch/nosuch")
    assert_refused(ask(files[0], QUESTION, model=tmp_path), "cannot load the model", str(tmp_path))
    make_config().text_config.save_pretrained(tmp_path / "llama")
    assert_refused(ask(files[0], QUESTION, model=tmp_path / "llama"), "not an MQT-LLaVA model but llama")
    for place in ("/nonexist", "./nosuch", "nosuch/nosuch/nosuch"):
        assert_refused(ask(files[0], QUESTION, model=place), f"cannot load the model {place}: there is no such folder")
    assert_refused(ask(files[0], QUESTION, model=files[1]), f"{files[1]}: that is a file, not a folder")
    config = tmp_path / "llama" / "config.json"
    config.write_text('{"model_type": "llava_llama"}')
    folder = tmp_path / "llama"
    assert_refused(ask(files[0], QUESTION, model=folder), "the authors' code", f"mqt-llava convert {folder} FOLDER")
    for content in ("{}", '{"hidden_size": 8}'):
        config.write_text(content)
        assert_refused(ask(files[0], QUESTION, model=folder), f"{folder}: its config.json names no model_type")


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_damaged_tokenizer(ask, files, tmp_path, content):
    """Also where transformers would fall back on another file, which gives other ids."""
    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert_refused(
        ask(files[0], QUESTION, model=tmp_path / "model"), f"cannot load the tokenizer of {tmp_path}", "tokenizer.json"
    )


def test_checkpoint_with_damaged_or_missing_weights(ask, files, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("query_transformer.query"))
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    assert_refused(ask(files[0], QUESTION, model=tmp_path / "model"), "no weights for", "query_transformer.query")
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(ask(files[0], QUESTION, model=tmp_path / "model"), "cannot load the model")


def test_adapter_without_base_model(ask, files, tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    result = ask(files[0], QUESTION, "--adapter", tmp_path, model=None)
    assert_refused(result, f"cannot load the adapter {tmp_path}", "names no base model", "--model")


def test_missing_shipped_checkpoint(ask, files, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TINY_CHECKPOINT", str(tmp_path / "nosuch"))
    assert_refused(ask(files[0], QUESTION, model=None), "the shipped checkpoint is missing", "--model")
