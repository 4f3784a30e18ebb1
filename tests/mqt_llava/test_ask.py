"""`mqt-llava ask IMAGE... QUESTION`: one answer, streamed or as JSON, and the program as it is installed."""

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from PIL import Image

from mqt_llava.cli import conversation, images
from tests.commands import QUESTION
from tests.mqt_llava.answers import LENGTH, expected_answer
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


@pytest.mark.parametrize("m", [1, 4, NUM_QUERY_TOKENS])
def test_answer_is_that_of_the_model_with_m_visual_tokens(ask, files, m):
    result = ask(files[0], QUESTION, "--num-visual-tokens", m)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected_answer(make_images(1), [QUESTION], m) + "\n"
    assert result.stderr == ""


def test_answers_of_these_tests_tell_m_and_images_apart():
    one, two = make_images(2)
    answers = [expected_answer([one], [QUESTION], m) for m in (1, 4, 16)]
    answers += [expected_answer(images, [QUESTION], 4) for images in ([two], [one, two], [two, one])]
    assert len(set(answers)) == len(answers)


def test_default_is_all_visual_tokens(ask, files):
    assert ask(files[0], QUESTION).stdout == expected_answer(make_images(1), [QUESTION], NUM_QUERY_TOKENS) + "\n"


def test_several_images_stand_in_one_prompt_in_their_order(ask, files):
    images = make_images(2)
    forward = ask(*files, QUESTION, "--num-visual-tokens", 4)
    backward = ask(*reversed(files), QUESTION, "--num-visual-tokens", 4)
    assert forward.stdout == expected_answer(images, [QUESTION], 4) + "\n"
    assert backward.stdout == expected_answer(images[::-1], [QUESTION], 4) + "\n"


