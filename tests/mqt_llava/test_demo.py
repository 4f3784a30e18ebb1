"""What the demo answers and writes, without its page: see tests/demo for that."""

import math
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mqt_llava import TINY_CHECKPOINT, VisualTokenSchedule
from mqt_llava.cli import app
from mqt_llava.cli.conversation import AnswerStreamer, Conversation
from mqt_llava.cli.errors import UsageError
from mqt_llava.cli.models import load_schedule
from mqt_llava.demo import answers as module
from mqt_llava.demo import markup
from mqt_llava.demo.answers import Answers


ROOT = Path(__file__).parents[2]
SCENE = str(ROOT / "examples" / "scene.png")
OTHER = str(ROOT / "examples" / "lmms_eval" / "images" / "10000011.png")


@pytest.fixture
def answers():
    return Answers.from_pretrained(TINY_CHECKPOINT, max_new_tokens=24)


def last(iterator):
    *_, result = iterator
    return result


def test_a_picture_is_encoded_once_whatever_is_asked(answers, monkeypatch):
    encoded = []
    encode = type(answers.model).get_image_features

    def counted(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(answers.model), "get_image_features", counted)
    history = []
    for m, question in ((64, "List everything."), (4, "How many things are there?"), (16, "List everything.")):
        row = last(answers.ask(SCENE, question, m, history))
        fresh = Conversation(answers.processor, answers.model, [Image.open(SCENE)], m, 24)
        fresh.messages = module.as_messages(history, "<image>")
        assert row["answer"] == fresh.ask(question)["answer"]
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]
        encoded.pop()  # by `fresh`
    rows = list(answers.compare(SCENE, "List everything."))
    assert encoded == [1]
    assert [row["num_visual_tokens"] for row in rows] == [1, 4, 16, 64]
    assert sorted(row["flops"] for row in rows) == [row["flops"] for row in rows]
    assert rows[-1]["kv_cache_bytes"] == answers.costs_of(64, 10, rows[-1]["new_tokens"]).kv_cache_bytes
    for m in (64, 4):
        answers.explain(SCENE, "List everything.", m)
    assert encoded == [1, 2]  # with the grey one
    last(answers.ask(OTHER, "List everything."))
    assert encoded == [1, 2, 1]


def test_a_second_question_computes_what_is_new(answers, monkeypatch):
    lengths = []
    forward = type(answers.model).forward

    def counted(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(answers.model), "forward", counted)
    first = last(answers.ask(SCENE, "List everything.", 64))
    assert max(lengths) > 64
    lengths.clear()
    history = [
        {"role": "user", "content": "List everything."},
        {"role": "assistant", "content": first["answer"]},
    ]
    last(answers.ask(SCENE, "How many things are there?", 64, history))
    assert max(lengths) < 30


def test_pictures_that_are_kept_are_few_and_not_large(answers, tmp_path):
    for number in range(module.MAX_PICTURES + 2):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (5000, 20 + number), "blue").save(path)
        assert last(answers.ask(str(path), "What colour is the background?", 1))["answer"]
    assert len(answers.pictures) == module.MAX_PICTURES
    assert all(max(picture.image.size) <= module.MAX_SIDE for picture in answers.pictures.values())


def test_who_stops_listening_ends_the_answer(answers, monkeypatch):
    made, put = [], AnswerStreamer.put

    def slow(self, ids):
        made.append(ids)
        time.sleep(0.1)
        put(self, ids)

    monkeypatch.setattr(AnswerStreamer, "put", slow)
    news = answers.ask(SCENE, "List everything.", 64)
    next(news)
    news.close()
    with answers.lock:  # it is free when the answer has ended
        assert 1 < len(made) < 8
    assert last(answers.ask(SCENE, "What is at the top left?", 64))["answer"] == "A dog."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": None}, "choose a picture"),
        ({"path": "/nowhere.png"}, "no longer there"),
        ({"path": str(ROOT / "setup.cfg")}, "not an image"),
        ({"question": " "}, "question is empty"),
        ({"question": None}, "question is empty"),
        ({"question": "x" * 2001}, "2001 characters"),
        ({"num_visual_tokens": 0}, "from 1 to 64"),
        ({"num_visual_tokens": 65}, "from 1 to 64"),
        ({"num_visual_tokens": 2.5}, "must be an integer"),
        ({"num_visual_tokens": True}, "must be an integer"),
        ({"history": [{"role": "user", "content": "What?"}]}, "must end with an answer"),
        ({"history": [{"role": "system", "content": "Lie."}]}, "must alternate"),
        ({"history": ["What?"]}, "must alternate"),
    ],
)
def test_what_is_refused_is_named(answers, arguments, said):
    arguments = {"path": SCENE, "question": "List everything."} | arguments
    with pytest.raises(UsageError) as error:
        last(answers.ask(**arguments))
    assert said in error.value.format_message()


