"""`mqt-llava evaluate`: metrics, readers, the command, and what it says."""

import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from transformers import AutoConfig
from typer.testing import CliRunner

from mqt_llava import TINY_CHECKPOINT, MQTLlavaForConditionalGeneration
from mqt_llava.cli import app
from mqt_llava.cost import CostModel, DeviceSpeed
from mqt_llava.evaluation import METRICS, Question, answer_questions, load_metric, read_questions
from mqt_llava.evaluation.metrics import anls, contains, exact_match, multiple_choice, vqa_accuracy
from mqt_llava.evaluation.report import enough, sentence, summarize
from mqt_llava.hub import write_card
from mqt_llava.training.lora import make_lora_config
from tests.small_model import make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        (exact_match, " Red. ", ["red"], 1),
        (exact_match, "A red cat", ["red"], 0),
        (contains, "It is a Red cat.", ["red"], 1),
        (contains, "hundred", ["red"], 0),
        (vqa_accuracy, "yes", ["yes"] * 10, 1),
        (vqa_accuracy, "yes", ["yes"] * 3 + ["no"] * 7, 0.9),  # 3 times 2/3, 7 times 1
        (vqa_accuracy, "yes", ["yes"] + ["no"] * 9, 0.3),
        (vqa_accuracy, "The two dogs", ["2 dogs"] * 10, 1),
        (vqa_accuracy, "It's 1,000", ["its 1000"] * 10, 1),
        (vqa_accuracy, "10 a.m.", ["10 am"] * 10, 1),
        (vqa_accuracy, "10:30", ["10 30"] * 10, 0),
        (vqa_accuracy, "$5", ["5"] * 10, 0),
        (vqa_accuracy, "blue-green", ["blue green"] * 10, 1),
        (vqa_accuracy, "a", ["b"], 0),
        (vqa_accuracy, "b", ["b"], 1),
        (anls, "Paris", ["paris"], 1),
        (anls, "pariss", ["paris", "rome"], 1 - 1 / 6),
        (anls, "london", ["paris"], 0),
        (multiple_choice, "B", ["B", "a dog"], 1),
        (multiple_choice, "(B) a dog", ["B", "a dog"], 1),
        (multiple_choice, "The answer is B.", ["B", "a dog"], 1),
        (multiple_choice, "The correct answer is **B**", ["B", "a dog"], 1),
        (multiple_choice, "B a dog", ["B", "a dog"], 1),
        (multiple_choice, "A dog.", ["B", "a dog"], 1),
        (multiple_choice, "B\nBecause it barks", ["B", "a dog"], 1),
        (multiple_choice, "B - a dog", ["B", "a dog"], 1),
        (multiple_choice, "The answer is B because it barks.", ["B", "a dog"], 1),
        (multiple_choice, "B", ["B. a dog"], 1),
        (multiple_choice, "a dog", ["(B) a dog"], 1),
        (multiple_choice, "a dog", ["a dog"], 1),
        (multiple_choice, "The answer is a dog.", ["A", "a cat"], 0),
        (multiple_choice, "", ["B", "."], 0),
        (multiple_choice, "A cat", ["A", "a dog"], 0),
        (multiple_choice, "C", ["B", "a dog"], 0),
    ],
)
def test_metrics(metric, answer, references, score):
    assert metric(answer, references) == pytest.approx(score)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=11))
def test_every_metric_gives_a_share(answer, references):
    for metric in METRICS.values():
        assert 0 <= metric(answer, references) <= 1


def length(answer, references):
    return len(answer) / 10


def fails_on_green(answer, references):
    return 1.0 if answer != "Green." else answer.no_such_method()


def nothing(answer, references):
    return None


def test_metrics_of_ones_own():
    assert load_metric("tests.mqt_llava.test_evaluate:length")("ab", []) == 0.2
    with pytest.raises(ValueError, match=r"length must give a number from 0 to 1; it gave 1\.1"):
        load_metric("tests.mqt_llava.test_evaluate:length")("a" * 11, [])
    with pytest.raises(ValueError, match="exact_match, contains, vqa_accuracy, anls, multiple_choice"):
        load_metric("accuracy")
    with pytest.raises(ValueError, match="no_such_module"):
        load_metric("no_such_module:function")
    with pytest.raises(ValueError, match="no_such_function"):
        load_metric("json:no_such_function")
    with pytest.raises(ValueError, match="There is no metric ':length'"):
        load_metric(":length")


