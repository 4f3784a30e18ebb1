import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks.figure import draw, read_csv


ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "docs" / "benchmarks").glob("generation_*.csv"))


def run_benchmark(name, *options):
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # pytest-xdist runs one process for each core
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_generation_measures_every_row(tmp_path):
    options = "--preset tiny --batch_sizes 1 2 --num_visual_tokens 16 1 --output_dir".split()
    result = run_benchmark("generation", *options, tmp_path)
    assert result.stdout.count("| MQT, sdpa | ") == 6
    assert result.stdout.count("| LLaVA-1.5, sdpa | ") == 2
    with (tmp_path / "generation_tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["m"]) for row in rows] == [(b, m) for b in "12" for m in ("576", "256", "16", "1")]
    measured = ["preprocess", "vision", "connector", "merge", "prefill", "first token", "decode step", "peak"]
    assert all(float(row[name]) > 0 for row in rows for name in measured)
    assert (tmp_path / "generation_tiny.png").exists()
    assert (tmp_path / "generation_tiny.md").read_text() in result.stdout


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_figure_of_a_table_keeps_its_labels_in_the_frame(path, tmp_path):
    draw(read_csv(path), "", tmp_path / "figure.png")
    figure = plt.gcf()
    for axes in figure.axes:
        frame, labels = axes.get_window_extent(), [text.get_window_extent() for text in axes.texts]
        assert len(labels) >= 5 and all(frame.contains(label.x1, label.y1) for label in labels)
    plt.close(figure)


@pytest.mark.slow
def test_generation_measures_compiled_rows(tmp_path):
    """As at 7B, except that `generate` compiles decoding on GPUs alone."""
    options = "--preset tiny --ways sdpa compiled --batch_sizes 1 2 --num_visual_tokens 16 1 --output_dir".split()
    result = run_benchmark("generation", *options, tmp_path, "--minutes", "0")
    assert "round 1 of 1" in result.stderr
    assert "recompile_limit" not in result.stderr
    with (tmp_path / "generation_tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["sdpa"] * 8 + ["sdpa, compiled"] * 8
    assert all(float(row[name]) > 0 for row in rows for name in ("first token", "tokens/s", "first call", "peak"))


@pytest.mark.slow
def test_training_measures_every_row(tmp_path):
    options = "--preset tiny --ways full lora qlora --num_visual_tokens 16 1 --output_dir".split()
    result = run_benchmark("training", *options, tmp_path, "--gradient_checkpointing")
    with (tmp_path / "training_tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    ways = ("full", "lora", "qlora")
    assert [(row["trained"], row["m"]) for row in rows] == [(way, m) for way in ways for m in ("576", "16", "1")]
    assert all(float(row[name]) > 0 for row in rows for name in ("step", "samples/s", "peak"))
    assert all(float(row["less memory"]) > 1 for row in rows if row["model"] == "MQT")
    assert (tmp_path / "training_tiny.md").read_text() in result.stdout


def test_generation_marks_what_is_not_measured():
    from benchmarks.generation import PRESETS, benchmark

    ways = PRESETS["7b"]["ways"]
    options = {"device": "cuda", "ways": ways, "batch_sizes": [1], "num_visual_tokens": [16]}
    rows, setting = benchmark(PRESETS["tiny"] | options)
    if "Not measured" in setting:
        assert {row["first token"] for row in rows} == {"not measured"}
        assert {row["way"] for row in rows} == {"sdpa", "flash_attention_2", "sdpa, compiled"}


@pytest.mark.slow
def test_rehearsal_at_real_size(tmp_path):
    """With one layer in place of 32."""
    result = run_benchmark("real_size", "--folder", tmp_path / "work", "--layers", "1", "--output_dir", tmp_path)
    table = (tmp_path / "real_size.md").read_text()
    assert table in result.stdout and not (tmp_path / "work").exists()
    assert re.search(r"This takes \d+\.\d GB in .+, which has \d+\.\d GB free", result.stderr)
    for step in (
        "convert MQT-LLaVA-7b",
        "cost",
        "--num-visual-tokens 256",
        "--compare 1,16,256",
        "evaluate",
        "--load-in-4bit",
        "again",
    ):
        assert re.search(rf"\| [^|]*{re.escape(step)}[^|]*\| [\d.]+ \| [\d.]+ \| [\d.]+ \| \S", table), step
    assert table.count("tensors that differ 0") == 2


def test_rehearsal_leaves_what_is_there(tmp_path):
    command = [sys.executable, "-m", "benchmarks.real_size", "--folder", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and f"{tmp_path} is there already" in result.stderr and tmp_path.exists()


@pytest.mark.slow
def test_paths_of_a_cpu_side_by_side(tmp_path):
    options = "--avx2 --preset tiny --num_visual_tokens 16 --repeats 1 --output_dir".split()
    result = run_benchmark("cpu_path", *options, tmp_path)
    table = (tmp_path / "cpu_path_avx2.md").read_text()
    assert table in result.stdout and re.search(r"\| 16 \| [\d.]+ \| [\d.]+ \|", table)


@pytest.mark.slow
def test_quantization_of_each_part(tmp_path):
    result = run_benchmark("quantization", "--pictures", "3", "--num_bits", "4", "--output_dir", tmp_path)
    table = (tmp_path / "quantization.md").read_text()
    assert table in result.stdout and table.count("| 4 | ") == 4 and table.count("| 16 | nothing") == 1


@pytest.mark.slow
def test_auto_beside_every_fixed_number(tmp_path):
    options = "--pictures 12 --calibration_pictures 60 --tolerance 0.2 --splits 10 --timed 16 --rounds 1 --output_dir".split()
    result = run_benchmark("adaptive", *options, tmp_path)
    text = (tmp_path / "adaptive.md").read_text()
    assert text in result.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    tokens = {row[0]: float(row[4]) for row in rows if row[0] in ("1", "64", "auto")}
    assert tokens["1"] < tokens["auto"] < tokens["64"]
    assert sum(row[0] == "List everything." for row in rows) == 9
    assert re.search(r"^Calibrated .* of 10 random halves of 72 pictures, \d+ gave", text, re.MULTILINE)