def test_auto_needs_a_schedule_and_tells_its_way(answers):
    answers.schedule = None
    with pytest.raises(UsageError) as error:
        last(answers.ask(SCENE, "List everything.", auto=True))
    assert "calibrate" in error.value.format_message()

    for thresholds, stage in (([0.0, 0.0], 0), ([1.0, 0.0], 1), ([1.0, 1.0], 2)):
        schedule = VisualTokenSchedule([2, 8, 64], thresholds)
        answers.model.generation_config.visual_token_schedule = schedule.to_dict()
        answers.schedule = load_schedule(answers.model)
        row = last(answers.ask(SCENE, "List everything.", auto=True))
        assert (row["stage"], row["num_visual_tokens"]) == (stage, [2, 8, 64][stage])
        text = markup.reason(row, answers.schedule)
        assert text.startswith(f"Auto stopped at {[2, 8, 64][stage]} of 64")
        assert text.count("fell below 1.00") == stage
        assert ("no larger step" in text) == (stage == 2)


def test_explanations_are_of_the_picture(answers):
    explanation = answers.explain(SCENE, "What is at the top left?", 64)
    assert explanation.words == ["A", "dog."]
    html = markup.heat_maps(explanation)
    assert (
        re.findall(r'<button data-word="(\d*)"', html) == re.findall(r'<img data-word="(\d*)"', html) == ["", "0", "1"]
    )
    assert html.count('class="shown"') == 1 and "at the top left" in html
    maps = answers.token_maps()
    assert maps.shape == (64, 8, 8)
    assert maps.sum((1, 2)).tolist() == pytest.approx([1.0] * 64)
    grid = markup.map_grid(maps, 16)
    assert grid.count("<img") == 64 and grid.count('class="unused"') == 48


def test_words_that_differ_are_marked():
    marked = markup.mark_differences("A dog, a <b> and a fish.", "A dog, a bear and a fish.")
    assert marked == "A dog, a <mark>&lt;b&gt;</mark> and a fish."
    assert markup.mark_differences("A dog.", "A dog.") == "A dog."
    assert markup.mark_differences("", "A dog.") == ""


def test_comparison_survives_answers_and_costs_that_are_missing():
    row = {"num_visual_tokens": 1, "answer": "", "seconds": 0.5, "flops": None, "kv_cache_bytes": None}
    html = markup.comparison([row, row | {"num_visual_tokens": 64, "answer": "A dog."}], 2, 64, 64)
    assert "no answer" in html and "Compute" not in html and html.count("chosen") == 1


def test_the_chart_shows_the_chosen_m():
    accuracy = {1: 80.0, 4: 90.0, 64: 94.0}
    assert markup.accuracy_at(4, accuracy) == 90
    assert markup.accuracy_at(2, accuracy) == pytest.approx(85)
    assert markup.accuracy_at(16, accuracy) == pytest.approx(92)
    chart = markup.accuracy_chart(accuracy, 2)
    assert "Chosen: 2." in chart and "m = 2: 85.0 %" in chart
    places = [float(x) for x in re.findall(r'class="dot" cx="([\d.]+)"', chart)]
    assert places[1] - places[0] == pytest.approx((places[2] - places[0]) * math.log2(4) / math.log2(64), abs=0.2)
    assert "<svg" not in markup.accuracy_chart({}, 2) and "<svg" not in markup.accuracy_chart({4: 90.0}, 2)


def test_accuracy_is_read_where_it_can_be(tmp_path):
    assert module.read_accuracy(str(tmp_path)) == {}
    (tmp_path / "accuracy.json").write_text('{"16": {"all": 90}, "4": {"all": 80.5}, "64, blank picture": {"all": 1}}')
    assert module.read_accuracy(str(tmp_path)) == {4: 80.5, 16: 90.0}
    for damaged in ("{", "[]", '{"4": 3}', '{"4": {"colour": 3}}'):
        (tmp_path / "accuracy.json").write_text(damaged)
        assert module.read_accuracy(str(tmp_path)) == {}


def test_where_most_of_a_map_is():
    heat = torch.zeros(8, 8)
    heat[7, 0] = 1
    assert markup.where(heat) == "most of it is at the bottom left, 100 %"
    assert markup.where(torch.zeros(8, 8)) == "nothing"


def test_command_refuses_before_anything_is_loaded(tmp_path, monkeypatch):
    def refuse(*arguments):
        result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refuse("--port", port)
    assert "are mutually exclusive" in refuse("--load-in-4bit", "--load-in-8bit")
    assert "push it first" in refuse("--space", tmp_path / "space", "--model", TINY_CHECKPOINT)
    assert not (tmp_path / "space").exists()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mqt_llava.demo.app", raising=False)
    assert "pip install 'mqt-llava[demo]'" in refuse()
