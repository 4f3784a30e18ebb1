"""`mqt-llava calibrate`: the promise, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from mqt_llava import TINY_CHECKPOINT, VisualTokenSchedule
from mqt_llava.calibration import Answers, best_bet, calibrate, pictures_needed, propose, wealth
from mqt_llava.cli import app


STAGES = [2, 8, 64]
ROOT = Path(__file__).parents[2]


def make_answers(num_pictures, seed, questions=(3,), shift=0.0):
    """Answers of a model whose confidence tells something, but not all, of whether they are right. A picture's questions are
    easy or hard together; hard pictures have more questions, if `questions` are several numbers."""
    rng = np.random.default_rng(seed)
    of_picture = rng.normal(0, 1, num_pictures)
    count = np.array(questions)[
        np.clip(np.floor(len(questions) * (of_picture < -0.8)), 0, len(questions) - 1).astype(int)
    ]
    picture = np.repeat(np.arange(num_pictures), count)
    ability = of_picture[picture] + rng.normal(0, 1, len(picture))
    confidence, right = [], []
    for i in range(len(STAGES)):
        chance = 1 / (1 + np.exp(-(2 + ability + 0.8 * i)))
        confidence.append(np.clip(chance + rng.normal(0, 0.1, len(picture)), 0.01, 0.99))
        right.append(rng.random(len(picture)) < np.clip(chance - shift * (i < 2), 0, 1))
    # Where a stage is right, the next one mostly is, too
    right = np.array(right, float)
    right[2] = np.maximum(right[2], right[1] * (rng.random(len(picture)) < 0.95))
    tokens = np.full(len(picture), 14)
    return Answers(STAGES, np.array(confidence), right, tokens, np.full(right.shape, 3), picture)


@pytest.mark.parametrize(("tolerance", "questions"), [(0.02, (3,)), (0.05, (3,)), (0.05, (1, 20))])
def test_the_promise_is_kept(tolerance, questions):
    """Over 200 draws of pictures, the schedule that is chosen loses more than promised in at most one of twenty."""
    population = make_answers(10_000, seed=1, questions=questions)
    rng, broken, chosen = np.random.default_rng(2), 0, 0
    for draw in range(200):
        pictures = rng.choice(10_000, 500, replace=False)
        schedule = calibrate(population.select(np.isin(population.picture, pictures)), tolerance, 0.95, seed=draw)
        chosen += schedule.num_visual_tokens[0] < 64
        broken += population.loss(population.stops(schedule)) > tolerance
    assert chosen > 20  # else there is nothing to keep
    assert broken <= 200 * 0.05


@settings(max_examples=30, deadline=None)
@given(st.floats(0.005, 0.2), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
def test_a_bet_against_a_true_hypothesis_does_not_pay(tolerance, bet, seed):
    """Losses from -1 to 1 whose mean is the tolerance: the wealth exceeds 20 in at most one of twenty games."""
    rng = np.random.default_rng(seed)
    gain = rng.random() / 2
    loss = gain + tolerance
    if loss + gain > 1:
        return
    games = rng.choice([1.0, -1.0, 0.0], size=(400, 300), p=[loss, gain, 1 - loss - gain])
    won = sum(wealth(game - tolerance, 0.95 * bet / (1 - tolerance)) >= 20 for game in games)
    assert won <= 400 * 0.05 + 3 * (400 * 0.05) ** 0.5


def test_so_many_pictures_are_needed_where_no_answer_changes():
    needed, unchanged = pictures_needed(0.005, 0.95), np.full(1000, -0.005)
    bet = best_bet(unchanged, 0.005)
    assert wealth(unchanged[:needed], bet) >= 20 > wealth(unchanged[: needed - 1], bet)
    assert needed == 630 and pictures_needed(0.005, 0.95, evenness=0.5) == 1257


def test_pictures_with_more_questions_weigh_more():
    """One picture of two has nine questions of ten, all of them lost."""
    right = np.array([[0.0] * 9 + [1.0], [1.0] * 10])
    answers = Answers([2, 64], right, right, np.ones(10, int), np.ones((2, 10), int), np.array([0] * 9 + [1]))
    stop = np.zeros(10, int)
    assert answers.loss(stop) == 0.9
    assert answers.excess(stop, 0.05).tolist() == pytest.approx([0.95, -0.05 / 9])


def test_proposals_become_cheaper_and_begin_with_all_visual_tokens_or_better():
    answers = make_answers(300, seed=0)
    schedules = propose(answers)
    costs = [answers.language_model_tokens(s, answers.stops(s)).mean() for s in schedules]
    losses = [answers.loss(answers.stops(s)) for s in schedules]
    assert costs == sorted(costs, reverse=True)
    assert losses == sorted(losses) and losses[0] <= 0


def test_where_few_visual_tokens_are_bad_all_are_taken():
    answers = make_answers(600, seed=0, shift=0.6)
    schedule = calibrate(answers, 0.02, 0.95)
    assert answers.loss(answers.stops(schedule)) < 0.02


def test_stops_are_those_of_the_schedule():
    answers = make_answers(50, seed=0)
    schedule = VisualTokenSchedule([2, 64], [0.8])
    expected = np.where(answers.confidence[0] >= 0.8, 0, 2)
    assert answers.stops(schedule).tolist() == expected.tolist()


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Plain pictures, each with a question that the shipped checkpoint answers at any m, and one that it does not know."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    colours = {"red": (200, 45, 45), "green": (60, 160, 70), "blue": (50, 90, 200)}
    for i in range(24):
        name = list(colours)[i % 3]
        Image.new("RGB", (64, 64), tuple(level + i % 5 for level in colours[name])).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is the background?"}]
        rows.append(
            {"image": f"{i}.png", "conversations": [*turns, {"from": "gpt", "value": f"{name.capitalize()}."}]}
        )
    (folder / "questions.json").write_text(json.dumps(rows))
    for row in rows:
        del row["conversations"][-1]
    (folder / "unanswered.json").write_text(json.dumps(rows))
    wrong = [
        row | {"conversations": [*row["conversations"], {"from": "gpt", "value": "A long caption."}]} for row in rows
    ]
    (folder / "wrong.json").write_text(json.dumps(wrong))
    (folder / "text.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "What?"}]}]))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


@pytest.mark.parametrize("file, measure", [("questions.json", "accuracy"), ("unanswered.json", "agreement")])
def test_command(questions, tmp_path, file, measure):
    options = ["--tolerance", 30, "--num-visual-tokens", "2,8,64", "--output-dir", tmp_path]
    result = run(questions / file, *options)
    assert result.exit_code == 0, result.output
    assert f"{measure}, %" in result.stdout
    written = json.loads((tmp_path / "generation_config.json").read_text())
    schedule = VisualTokenSchedule(**written["visual_token_schedule"])
    assert schedule.num_visual_tokens[0] == 2  # the colour is known from two
    assert schedule.calibration == {
        "tolerance": 0.3,
        "confidence": 0.95,
        "measure": measure,
        "num_questions": 24,
        "num_pictures": 24,
        "num_visual_tokens": 64,
        "max_new_tokens": 64,
        "dtype": "float32",
    }
    shipped = json.loads((Path(TINY_CHECKPOINT) / "generation_config.json").read_text())
    assert written["suppress_tokens"] == shipped["suppress_tokens"]


def test_curve_where_no_promise_can_be_made(tmp_path):
    """Everything on a picture is not told with one visual token."""
    scene, rows = Image.open(ROOT / "examples" / "scene.png"), []
    for i in range(24):
        ImageEnhance.Brightness(scene).enhance(0.9 + i / 120).save(tmp_path / f"{i}.png")
        answer = {"from": "gpt", "value": "A bear, a dog, a fish and the number 7."}
        turns = [{"from": "human", "value": "<image>\nList everything."}, answer]
        rows.append({"image": f"{i}.png", "conversations": turns})
    (tmp_path / "list.json").write_text(json.dumps(rows))
    options = ["--tolerance", 30, "--num-visual-tokens", "1", "--output-dir", tmp_path / "out"]
    result = run(tmp_path / "list.json", *options)
    assert result.exit_code == 2 and "nothing is written" in " ".join((result.stderr + str(result.exception)).split())
    assert "accuracy, %" in result.stdout and "schedule" not in result.stdout and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["questions.json"], "24 pictures are too few to guarantee a loss of at most 0.5 points"),
        (["questions.json", "--num-visual-tokens", "2,65", "--tolerance", 30], "from 1 to 64"),
        (["questions.json", "--tolerance", 60], "less than or equal to 50"),
        (["text.json", "--tolerance", 30], "no question is about an image"),
        (["missing.json"], "There is no data file"),
        (["wrong.json", "--tolerance", 30, "--num-visual-tokens", "2"], "--agreement"),
    ],
)
def test_bad_input(questions, tmp_path, arguments, message):
    file, *options = arguments
    result = run(questions / file, *options, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join((result.stderr + str(result.exception)).split())
    assert not list(tmp_path.glob("out/*"))