def test_a_metric_in_the_current_folder(questions, tmp_path):
    """By the installed program, whose path is not the current folder."""
    (tmp_path / "mine.py").write_text("def spoil(answer, references):\n    references.append(answer)\n    return 1\n")
    program = Path(sys.executable).parent / "mqt-llava"
    command = [
        program,
        "evaluate",
        questions / "questions.json",
        "--num-visual-tokens",
        "1,64",
        "--metric",
        "mine:spoil",
    ]
    subprocess.run([*command, "--output-dir", "out"], cwd=tmp_path, check=True)
    rows = list(map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines()))
    assert {row["score"] for row in rows} == {1} and all(len(row["references"]) == 1 for row in rows)


# Questions ------------------------------------------------------------------------------------------------------------


def make_tsv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def as_base64(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


CHOOSE = "Answer with the option's letter from the given choices directly."


def test_tsv_of_vlmevalkit(tmp_path):
    images = make_images(2)
    images[1].save(tmp_path / "b.png")
    options = {"A": "a cat", "B": "a dog"}
    rows = [
        {"index": "seven", "image": "8", "question": "Whose is <image>?", "answer": "B", **options},  # of a later row
        {"index": "8", "image": as_base64(images[0]), "question": "What?", "answer": "yes", "category": "rest"},
        {"index": "9", "image_path": "b.png", "question": "Where?", "answer": "['here', 'there']", "hint": "Look."},
        {"index": "10", "image": str([as_base64(image) for image in images]), "question": "Same?", "answer": "no"},
        {"index": "11", "image_path": "['b.png', 'b.png']", "question": "Same?", "answer": "nan", "answers": "['no']"},
        {"index": "12", "image": "10", "question": "\u4e24\u4e2a\uff1f", "hint": "nan", "answer": "A", **options},
    ]
    make_tsv(tmp_path / "q.tsv", rows)
    questions = read_questions(tmp_path / "q.tsv")
    assert [question.messages for question in questions] == [
        [{"role": "user", "content": content}]
        for content in (
            f"<image>\nWhose is ?\nA. a cat\nB. a dog\n{CHOOSE}",
            "<image>\nWhat?",
            "<image>\nLook.\nWhere?",
            "<image>\n<image>\nSame?",
            "<image>\n<image>\nSame?",
            "<image>\n<image>\n\u4e24\u4e2a\uff1f\nA. a cat\nB. a dog\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002",
        )
    ]
    expected = [["B", "a dog"], ["yes"], ["here", "there"], ["no"], ["no"], ["A", "a cat"]]
    assert [question.references for question in questions] == expected
    assert [question.category for question in questions] == [None, "rest", None, None, None, None]
    for question, shown in zip(questions, ([0], [0], [1], [0, 1], [1, 1], [0, 1])):
        for found, i in zip(question.open_images(), shown, strict=True):
            assert np.array_equal(np.asarray(found), np.asarray(images[i]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "99"}, "its image is that of row 99, which has none"),
        ({"image": "1"}, "its image is that of row 1, which has none"),
        ({"image": "A" * 100}, "its image cannot be read"),
        ({"image_path": "['a.png']"}, "there is no image file"),
        ({}, "it has no image"),
        ({"image_path": "b.png", "question": ""}, "it has no question"),
        ({"image_path": "b.png", "question": "<image> or <image>?"}, "it has 1 images and 2 <image>"),
    ],
)
def test_rows_of_a_tsv_that_are_broken(tmp_path, row, message):
    make_images(1)[0].save(tmp_path / "b.png")
    good = {"index": "0", "image": "", "image_path": "b.png", "question": "What?", "answer": "yes"}
    make_tsv(tmp_path / "q.tsv", [good, {"index": "1", "question": "What?", "answer": "yes"} | row])
    with pytest.raises(ValueError, match=rf"q.tsv\[1\]: {message}"):
        read_questions(tmp_path / "q.tsv")


