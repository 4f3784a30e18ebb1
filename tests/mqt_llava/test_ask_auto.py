"""`mqt-llava ask --num-visual-tokens auto`"""

import json
import re

import pytest

from tests.commands import QUESTION, assert_refused
from tests.small_model import NUM_QUERY_TOKENS, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


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
