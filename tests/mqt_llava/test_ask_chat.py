"""`mqt-llava ask IMAGE...`: a chat, at a terminal and from stdin."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from mqt_llava.cli import conversation
from tests.commands import QUESTION
from tests.mqt_llava.answers import LENGTH, expected_answer
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


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
