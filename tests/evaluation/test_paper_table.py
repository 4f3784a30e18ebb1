"""The paper's table, up to the downloads."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval import __main__ as command
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config


pytestmark = pytest.mark.lmms

ROOT = Path(__file__).parents[2]
BENCHMARKS = runpy.run_path(str(ROOT / "examples" / "paper_table.py"))["BENCHMARKS"]


@pytest.fixture(scope="module")
def manager():
    return TaskManager()


def run_script(tmp_path, lmms_eval, **variables):
    """Run the script with a stand-in for the command of lmms-eval."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment |= {"LMMS_EVAL": f"{sys.executable} {lmms_eval}", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "examples/paper_table.sh", "some/model", str(tmp_path / "results")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


STAND_IN = """
import json, sys
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(arguments["--output_path"]) / "some__model"
folder.mkdir(parents=True)
record = Path(__file__).with_name("record.jsonl")
task = (Path(arguments["--include_path"]) / "mmvet_llava.yaml").read_text()
with record.open("a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "mmvet_llava": task}) + "\\n")
m = int(arguments["--model_args"].split("num_visual_tokens=")[1])
results = {
    "results": {"gqa": {"alias": "gqa", "exact_match,none": 0.5 + m / 1000, "exact_match_stderr,none": "N/A"}},
    "throughput": {"avg_gflops": 1000.0 + m, "avg_visual_tokens": m},
}
(folder / "20261126_183920_results.json").write_text(json.dumps(results))
"""


def test_script_from_task_names_to_table(tmp_path, monkeypatch):
    (tmp_path / "lmms.py").write_text(STAND_IN)
    done = run_script(tmp_path, tmp_path / "lmms.py", OPENAI_API_KEY="none")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    sizes = [2, 4, 8, 16, 36, 64, 144, 256]
    assert [record["argv"][3] for record in records] == [f"pretrained=some/model,num_visual_tokens={m}" for m in sizes]

    # lmms-eval's own parser takes the arguments, and the names are tasks of its
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *records[0]["argv"]])
    _, arguments = command.parse_eval_args()
    assert arguments.batch_size == "16" and arguments.log_samples
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mmvet_llava.yaml").write_text(records[0]["mmvet_llava"])
    manager, names = TaskManager(include_path=str(tmp_path / "tasks")), arguments.tasks.split(",")
    assert sorted(manager.match_tasks(names)) == sorted(names)
    assert {name for tasks, *_ in BENCHMARKS.values() for name in tasks} >= set(names)
    for tasks, metric, _ in BENCHMARKS.values():
        for name in set(tasks) & set(names):
            path = manager.task_index[name]["yaml_path"]
            config = load_yaml_config(path, mode="simple")
            assert metric in [entry["metric"] for entry in config["metric_list"]]
    mmvet = load_yaml_config(tmp_path / "tasks" / "mmvet_llava.yaml", mode="simple")
    assert mmvet["lmms_eval_specific_kwargs"]["default"] == {"pre_prompt": "", "post_prompt": ""}
    assert mmvet["dataset_path"].endswith("MMVet")

    table = (tmp_path / "results" / "table.md").read_text()
    assert table in done.stdout
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()}
    gqa = rows["m"].index("GQA")
    assert [rows[m][gqa] for m in ("2", "16", "256", "576")] == [
        "50.2 / 50.8",
        "51.6 / 57.6",
        "75.6 / 61.6",
        "- / 62.0",
    ]
    assert rows["36"][rows["m"].index("MMMU")] == "" and rows["144"][-1].strip(" |") == "1.14"

    again = run_script(tmp_path, tmp_path / "lmms.py", OPENAI_API_KEY="none")  # nothing is left to do
    assert again.returncode == 0 and len((tmp_path / "record.jsonl").read_text().splitlines()) == len(sizes)


def test_script_says_what_is_left_out_and_what_failed(tmp_path):
    (tmp_path / "lmms.py").write_text("")  # as lmms-eval does after an error: no results, and a good end
    done = run_script(tmp_path, tmp_path / "lmms.py")
    assert done.returncode == 1
    assert "without LLaVA-Wild and MM-Vet" in done.stderr
    assert "There are no results for m = 2." in done.stderr


@pytest.mark.parametrize(
    "task, suffix",
    [
        ("vqav2_val", "\nAnswer the question using a single word or phrase."),
        ("gqa", "\nAnswer the question using a single word or phrase."),
        ("pope", "\nAnswer the question using a single word or phrase."),
        ("mme", "\nAnswer the question using a single word or phrase."),
        (
            "vizwiz_vqa_val",
            "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
        ),
        ("scienceqa_img", "\nAnswer with the option's letter from the given choices directly."),
        ("mmbench_en_dev_static", "\nAnswer with the option's letter from the given choices directly."),
    ],
)
def test_prompts_end_as_in_llava(task, suffix, manager):
    path = manager.task_index[task]["yaml_path"]
    assert load_yaml_config(path, mode="simple")["lmms_eval_specific_kwargs"]["default"]["post_prompt"] == suffix


def test_a_folder_without_results(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/paper_table.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "there are no results" in done.stderr
