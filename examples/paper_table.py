"""Lay lmms-eval's results beside the paper's figures.

    python examples/paper_table.py results

Reads the newest `results/M/*/*_results.json` for each number M of visual tokens, and the paper's figures from `paper_table.csv`, which
names their source and is empty where none was found. Each cell is ours / the paper's. Also written to `results/table.md`.
"""

import argparse
import csv
import json
from pathlib import Path


# benchmark: tasks of lmms-eval, their metric, and what makes the paper's unit of it
BENCHMARKS = {
    "VQAv2": (("vqav2_val",), "exact_match", 100),
    "GQA": (("gqa",), "exact_match", 100),
    "VizWiz": (("vizwiz_vqa_val",), "exact_match", 100),
    "SQA-IMG": (("scienceqa_img",), "exact_match", 100),
    "POPE": (("pope",), "pope_f1_score", 100),
    "MME-Perc": (("mme",), "mme_perception_score", 1),
    "MME-Cog": (("mme",), "mme_cognition_score", 1),
    "MMBench": (("mmbench_en_dev_static", "mmbench_en_dev"), "gpt_eval_score", 1),
    "MMMU": (("mmmu_val",), "mmmu_acc", 100),
    "LLaVA-Wild": (("llava_in_the_wild",), "gpt_eval_llava_all", 1),
    "MM-Vet": (("mmvet_llava", "mmvet"), "gpt_eval_score", 1),
}


def read_results(folder: Path) -> dict[int, dict]:
    """`{m: {benchmark: figure, "TFLOP": ...}}`."""
    table = {}
    for path in sorted(folder.glob("*/*/*_results.json"), key=lambda path: path.name):  # they begin with their date
        if not path.parents[1].name.isdecimal():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        row = table.setdefault(int(path.parents[1].name), {})
        for benchmark, (tasks, metric, scale) in BENCHMARKS.items():
            for task in tasks:
                figure = results["results"].get(task, {}).get(f"{metric},none")
                if isinstance(figure, (int, float)):
                    row[benchmark] = scale * figure
        if "avg_gflops" in results.get("throughput", {}):
            row["TFLOP"] = results["throughput"]["avg_gflops"] / 1000
    return table


def read_paper(path: Path) -> dict[int, dict]:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {int(row["num_visual_tokens"]): {name: row[name] for name in BENCHMARKS if row[name]} for row in rows}


def markdown(ours: dict[int, dict], paper: dict[int, dict]) -> str:
    lines = [f"| m | {' | '.join(BENCHMARKS)} | TFLOP per answer |", "| ---: |" + " ---: |" * (len(BENCHMARKS) + 1)]
    for m in sorted(ours.keys() | paper.keys()):
        row, theirs = ours.get(m, {}), paper.get(m, {})
        cells = []
        for name in BENCHMARKS:
            figure = f"{row[name]:.1f}" if name in row else "-"
            cells.append(f"{figure} / {theirs.get(name, '-')}" if name in row or name in theirs else "")
        cells.append(f"{row['TFLOP']:.2f}" if "TFLOP" in row else "")
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--paper", type=Path, default=Path(__file__).with_name("paper_table.csv"))
    arguments = parser.parse_args()
    ours = read_results(arguments.folder)
    if not ours:
        parser.error(f"there are no results in {arguments.folder}: nothing like 16/MODEL/..._results.json")
    table = markdown(ours, read_paper(arguments.paper))
    (arguments.folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