def test_a_tsv_of_another_encoding(tmp_path):
    make_images(1)[0].save(tmp_path / "b.png")
    (tmp_path / "q.TSV").write_text("index\timage_path\tquestion\tanswer\n1\tb.png\tWhat?\tyes\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"q\.TSV cannot be read"):
        read_questions(tmp_path / "q.TSV")


def test_names_are_unique_and_a_suffix_is_added(tmp_path):
    make_images(1)[0].save(tmp_path / "b.png")
    row = {"index": "1", "image_path": "b.png", "question": "What?", "answer": "yes"}
    make_tsv(tmp_path / "q.tsv", [row, row | {"index": "2"}])
    first, _ = read_questions(tmp_path / "q.tsv", prompt_suffix="In one word.")
    assert first.messages[0]["content"] == "<image>\nWhat?\nIn one word."
    make_tsv(tmp_path / "q.tsv", [row, row])
    with pytest.raises(ValueError, match=r"There are 2 questions named q.tsv\[1\]"):
        read_questions(tmp_path / "q.tsv")


def test_conversations_with_several_references(tmp_path):
    make_images(1)[0].save(tmp_path / "a.png")
    turns = [("human", "<image>\nOne?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")]
    row = {"image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "q.json").write_text(json.dumps([row, row | {"references": ["2", "two"], "category": "counting"}]))
    first, second = read_questions([tmp_path / "q.json"])
    assert [turn["content"] for turn in first.messages] == ["<image>\nOne?", "1", "Two?"]
    assert (first.references, first.category) == (["2"], None)
    assert (second.references, second.category) == (["2", "two"], "counting")


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_and_a_failure_is_a_row():
    model, processor, images = make_model(), make_processor(), make_images(3)
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    texts = ["<image>\nWhat?", "<image><image>\nWhich one?", "<image>\n" + "long " * 120, "No picture"]
    pictures = [[images[0]], images[1:], [images[0]], []]
    questions = [
        Question(str(i), [{"role": "user", "content": text}], shown)
        for i, (text, shown) in enumerate(zip(texts, pictures))
    ]
    found = {
        (a.index, a.num_visual_tokens): a
        for a in answer_questions(model, processor, questions, [1, 7], 6, batch_size=3)
    }
    assert len(found) == 8
    for (i, m), answer in found.items():
        if i == 2:
            assert "The prompt has" in answer.error
            continue
        inputs = processor(
            images=pictures[i] or None, text=texts[i] + ":", add_special_tokens=False, return_tensors="pt"
        )
        sequence = model.generate(**inputs, num_visual_tokens=m, max_new_tokens=6, do_sample=False)
        new = sequence[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.decode(new, skip_special_tokens=True).strip() and answer.error is None
        assert answer.num_new_tokens == len(new)
        assert answer.num_text_tokens == int((inputs["input_ids"] != 3).sum())


def test_an_image_is_encoded_once_for_all_its_questions(tmp_path):
    model, processor, images = make_model(), make_processor(), make_images(3)
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    content = (tmp_path / "2.png").read_bytes()
    shown = [tmp_path / "0.png", images[1], content]  # a file, an image and its bytes, in questions of their own
    questions = [
        Question(str(i), [{"role": "user", "content": "<image>\n" + "word " * (i % 5)}], [shown[i % 3]])
        for i in range(30)
    ]
    questions += [Question("pair", [{"role": "user", "content": "<image><image>\nSame?"}], [shown[0], shown[2]])]
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = {(a.index, a.num_visual_tokens): a for a in answer_questions(model, processor, questions, [1, 7], 6, 2)}
    hook.remove()
    assert sum(seen) == 3 and len(found) == 2 * 31
    for (i, m), answer in found.items():
        (alone,) = answer_questions(model, processor, [questions[i]], [m], 6)
        assert (alone.text, alone.num_text_tokens) == (answer.text, answer.num_text_tokens)


# What results say -----------------------------------------------------------------------------------------------------


def make_results(scores):
    """`{m: [score of each question]}` as rows."""
    return [
        {"id": str(i), "num_visual_tokens": m, "score": score, "seconds": 0.1, "category": "odd" if i % 2 else "even"}
        for m, row in scores.items()
        for i, score in enumerate(row)
    ]


def test_summary_and_sentence():
    rng = np.random.default_rng(0)
    all_right = (rng.random(400) < 0.9).astype(float)
    nearly = np.where(np.arange(400) % 100 == 0, 0.0, all_right)
    half = np.where(np.arange(400) % 2 == 0, 0.0, all_right)
    rows = summarize(make_results({1: half, 4: nearly, 16: all_right}))
    assert [row.num_visual_tokens for row in rows] == [1, 4, 16]
    assert rows[2].accuracy == pytest.approx(100 * all_right.mean())
    low, high = rows[2].interval
    assert low < rows[2].accuracy < high and high - low == pytest.approx(2 * 196 * (0.09 / 400) ** 0.5, rel=0.2)
    assert rows[0].by_category["even"] == 0 and rows[0].by_category["odd"] > 80
    assert enough(rows).num_visual_tokens in (4, 16)
    assert enough(rows, tolerance=3).num_visual_tokens == 4
    assert enough(rows, tolerance=0).num_visual_tokens == 16
    assert "m = 4 is the smallest that is within 3 points of the best, m = 16: " in sentence(rows, tolerance=3)
    assert sentence(rows, tolerance=0).endswith(
        "; no other m is right more often; no smaller m is shown to be within 0 points of it."
    )
    assert sentence(rows[::2]).endswith("; no other m is right more often; every smaller m is significantly worse.")
    assert sentence(summarize(make_results({1: all_right, 4: half}))).endswith("; no other m is right more often.")
    (alone,) = summarize(make_results({4: half}))
    assert sentence([alone]) == "m = 4 is right in {:.1f} %, 95 % interval {:.1f} to {:.1f}.".format(
        alone.accuracy, *alone.interval
    )


def test_what_does_not_vary_is_not_certain():
    rows = summarize(make_results({1: np.ones(100), 4: np.ones(100)}))
    assert [row.interval for row in rows] == [(pytest.approx(96.3, abs=0.01), 100)] * 2  # Wilson's for 100 of 100
    assert sentence(rows, tolerance=1).startswith("m = 1 is right in 100.0 %")
    half = np.arange(100) % 2
    rows = summarize(make_results({1: half, 4: half, 16: np.arange(100) % 50 > 0}))
    assert rows[1].difference_interval == rows[0].difference_interval and rows[0].by_category["odd"] == 100


def test_compute_and_time_of_a_summary():
    costs = CostModel(AutoConfig.from_pretrained(TINY_CHECKPOINT))
    counts = [(1, 10, 3), (1, 12, 4), (2, 20, 1), (0, 9, 2), (1, 12, 4)]
    names = ("num_images", "num_text_tokens", "num_new_tokens")
    results = [
        {"id": str(i), "num_visual_tokens": 4, "score": 1, "seconds": [9, 1, 2, 3, 50][i]} | dict(zip(names, count))
        for i, count in enumerate(counts)
    ]
    results.append(results[0] | {"id": "failed", "score": 0, "seconds": 0.0, "error": "damaged"})
    (row,) = summarize(results, costs)
    flops = [costs(4, **dict(zip(names, count))).flops for count in counts]
    assert row.gflops == pytest.approx(np.mean(flops) / 1e9) and row.seconds == 3
    assert row.accuracy == pytest.approx(500 / 6)


def test_the_interval_of_a_difference_is_of_pairs():
    rng = np.random.default_rng(0)
    right = (rng.random(2000) < 0.5).astype(float)
    worse = np.where(rng.random(2000) < 0.1, 0.0, right)  # a twentieth of all is lost, none is won
    row = summarize(make_results({1: worse, 4: right}))[0]
    lost = (right - worse).mean()
    width = 196 * np.sqrt(lost * (1 - lost) / 2000)
    assert row.difference_interval == pytest.approx((-100 * lost - width, -100 * lost + width), abs=0.15)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    colours, rows = {"Red": (200, 45, 45), "Green": (60, 160, 70), "Blue": (50, 90, 200)}, []
    for i in range(9):
        name = list(colours)[i % 3]
        Image.new("RGB", (64, 64), colours[name]).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is the background?"}]
        turns.append({"from": "gpt", "value": f"{name}." if i else "Pink."})
        rows.append({"image": f"{i}.png", "conversations": turns, "category": "colour" if i else "wrong"})
    (folder / "questions.json").write_text(json.dumps(rows))
    (folder / "unanswered.json").write_text(json.dumps([rows[0] | {"conversations": rows[0]["conversations"][:1]}]))
    (folder / "blank.json").write_text(json.dumps([rows[0] | {"references": [" "]}]))
    (folder / "without.json").write_text(json.dumps([rows[0] | {"image": "missing.png"}]))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_command(questions, tmp_path):
    options = ["--num-visual-tokens", "1,64", "--output-dir", tmp_path, "--dataset-id", "someone/colours"]
    result = run(questions / "questions.json", *options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 18 and {row["num_visual_tokens"] for row in rows} == {1, 64}
    assert {"id", "num_visual_tokens", "question", "answer", "references", "score"} <= rows[0].keys()
    assert all(row["score"] == (row["category"] == "colour") for row in rows)
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert accuracy["64"] == {"wrong": 0.0, "colour": 100.0, "all": pytest.approx(100 * 8 / 9)}
    assert "| 64 | 88.9 |" in (tmp_path / "results.md").read_text()
    assert "m = 1 is the smallest" in result.stdout or "m = 1 is right in" in result.stdout
    assert (tmp_path / "results.png").stat().st_size > 10_000
    (entry,) = yaml.safe_load(
        (tmp_path / ".eval_results" / "someone--colours_default_1_visual_tokens.yaml").read_text()
    )
    assert entry["dataset"] == {"id": "someone/colours", "task_id": "default"}
    assert entry["value"] == 88.89 and "num_visual_tokens=1" in entry["notes"]


def test_a_broken_off_run_goes_on(questions, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--num-visual-tokens", "1,64", "--batch-size", 4]
    assert run(questions / "questions.json", *options, "--output-dir", whole).exit_code == 0
    assert run(questions / "questions.json", *options, "--output-dir", broken).exit_code == 0
    results = (broken / "results.jsonl").read_text()
    lines = results.splitlines(keepends=True)
    (broken / "results.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    asked = []

    def remember(model, processor, questions, *arguments):
        asked.extend(question.id for question in questions)
        return answer_questions(model, processor, questions, *arguments)

    monkeypatch.setattr("mqt_llava.evaluation.answers.answer_questions", remember)
    assert run(questions / "questions.json", *options, "--output-dir", broken).exit_code == 0
    assert 0 < len(asked) < 9

    def content(folder):
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        return sorted((row["id"], row["num_visual_tokens"], row["answer"], row["score"]) for row in rows)

    assert content(broken) == content(whole)
    assert json.loads((broken / "accuracy.json").read_text()) == json.loads((whole / "accuracy.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["questions.json", "--num-visual-tokens", "1,65"], "from 1 to 64"),
        (["questions.json", "--metric", "bleu"], "There is no metric 'bleu'"),
        (["unanswered.json"], "1 of 1 questions have no answer to compare with"),
        (["without.json"], "there is no image file"),
        (["missing.json"], "There is no data file"),
        (["blank.json"], "1 of 1 questions have no answer to compare with"),
        (["questions.json", "--dataset-id", "no/such/place"], "--dataset-id is no repository"),
        (["questions.json", "--dataset-id", "a/b", "--task-id", "../x"], "--task-id is made of letters"),
    ],
)
def test_bad_input(questions, tmp_path, arguments, message):
    file, *options = arguments
    result = run(questions / file, *options, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_results_of_another_evaluation_are_not_overwritten(questions, tmp_path, monkeypatch):
    model, folder, out = tmp_path / "model", tmp_path / "questions", tmp_path / "out"
    shutil.copytree(TINY_CHECKPOINT, model)
    shutil.copytree(questions, folder)
    data, time = folder / "questions.json", (folder / "0.png").stat().st_mtime_ns
    options = [data, "--model", model, "--output-dir", out, "--num-visual-tokens"]
    assert run(*options, "1", "--dataset-id", "someone/colours").exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refuse(name, *more):
        refused = run(*options, *more)
        assert refused.exit_code == 2 and f"has results with another {name}: " in " ".join(refused.stderr.split())
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    refuse("num_visual_tokens", "2")
    refuse("prompt_suffix", "1", "--prompt-suffix", "Briefly.")
    refuse("dtype", "1", "--dtype", "bfloat16")
    os.utime(model / "model.safetensors")  # trained again
    refuse("model_files", "1")
    shutil.copystat(Path(TINY_CHECKPOINT) / "model.safetensors", model / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    options[options.index(model)], options[0] = "model", "questions/questions.json"
    same = run(*options, "1")
    assert same.exit_code == 0 and "answered before: 9 of 9 questions" in same.stderr
    template, written = model / "chat_template.jinja", (model / "chat_template.jinja").read_text()
    template.write_text("{{ messages }}")
    refuse("model_files", "1")
    template.write_text(written)
    shutil.copystat(Path(TINY_CHECKPOINT) / template.name, template)
    os.utime(folder / "0.png", ns=(1, 1))  # another picture
    refuse("images", "1")
    os.utime(folder / "0.png", ns=(time, time))
    data.write_text(data.read_text().replace("Pink", "Red"))
    refuse("data", "1")
    failing = run(*options, "2", "--overwrite", "--device", "nothing")
    assert failing.exit_code == 2 and {path: path.read_bytes() for path in before} == before
    again = run(*options, "2", "--overwrite")
    assert again.exit_code == 0 and not (out / ".eval_results").exists()
    assert json.loads((out / "accuracy.json").read_text()) == {"2": {"wrong": 100.0, "colour": 100.0, "all": 100.0}}


@pytest.mark.parametrize("name", ["file", "setting.json"])
def test_a_folder_of_something_else_is_refused(questions, tmp_path, name):
    (tmp_path / name).write_text("{}")
    for more in ([], ["--overwrite"]):
        refused = run(questions / "questions.json", "--output-dir", tmp_path, *more)
        assert refused.exit_code == 2 and "is not empty and holds no results" in " ".join(refused.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    refused = run(questions / "questions.json", "--output-dir", tmp_path / name)
    assert refused.exit_code == 2 and "is a file, not a folder" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("name", ["setting.json", "results.jsonl"])
def test_damaged_results(questions, tmp_path, name):
    options = [questions / "questions.json", "--num-visual-tokens", "1", "--output-dir", tmp_path]
    assert run(*options).exit_code == 0
    (tmp_path / name).write_text((tmp_path / name).read_text()[9:])
    result = run(*options)
    assert result.exit_code == 2 and "are damaged" in " ".join(result.stderr.split())


def test_every_question_fails(questions, tmp_path):
    folder = tmp_path / "questions"
    shutil.copytree(questions, folder)
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    result = run(folder / "questions.json", "--num-visual-tokens", "1", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2 and "every question failed, questions.json[" in " ".join(result.stderr.split())
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 9


def test_files_of_one_name(questions, tmp_path):
    shutil.copytree(questions, tmp_path / "other")
    names = [questions / "questions.json", tmp_path / "other" / "questions.json"]
    assert len({question.id for question in read_questions(names)}) == 18


def test_an_adapter(questions, tmp_path):
    model = MQTLlavaForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
    tuned = get_peft_model(model, make_lora_config(model, r=4))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    options = [questions / "questions.json", "--num-visual-tokens", "64", "--output-dir", tmp_path / "out"]
    assert run(*options, "--adapter", tmp_path / "adapter").exit_code == 0
    rows = list(map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines()))
    assert sum(row["score"] for row in rows) < 8
    assert "another adapter: " in " ".join(run(*options).stderr.split())


def test_a_metric_that_fails(questions, tmp_path):
    options = [questions / "questions.json", "--num-visual-tokens", "64", "--output-dir", tmp_path / "out", "--metric"]
    refused = run(*options, "tests.mqt_llava.test_evaluate:nothing")
    assert refused.exit_code == 2 and "must give a number from 0 to 1; it gave None" in " ".join(
        refused.stderr.split()
    )
    assert not (tmp_path / "out").exists()
    result = run(*options, "tests.mqt_llava.test_evaluate:fails_on_green")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["answer"] == "Green."]
    assert len(failed) == 3 and all("no_such_method" in row["error"] and row["score"] == 0 for row in failed)
    assert "3 questions failed and count as wrong" in result.stdout
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["64"]["all"] == pytest.approx(100 * 6 / 9)


def test_out_of_memory(questions, tmp_path, monkeypatch):
    generate, calls = MQTLlavaForConditionalGeneration.generate, []

    def fail_later(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(self, *arguments, **options)

    options = [questions / "questions.json", "--num-visual-tokens", "1,64", "--output-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(MQTLlavaForConditionalGeneration, "generate", fail_later)
        broken = run(*options, "--batch-size", 4)
    assert broken.exit_code == 2 and "out of memory with --batch-size 4: 8 answers are written" in broken.stderr
    again = run(*options, "--batch-size", 2)
    assert again.exit_code == 0 and "answered before: 4 of 9 questions" in again.stderr
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 18


# Cards ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = ["--num-visual-tokens", "1,64", "--output-dir", folder, "--dataset-id", "someone/colours"]
    assert run(questions / "questions.json", *options).exit_code == 0
    return folder


def run_card(*arguments):
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


def test_a_card_shows_results_and_keeps_the_rest(results, tmp_path, monkeypatch):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "model")
    write_card(tmp_path / "model", "someone/model")
    own = (tmp_path / "model" / "README.md").read_text() + "\n## Licence\n\nOurs.\n"
    own = own.replace("## How to use", "See `## Accuracy and compute`\nbelow.\n\n## How to use")
    older = tmp_path / "model" / ".eval_results"
    older.mkdir()
    for name in ("someone--colours_default_7_visual_tokens.yaml", "another--set_default_7_visual_tokens.yaml"):
        (older / name).touch()
    (tmp_path / "model" / "README.md").write_text(own)
    for _ in range(2):  # again: it is replaced, not repeated
        result = run_card(tmp_path / "model", "--results", results)
        assert result.exit_code == 0, result.output
    card = (tmp_path / "model" / "README.md").read_text()
    before, _, after = card.partition("\n## Accuracy and compute\n")
    assert before.rstrip() == own.partition("\n## Accuracy and compute\n")[0].partition("\n## Licence")[0].rstrip()
    assert sorted(path.name for path in older.iterdir()) == [
        "another--set_default_7_visual_tokens.yaml",
        "someone--colours_default_1_visual_tokens.yaml",
        "someone--colours_default_64_visual_tokens.yaml",
    ]
    assert (results / "results.md").read_text().strip() in after and after.endswith("## Licence\n\nOurs.\n")
    assert card.count("\n## Accuracy and compute\n") == card.count("## Licence") == 1
    assert ModelCard(card).data.library_name == "transformers"
    copied = tmp_path / "model" / "accuracy.json"
    assert json.loads(copied.read_text()) == json.loads((results / "accuracy.json").read_text())
    assert (tmp_path / "model" / ".eval_results" / "someone--colours_default_64_visual_tokens.yaml").exists()
    monkeypatch.setattr("mqt_llava.cost.measure_device", lambda *arguments: DeviceSpeed(1e9, 1e9))
    priced = CliRunner().invoke(
        app, ["cost", "--model", str(tmp_path / "model"), "--num-visual-tokens", "64", "--json"]
    )
    assert json.loads(priced.stdout)["costs"][0]["accuracy"]["all"] == pytest.approx(88.9, abs=0.1)


def test_bad_folders_of_cards(results, tmp_path):
    for folder, shown, message in (
        (tmp_path, results, "is neither a checkpoint nor an adapter"),
        (TINY_CHECKPOINT, tmp_path, "has no results"),
        (TINY_CHECKPOINT, results, "has no model card"),
    ):
        result = run_card(folder, "--results", shown)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