def test_json_has_the_answer_that_streams(ask, files):
    streamed = ask(files[0], QUESTION, "--num-visual-tokens", 4)
    result = ask(files[0], QUESTION, "--num-visual-tokens", 4, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    record = json.loads(result.stdout)
    assert record["answer"] + "\n" == streamed.stdout
    assert record["question"] == QUESTION
    assert record["num_visual_tokens"] == 4
    assert record["images"] == [files[0]]
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert record["new_tokens"] == LENGTH
    assert record["seconds"] > 0


def test_answer_streams_while_the_model_generates(ask, files, monkeypatch):
    lengths = []  # of stdout after each token
    put = conversation.AnswerStreamer.put

    def spy(self, ids):
        put(self, ids)
        lengths.append(len(sys.stdout.buffer.getvalue()))

    monkeypatch.setattr(conversation.AnswerStreamer, "put", spy)
    result = ask(files[0], QUESTION)
    assert len(lengths) == 1 + LENGTH
    assert lengths[0] == 0
    assert len(set(lengths)) > 3
    assert lengths[-1] <= len(result.stdout_bytes)


def test_streamer_prints_each_character_once_and_whole(capsys):
    tokenizer = make_processor().tokenizer
    streamer, printed = conversation.AnswerStreamer(tokenizer), []
    streamer.put(torch.tensor([[1, 40, 41]]))  # the prompt
    for token in tokenizer(" Zoë,\n 5 €. ", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
        printed.append(capsys.readouterr().out)
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()
    printed.append(capsys.readouterr().out)
    assert printed == ["", "Z", "o", "", "ë", ",", "", "", "\n 5", "", "", "", " €", ".", "", "\n"]
    assert streamer.text == "Zoë,\n 5 €."


@pytest.mark.parametrize("suffix", ["", ".gif", ".webp", ".tiff"])
def test_image_formats_are_told_by_content(ask, files, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.open(files[0]).save(path, format="PNG")
    assert ask(path, QUESTION).stdout == ask(files[0], QUESTION).stdout


def test_image_on_stdin(ask, files):
    result = ask("-", QUESTION, stdin=Path(files[0]).read_bytes())
    assert result.exit_code == 0, result.output
    assert result.stdout == ask(files[0], QUESTION).stdout


def test_image_at_url(ask, files, server):
    assert ask(f"{server}/second.png", QUESTION).stdout == ask(files[1], QUESTION).stdout


def test_photos_are_turned_upright(ask, files, tmp_path):
    path = tmp_path / "turned.png"
    picture = Image.open(files[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert ask(path, QUESTION).stdout == ask(files[1], QUESTION).stdout


def test_long_strip_is_no_bomb():
    """Padded to a square, it would take 12 GB."""
    buffer = io.BytesIO()
    Image.new("RGB", (65000, 2), "red").save(buffer, "PNG")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(buffer.getvalue())))
        assert images.load_image("-").size == (8192, 1)


def test_question_may_look_odd(ask, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for question in ("first", "Is it .png?", "https://example.org is where?", "x" * 300, "日本語"):
        result = ask("first.png", question, "--json")
        assert json.loads(result.stdout)["question"] == question


def test_dtype_reaches_the_model(ask, files):
    record = json.loads(ask(files[0], QUESTION, "--dtype", "bfloat16", "--json").stdout)
    assert record["dtype"] == "bfloat16"


def test_dtype_is_float32_on_a_cpu_whatever_the_checkpoint_has(ask, files, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    result = ask(files[0], QUESTION, "--device", "cpu", "--json", model=tmp_path / "model")
    assert json.loads(result.stdout)["dtype"] == "float32"


def test_code_in_the_checkpoint_is_not_run(ask, files, tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    code = list(folder.glob("*.py"))
    assert code and "auto_map" in json.loads((folder / "config.json").read_text())
    for path in code:
        path.write_text("raise RuntimeError('the code of the checkpoint ran')")
    assert ask(files[0], QUESTION, model=folder).stdout == ask(files[0], QUESTION).stdout


def test_shipped_checkpoint_answers(ask, files):
    result = ask(files[0], QUESTION, "--num-visual-tokens", 1, "--max-new-tokens", 3, model=None)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_checkpoint_may_have_an_m_of_its_own(ask, files, tmp_path):
    model = make_model()
    model.generation_config.num_visual_tokens = 4
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    expected = {m: expected_answer(make_images(1), [QUESTION], m) for m in (4, 9)}
    found = json.loads(ask(files[0], QUESTION, "--json", model=tmp_path).stdout)
    assert (found["num_visual_tokens"], found["answer"]) == (4, expected[4])
    found = json.loads(ask(files[0], QUESTION, "--json", "--num-visual-tokens", 9, model=tmp_path).stdout)
    assert (found["num_visual_tokens"], found["answer"]) == (9, expected[9])


def test_program_answers_and_nothing_else(checkpoint, files):
    program = Path(sys.executable).parent / "mqt-llava"
    command = [program, "ask", files[0], QUESTION, "--model", checkpoint, "--max-new-tokens", str(LENGTH)]
    result = subprocess.run([*command, "--num-visual-tokens", "4"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == expected_answer(make_images(1), [QUESTION], 4) + "\n"


def test_program_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "mqt_llava.cli", "ask", tmp_path / "nosuch.png", QUESTION]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"Error: file not found: {tmp_path / 'nosuch.png'}\n"


# Weights that take their time to be read
SLOW = """
import time
from mqt_llava.cli import models
def read(model, bar):
    for _ in bar(None, (range(100),), {"desc": "Reading weights"}):
        time.sleep(0.2)
models.read_mapped = read
from mqt_llava_cli import main
main()
"""


def test_loading_shows_progress_and_can_be_interrupted(checkpoint, files):
    """On a terminal, when it takes more than a second."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", SLOW, "ask", files[0], QUESTION, "--model", str(checkpoint)]
    with subprocess.Popen(command, stderr=side, stdout=subprocess.PIPE) as process:
        os.close(side)
        seen = ""
        while "Reading weights" not in seen:
            new = os.read(terminal, 65536).decode()
            assert new, seen
            seen += new
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        with contextlib.suppress(OSError):  # the other side is closed
            while new := os.read(terminal, 65536):
                seen += new.decode()
    os.close(terminal)
    assert process.returncode == 130 and output == b""
    assert "Traceback" not in seen and "Loading weights" not in seen  # that was quick
