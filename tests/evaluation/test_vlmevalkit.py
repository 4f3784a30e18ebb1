"""VLMEvalKit itself with our model, on data of our own, beside `mqt-llava evaluate`."""

import base64
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from mqt_llava import TINY_CHECKPOINT
from mqt_llava.cli import app


pytestmark = pytest.mark.vlmevalkit

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "lmms_eval"
NUM_VISUAL_TOKENS = (1, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets of the pictures of `examples/lmms_eval`: `choose` has options, `tell` has none."""
    folder, rows = tmp_path_factory.mktemp("LMUData"), json.loads((TASK / "questions.json").read_text())
    encoded = [base64.b64encode((TASK / row["image"]).read_bytes()).decode() for row in rows]
    tell = [
        {"index": i, "image": encoded[i], "question": question(row), "answer": row["conversations"][1]["value"]}
        for i, row in enumerate(rows[:12])
    ]
    tell.insert(0, tell[0] | {"index": 12, "image": "0"})  # the image of a later row
    tell.append(
        {"index": 13, "image": str(encoded[:4:3]), "question": "<image> <image> What differs?", "answer": "Nothing."}
    )
    choose = [
        {"index": i, "image": encoded[i], "question": question(row), "A": "Yes.", "B": "No.", "answer": "A"}
        for i, row in enumerate(rows)
        if row["category"] in ("exists", "number?")
    ]
    for row in choose:
        row["answer"] = "AB"[["Yes.", "No."].index(rows[row["index"]]["conversations"][1]["value"])]
    for name, written in (("tell", tell), ("choose", choose)):
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(written[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(written)
    return folder


def question(row):
    return row["conversations"][0]["value"].removeprefix("<image>\n")


def run_launcher(data, *arguments):
    environment = os.environ | {"LMUData": str(data), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "examples/vlmevalkit.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_answers_are_those_of_evaluate(data, tmp_path):
    options = ["--pretrained", TINY_CHECKPOINT, "--num-visual-tokens", *NUM_VISUAL_TOKENS, "--max-new-tokens", 40]
    done = run_launcher(
        data, *options, "--data", "tell", "choose", "--judge", "exact_matching", "--work-dir", tmp_path / "theirs"
    )
    assert done.returncode == 0, done.stderr
    for name, more in (("tell", ["--prompt-suffix", "Answer the question directly."]), ("choose", [])):
        ours = CliRunner().invoke(
            app,
            ["evaluate", str(data / f"{name}.tsv"), "--num-visual-tokens", "1,16", "--max-new-tokens", "40"]
            + ["--metric", "multiple_choice", *more, "--output-dir", str(tmp_path / name)],
        )
        assert ours.exit_code == 0, ours.output
        rows = list(map(json.loads, (tmp_path / name / "results.jsonl").read_text().splitlines()))
        for m in NUM_VISUAL_TOKENS:
            (table,) = (tmp_path / "theirs").glob(f"*_{m}_visual_tokens_*/*_{name}.xlsx")
            theirs = {str(row["index"]): str(row["prediction"]) for _, row in pd.read_excel(table).iterrows()}
            expected = {row["id"].split("[")[1][:-1]: row["answer"] for row in rows if row["num_visual_tokens"] == m}
            assert theirs == expected
    (accuracy,) = (tmp_path / "theirs").glob("*_16_visual_tokens_*/*_choose_acc.csv")
    ours = json.loads((tmp_path / "choose" / "accuracy.json").read_text())["16"]["all"]
    assert 100 * pd.read_csv(accuracy)["Overall"][0] == pytest.approx(ours)


def test_results_of_another_checkpoint_are_not_taken_over(data, tmp_path):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "model")
    for checkpoint in (TINY_CHECKPOINT, tmp_path / "model"):
        options = ["--num-visual-tokens", 1, "--data", "choose", "--mode", "infer", "--work-dir", tmp_path / "out"]
        assert run_launcher(data, "--pretrained", checkpoint, *options).returncode == 0
    assert len(list((tmp_path / "out").glob("*/*_choose.xlsx"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--pretrained": "no/such/model"}, "no/such/model is not an MQT-LLaVA model"),
        ({"--num-visual-tokens": 65}, "must be from 1 to 64; got 65"),
    ],
)
def test_bad_input(data, options, message):
    options = {"--pretrained": TINY_CHECKPOINT, "--num-visual-tokens": 1, "--data": "choose"} | options
    done = run_launcher(data, *(part for option in options.items() for part in option))
    assert done.returncode == 2 and message in done.stderr
