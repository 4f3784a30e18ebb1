"""`mqt-llava ask`: answers, chats, comparisons, `--num-visual-tokens auto`, and what is refused."""

import contextlib
import fcntl
import functools
import http.server
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mqt_llava import cli
from mqt_llava.cli import conversation, images, models
from mqt_llava.cli.ask import print_table
from tests.commands import QUESTION, assert_refused
from tests.small_model import NUM_QUERY_TOKENS, make_config, make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")
LENGTH = 12  # new tokens


@pytest.fixture
def ask(checkpoint):
    def invoke(*arguments, stdin=None, model=checkpoint):
        options = [] if model is None else ["--model", str(model), "--max-new-tokens", str(LENGTH)]
        return CliRunner().invoke(cli.app, ["ask", *options, *map(str, arguments)], input=stdin)

    return invoke


@pytest.fixture
def server(tmp_path):
    """Address of a local web server for the files in `tmp_path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def expected_answer(images, turns, m, length=LENGTH):
    """The answer to the last of `turns`, by the model called directly on the written-out prompt."""
    model, processor = make_model(), make_processor()
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. "
    )
    prompt = "<s>" + system + "USER: " + "<image>\n" * len(images) + turns[0] + " ASSISTANT:"
    for answer, question in zip(turns[1::2], turns[2::2]):
        prompt += f" {answer}</s>USER: {question} ASSISTANT:"
    inputs = processor(images=images, text=prompt, num_visual_tokens=m, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- answers ---


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


# --- chat ---


@pytest.mark.parametrize("num_images", [1, 2])
def test_chat_remembers_every_turn(ask, files, num_images):
    images = make_images(num_images)
    questions = ["What is this?", "Why?", "Really?"]
    result = ask(*files[:num_images], "--num-visual-tokens", 4, "--json", stdin="\n \n".join(questions))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["question"] for record in records] == questions
    turns = []
    for record in records:
        turns.append(record["question"])
        assert record["answer"] == expected_answer(images, turns, 4)
        turns.append(record["answer"])
    assert records[1]["answer"] != expected_answer(images, [questions[1]], 4)


def test_chat_streams_the_same_answers(ask, files):
    stdin = "What is this?\nWhy?"
    streamed = ask(files[0], stdin=stdin)
    records = [json.loads(line) for line in ask(files[0], "--json", stdin=stdin).stdout.splitlines()]
    assert streamed.stdout == "".join(record["answer"] + "\n" for record in records)
    assert streamed.stderr == ""


def test_chat_encodes_the_images_once(ask, files):
    batches = []  # of images, at every run of a vision tower

    def count(module, args, output):
        if type(module).__name__ == "CLIPVisionEmbeddings" and not output.is_meta:
            batches.append(len(output))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    result = ask(*files, "--json", stdin="What?\nWhy?\nHow?")
    hook.remove()
    assert len(result.stdout.splitlines()) == 3
    assert batches == [2]


def test_chat_computes_what_is_new_alone(ask, files):
    """A question prefills itself and the last token of the answer before it, not the whole conversation."""
    prefills = []

    def record(module, args, kwargs, output):
        embeds = kwargs["inputs_embeds"] if type(module).__name__ == "LlamaModel" else None
        if embeds is not None and embeds.shape[1] > 1 and not embeds.is_meta:
            prefills.append(embeds.shape[1])

    hook = torch.nn.modules.module.register_module_forward_hook(record, with_kwargs=True)
    questions = "List everything.\nIs there a cat?\nWhat colour is the background?"
    result = ask("examples/scene.png", "--json", stdin=questions, model=None)
    hook.remove()
    lengths = [json.loads(line)["prompt_tokens"] for line in result.stdout.splitlines()]
    answers = [json.loads(line)["new_tokens"] for line in result.stdout.splitlines()]
    assert prefills[0] == lengths[0] and len(prefills) == 3
    for turn in (1, 2):
        assert prefills[turn] == lengths[turn] - (lengths[turn - 1] + answers[turn - 1] - 1)


def test_chat_goes_back_where_the_answer_reads_otherwise(ask, files, monkeypatch):
    """The text of an answer may be tokenized differently from how it was generated."""
    put = conversation.AnswerStreamer.put

    def shorten(self, ids):
        put(self, ids)
        self.text = self.text[:2]

    monkeypatch.setattr(conversation.AnswerStreamer, "put", shorten)
    result = ask(files[0], "--json", stdin="What?\nWhy?")
    first, second = (json.loads(line)["answer"] for line in result.stdout.splitlines())
    assert second == expected_answer(make_images(1), ["What?", first, "Why?"], NUM_QUERY_TOKENS)[:2]


def test_answer_that_spells_the_placeholder_does_not_end_the_chat(ask, files, monkeypatch):
    put = conversation.AnswerStreamer.put

    def spell(self, ids):
        put(self, ids)
        self.text = "an <image>"

    monkeypatch.setattr(conversation.AnswerStreamer, "put", spell)
    result = ask(files[0], "--json", stdin="What?\nWhy?")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == ["an <image>"] * 2


def test_chat_at_a_terminal(checkpoint, files, tmp_path):
    """A real terminal: it prompts, survives a bad question, and ends at Ctrl-D."""
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "mqt_llava.cli", "ask", files[0], "--model", str(checkpoint)]
    with (
        open(tmp_path / "answers", "wb") as answers,
        subprocess.Popen(
            [*command, "--max-new-tokens", str(LENGTH), "--json"], stdin=side, stdout=answers, stderr=subprocess.PIPE
        ) as process,
    ):
        os.write(terminal, b"What is this?\nWhat <image>?\nWhy?\n\x04")
        stderr = process.stderr.read().decode()
    os.close(terminal)
    os.close(side)
    assert process.returncode == 0, stderr
    records = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    first, second = (record["answer"] for record in records)
    assert first == expected_answer(make_images(1), ["What is this?"], NUM_QUERY_TOKENS)
    assert second == expected_answer(make_images(1), ["What is this?", first, "Why?"], NUM_QUERY_TOKENS)
    assert "Ctrl-D" in stderr and "must not contain <image>" in stderr and "Traceback" not in stderr


# A chat at a terminal whose second answer is interrupted as by Ctrl-C
INTERRUPTED = """
import sys
from mqt_llava.cli import conversation, main
ask, asked = conversation.Conversation.ask, []
def interrupted(self, question, write=None):
    asked.append(question)
    if len(asked) == 2:
        raise KeyboardInterrupt
    return ask(self, question, write)
