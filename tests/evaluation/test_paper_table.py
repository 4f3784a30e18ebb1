"""The paper's table, up to the downloads."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import Dataset
from lmms_eval import __main__ as command
from lmms_eval import evaluator
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image

from mqt_llava import TINY_CHECKPOINT


pytestmark = pytest.mark.lmms

ROOT = Path(__file__).parents[2]
PAPER_TABLE = runpy.run_path(str(ROOT / "examples" / "paper_table.py"))
BENCHMARKS = PAPER_TABLE["BENCHMARKS"]


@pytest.fixture(scope="module")
def manager():
    return TaskManager()


def run_script(tmp_path, lmms_eval, model="some/model", **variables):
    """Run the script with a stand-in for the command of lmms-eval."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment |= {"LMMS_EVAL": f"{sys.executable} {lmms_eval}", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "examples/paper_table.sh", model, str(tmp_path / "results")],
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
    for model, variables in (("another/model", {"OPENAI_API_KEY": "none"}), ("some/model", {})):
        refused = run_script(tmp_path, tmp_path / "lmms.py", model, **variables)
        assert refused.returncode == 2 and "choose another FOLDER" in refused.stderr


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


# lmms-eval's own code of the tasks on a few rows of ours, in the columns of the Hub's data

SOURCES = {
    "vqav2_val": ("vqav2", "validation"),
    "gqa": ("gqa", "testdev"),
    "vizwiz_vqa_val": ("vizwiz_vqa", "val"),
    "scienceqa_img": ("scienceqa", "test"),
    "pope": ("pope", "test"),
    "mme": ("mme", "test"),
    "mmbench_en_dev_static": ("mmbench", "dev"),
    "mmmu_val": ("mmmu", "validation"),
}


def make_rows(task, images):
    """Four questions, and the right answer in the task's own words."""
    asked = [{"question": "Is there a dog?", "image": image, "question_id": i} for i, image in enumerate(images)]
    letters = {"A": "Yes.", "B": "No.", "C": "nan", "D": "nan"}
    no, yes = [{"answer": "no", "answer_id": i} for i in range(10)], {"answer": "yes", "category": "existence"}
    more = {
        "vqav2_val": {"answers": no},
        "vizwiz_vqa_val": {"answers": ["no"] * 10},
        "scienceqa_img": {"hint": "", "choices": ["Yes.", "No."], "answer": 1},
        "pope": yes,
        "mmbench_en_dev_static": {"hint": "nan", "category": "one", "L2-category": "two", "source": "us", "split": "dev"},
        "mmmu_val": {"question": "<image 1> Is there a dog in <image 2>?", "options": "['Yes.', 'No.']", "answer": "B"},
    }  # fmt: skip
    rows = [{"answer": "no"} | row | more.get(task, {}) for row in asked]
    for i, row in enumerate(rows):
        if task == "mme":  # two questions about each picture
            row |= yes | {"question_id": i // 2, "category": ("existence", "code_reasoning")[i // 2]}
            row["question"] += " Please answer yes or no."
        if task == "mmbench_en_dev_static":
            row |= letters | {"index": i, "answer": "B"}
        if task == "mmmu_val":
            row |= {"id": f"validation_Art_{i}", "question_type": "multiple-choice"}
            row |= {"image_1": row.pop("image"), "image_2": images[0]}
    right = {"scienceqa_img": "B", "pope": "Yes", "mme": "Yes", "mmbench_en_dev_static": "B", "mmmu_val": "B"}
    return rows, right.get(task, "No")


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """The tasks, and the right answer of each by its name."""
    folder, answers = tmp_path_factory.mktemp("tasks"), {}
    images = [Image.open(path) for path in sorted((ROOT / "examples/lmms_eval/images").glob("*.png"))[:4]]
    (package,) = find_spec("lmms_eval.tasks").submodule_search_locations
    for task, (source, split) in SOURCES.items():
        rows, answers[task] = make_rows(task, images)
        data = Dataset.from_list(rows)
        for column in {"image", "image_1", "image_2"} & set(data.column_names):
            data = data.cast_column(column, datasets.Image())
        data.to_parquet(folder / f"{task}.parquet")
        config = {
            "include": f"{package}/{source}/{task}.yaml",
            "task": task,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{task}.parquet")}},
            "process_docs": None,  # GQA's would download its images
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    return TaskManager(include_path=str(folder), include_defaults=False), answers


class Knowing(lmms):
    """Answers as it is told, by task."""

    is_simple = True

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests):
        return [self.answers[request.args[4]] for request in requests]

    def loglikelihood(self, requests): ...

    def generate_until_multi_round(self, requests): ...


def make_table(model, manager, folder):
    options = argparse.Namespace(output_path=str(folder / "submissions"), process_with_media=False)
    arguments = f"pretrained={TINY_CHECKPOINT},num_visual_tokens=16" if isinstance(model, str) else None
    results = evaluator.simple_evaluate(
        model, arguments, tasks=list(SOURCES), task_manager=manager, batch_size=4, cli_args=options
    )
    (folder / "16" / "model").mkdir(parents=True)
    path = folder / "16" / "model" / "20261127_000000_results.json"
    path.write_text(json.dumps({name: results.get(name, {}) for name in ("results", "throughput")}, default=str))
    return PAPER_TABLE["read_results"](folder)[16], results


def test_units_are_those_of_the_paper(local_tasks, tmp_path):
    manager, answers = local_tasks
    row, _ = make_table(Knowing(answers), manager, tmp_path)
    judged = {"LLaVA-Wild", "MM-Vet"}
    of_mme = {"MME-Perc": 200.0, "MME-Cog": 200.0}  # of each category
    assert row == {name: 100.0 for name in BENCHMARKS if name not in judged} | of_mme


def test_the_tasks_take_our_answers(local_tasks, tmp_path):
    row, results = make_table("mqt_llava", local_tasks[0], tmp_path)
    assert len(row) == len(BENCHMARKS) - 2 + 1 and 0 < row["TFLOP"] < 0.01
    assert results["throughput"]["avg_failed"] == 0
    for task in SOURCES:
        number = {sample["token_counts"][0]["visual_tokens"] for sample in results["samples"][task]}
        assert number == {32 if task == "mmmu_val" else 16}
        assert all(sample["filtered_resps"][0] for sample in results["samples"][task])
