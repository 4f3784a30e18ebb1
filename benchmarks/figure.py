"""The figure of the generation benchmark. It is drawn again from a table that was measured before by

python -m benchmarks.figure docs/benchmarks/generation_cpu.csv
"""

import csv
import sys
from pathlib import Path


PARTS = ("vision", "connector", "merge", "prefill")  # of the time to the first token


def draw(rows: list[dict], setting: str, path: Path):
    """Time to first token by number of visual tokens, what it is made of, and where LLaVA's time by FLOPs would be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    least_text = min(row["text"] for row in rows)
    rows = [row for row in rows if "glue" in row and row["way"] == rows[0]["way"] and row["text"] == least_text]
    batch_sizes = sorted({row["batch"] for row in rows})
    figure, panels = plt.subplots(1, len(batch_sizes), figsize=(max(5 * len(batch_sizes), 8.5), 4.6), squeeze=False)
    for axes, batch_size in zip(panels[0], batch_sizes):
        shown = [row for row in rows if row["batch"] == batch_size]
        labels = [f"{row['m']:g}" + ("\nLLaVA" if row is shown[0] else "") for row in shown]
        bottom = [0.0] * len(shown)
        for i, part in enumerate((*PARTS, "glue")):
            heights = [max(row["glue"] * row["first token"], 0) if part == "glue" else row[part] for row in shown]
            axes.bar(labels, heights, bottom=bottom, label=part, color=f"C{i}", width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights)]
        by_flops = [shown[0]["first token"] / row["FLOP ratio"] for row in shown]
        axes.plot(labels, by_flops, "k_", markersize=22, markeredgewidth=2, label="LLaVA's time, by FLOPs")
        tops = [max(row["first token"], *others) for row, *others in zip(shown, bottom, by_flops)]
        for label, row, top in zip(labels, shown, tops):
            axes.annotate(f"{row['speed-up']:.1f}x", (label, top), (0, 4), textcoords="offset points", ha="center")
        axes.set(title=f"batch of {batch_size:g}", xlabel="visual tokens per image", ylabel="time to first token, s")
        axes.set_ylim(top=1.1 * max(tops))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 0.03), fontsize=9)
    figure.suptitle("Time to first token: MQT-LLaVA against LLaVA-1.5 with the same parts", fontsize=12)
    figure.text(0.01, 0.01, setting, fontsize=5.5, color="gray")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)


def read_csv(path: Path) -> list[dict]:
    """The rows that `benchmarks.measure.write_csv` wrote, without what was not measured."""
    words = ("model", "way")
    with path.open(newline="") as file:
        return [
            {name: value if name in words else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        setting = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n")[0]
        draw(read_csv(path), setting, path.with_suffix(".png"))