conversation.Conversation.ask = interrupted
main()
"""


def test_ctrl_c_ends_the_answer_not_the_chat(checkpoint, files, tmp_path):
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", INTERRUPTED, "ask", files[0], "--model", str(checkpoint), "--json"]
    command += ["--max-new-tokens", str(LENGTH)]
    with (
        open(tmp_path / "answers", "wb") as answers,
        subprocess.Popen(command, stdin=side, stdout=answers, stderr=subprocess.PIPE) as process,
    ):
        os.write(terminal, b"What is this?\nDescribe it.\nWhy?\n\x04")
        stderr = process.stderr.read().decode()
    os.close(terminal)
    os.close(side)
    assert process.returncode == 0, stderr
    records = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines() if line]
    turns = ["What is this?", records[0]["answer"], "Why?"]
    assert [record["question"] for record in records] == turns[::2]
    assert records[1]["answer"] == expected_answer(make_images(1), turns, NUM_QUERY_TOKENS)


def test_a_bad_line_does_not_end_the_run(ask, files):
    questions = b"What is this?\nWhat <image>?\n\nna\xefve?\nWhy?"
    result = ask(files[0], "--json", stdin=questions)
    assert result.exit_code == 2
    records = [json.loads(line) for line in result.stdout.splitlines()]
    turns = ["What is this?", records[0]["answer"], "Why?"]
    assert [record["question"] for record in records] == turns[::2]
    assert records[1]["answer"] == expected_answer(make_images(1), turns, NUM_QUERY_TOKENS)
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: line 2: the question must not contain <image>")
    assert second.startswith("Error: line 4: the question is not text")


@pytest.mark.parametrize("num_images", [1, 2])
def test_what_is_known_before_the_question_is_computed_before_it(num_images):
    """`prefill` computes it, and the answer stays the same."""
    model, processor, lengths = make_model(), make_processor(), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    chat = conversation.Conversation(processor, model, make_images(2)[:num_images], 4, LENGTH)
    chat.prefill()
    known = lengths.pop()
    result = chat.ask(QUESTION)
    assert lengths[0] == result["prompt_tokens"] - known
    assert known > 4 * num_images and lengths[0] < 40
    assert result["answer"] == expected_answer(make_images(2)[:num_images], [QUESTION], 4)


# --- comparison ---


def flops_of_products(m, length, num_cached=0):
    """Floating point operations of the small model's prefill, by hand: 2 for each multiply-add."""
    width, inner, patches, layers = 32, 64, 36, 2  # of three layers: the last one is not used
    tower = 2 * patches * 3 * 25 * width  # patch embedding: 5 x 5 pixels of 3 colours
    tokens = patches + 1
    tower += layers * 2 * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)
    query = 2 * (m * width**2 + 2 * patches * width**2 + 2 * m * patches * width + 2 * m * width**2)
    each, pair = width * (2 * width + 2 * 16) + 3 * width * inner, 2 * width
    text = 2 * 2 * (each * (length - num_cached) + pair * (length**2 - num_cached**2))
    return tower + query + text + 2 * width * 264


def test_compare_has_one_answer_for_each_m(ask, files):
    num_visual_tokens = [1, 4, 16]
    result = ask(files[0], QUESTION, "--compare", "1,4, 16", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    rows = record["compare"]
    assert record["question"] == QUESTION
    assert [row["num_visual_tokens"] for row in rows] == num_visual_tokens
    for row, m in zip(rows, num_visual_tokens):
        assert row["answer"] == expected_answer(make_images(1), [QUESTION], m)
        assert row["seconds"] > 0
        # rotary positions are a product too, so a little more than by hand
        by_hand = flops_of_products(m, row["prompt_tokens"], row["cached_tokens"])
        assert by_hand <= row["flops"] < 1.01 * by_hand


def test_compare_computes_what_is_shared_once(ask, files):
    """The images, and the prompt up to the first image, are computed once for all m."""
    batches, prefills = [], []

    def count(module, args, kwargs, output):
        if type(module).__name__ == "CLIPVisionEmbeddings" and not output.is_meta:
            batches.append(len(output))
        embeds = kwargs["inputs_embeds"] if type(module).__name__ == "LlamaModel" else None
        if embeds is not None and embeds.shape[1] > 1 and not embeds.is_meta:
            prefills.append(embeds.shape[1])

    hook = torch.nn.modules.module.register_module_forward_hook(count, with_kwargs=True)
    rows = json.loads(ask(*files, QUESTION, "--compare", "1,4,16", "--json").stdout)["compare"]
    hook.remove()
    shared = rows[0]["cached_tokens"]
    assert batches == [2] and shared > 10
    assert prefills == [shared, *(row["prompt_tokens"] - shared for row in rows)]


def test_compare_prints_a_table(ask, files):
    result = ask(files[0], QUESTION, "--compare", "1,16")
    assert result.exit_code == 0 and result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == ["m", "answer", "time", "compute"]
    assert [line[0] for line in lines[2:]] == ["1", "16"]
    for line, m in zip(lines[2:], (1, 16)):
        assert expected_answer(make_images(1), [QUESTION], m)[-3:] in " ".join(line)
        assert line[-1] == "GFLOP" and float(line[-2]) > 0
        assert line[-3] == "s" and float(line[-4]) >= 0


def test_table_shows_brackets_of_an_answer(capsys):
    print_table([{"num_visual_tokens": 4, "answer": "[red] [/b]", "seconds": 1.5, "flops": 4.25e12}])
    assert re.search(r"4 +\[red\] \[/b\] +1\.50 s +4,250\.00 GFLOP", capsys.readouterr().out)


# --- auto ---


def make_auto(folder, thresholds=(1.0, 1.0), **settings):
    """A checkpoint whose schedule is 2 -> 5 -> all. With the default thresholds every answer goes to the last stage."""
    model = make_model()
    schedule = {"num_visual_tokens": [2, 5, NUM_QUERY_TOKENS], "thresholds": list(thresholds), **settings}
    model.generation_config.visual_token_schedule = schedule
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("thresholds, m", [((1.0, 1.0), NUM_QUERY_TOKENS), ((1.0, 0.0), 5), ((0.0, 0.0), 2)])
def test_auto_answers_as_the_number_that_it_takes(ask, files, tmp_path, thresholds, m):
    model = make_auto(tmp_path, thresholds, calibration={"num_pictures": 100})
    result = ask(*files, QUESTION, "--num-visual-tokens", "auto", "--json", model=model)
    assert result.exit_code == 0 and result.stderr == ""
    record, expected = json.loads(result.stdout), ask(*files, QUESTION, "--num-visual-tokens", m, "--json").stdout
    expected = json.loads(expected)
    assert (record["answer"], record["num_visual_tokens"]) == (expected["answer"], m)
    assert record["prompt_tokens"] == expected["prompt_tokens"] and 0 <= record["confidence"] <= 1
    streamed = ask(*files, QUESTION, "--num-visual-tokens", "auto", model=model)
    assert streamed.stdout == record["answer"] + "\n"


def test_auto_in_a_chat(ask, files, tmp_path):
    model, stdin = make_auto(tmp_path), "What is this?\nWhy?"
    result = ask(files[0], "--num-visual-tokens", "auto", "--json", stdin=stdin, model=model)
    assert "auto was not calibrated for this checkpoint" in result.stderr
    answers = [json.loads(line)["answer"] for line in result.stdout.splitlines()]
    fixed = [json.loads(line)["answer"] for line in ask(files[0], "--json", stdin=stdin).stdout.splitlines()]
    assert answers == fixed


def test_auto_may_be_the_default_and_stand_in_a_comparison(ask, files, tmp_path):
    model = make_auto(tmp_path, calibration={"num_pictures": 100})
    rows = json.loads(ask(files[0], QUESTION, "--compare", "2,16,auto", "--json", model=model).stdout)["compare"]
    assert [row["num_visual_tokens"] for row in rows] == [2, 16, 16]
    assert rows[2]["answer"] == rows[1]["answer"] and rows[2]["stage"] == 2
    assert rows[2]["flops"] > rows[1]["flops"]  # all stages count
    table = ask(files[0], QUESTION, "--compare", "2,auto", model=model).stdout
    assert re.search(r"auto: 16 .* GFLOP", table)
    settings = json.loads((tmp_path / "generation_config.json").read_text()) | {"num_visual_tokens": "auto"}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert json.loads(ask(files[0], QUESTION, "--json", model=model).stdout)["stage"] == 2


def test_auto_within_a_budget(ask, files, tmp_path):
    model = make_auto(tmp_path, calibration={"num_pictures": 100})
    options = ["--num-visual-tokens", "auto", "--json"]
    unlimited = json.loads(ask(files[0], QUESTION, *options, "--max-flops", "1T", model=model).stdout)
    assert unlimited["num_visual_tokens"] == NUM_QUERY_TOKENS
    result = ask(files[0], QUESTION, *options, "--max-flops", "1k", model=model)
    assert_refused(result, "The first stage, m = 2, may cost", "--max-flops = 1000")
    assert_refused(ask(files[0], QUESTION, "--max-flops", "1T"), "--max-flops and --max-seconds are for")


def test_auto_without_settings_and_with_bad_ones(ask, files, tmp_path):
    assert_refused(ask(files[0], QUESTION, "--num-visual-tokens", "auto"), "mqt-llava calibrate")
    assert_refused(ask(files[0], QUESTION, "--num-visual-tokens", "Auto"), "integer; got 'Auto'")
    model = make_auto(tmp_path, thresholds=[2.0, 1.0])
    assert_refused(ask(files[0], QUESTION, "--num-visual-tokens", "auto", model=model), "`thresholds` from 0 to 1")


# --- bad input ---


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
        (["--compare", "1,4", "--num-visual-tokens", "4"], "exclude each other"),
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


def test_missing_shipped_checkpoint(ask, files, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TINY_CHECKPOINT", str(tmp_path / "nosuch"))
    assert_refused(ask(files[0], QUESTION, model=None), "the shipped checkpoint is missing", "--model")


# --- the program ---


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
