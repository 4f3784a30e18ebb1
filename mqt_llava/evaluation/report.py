"""Report accuracy against the number of visual tokens, compute and time."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np


DRAWS = 2000


@dataclass
class Row:
    """Results for one m: accuracy in %, its difference from the most accurate m in points, both with a 95 % bootstrap interval over
    questions, the mean GFLOP per answer, and the median of its seconds, which the first batch, slower than all others, does not
    change."""

    num_visual_tokens: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    by_category: dict[str, float]
    gflops: float | None
    seconds: float


def summarize(results: list[dict], costs=None) -> list[Row]:
    """
    Args:
        results (`list[dict]`): rows of `results.jsonl`, with the same numbers of visual tokens for each question.
        costs (`CostModel`, *optional*): the model's.
    """
    sizes = sorted({result["num_visual_tokens"] for result in results})
    ids = list(dict.fromkeys(result["id"] for result in results))
    index = {name: i for i, name in enumerate(ids)}
    scores = np.zeros((len(sizes), len(ids)))
    for result in results:
        scores[sizes.index(result["num_visual_tokens"]), index[result["id"]]] = 100 * result["score"]
    categories = {result["id"]: result.get("category") for result in results}
    names = [name for name in dict.fromkeys(categories.values()) if name not in (None, "", "all")]  # "all" are all
    rng = np.random.default_rng(0)
    # One draw at a time, as how often it has each question: all of them would take gigabytes with the questions of VQAv2
    draws = (np.bincount(rng.integers(len(ids), size=len(ids)), minlength=len(ids)) for _ in range(DRAWS))
    means = np.stack([scores @ draw / len(ids) for draw in draws], axis=1)
    best = int(scores.mean(1).argmax())
    rows = []
    for i, m in enumerate(sizes):
        of_m = [result for result in results if result["num_visual_tokens"] == m]
        by_category = {
            name: float(scores[i, [index[one] for one in ids if categories[one] == name]].mean()) for name in names
        }
        answered = [result for result in of_m if not result.get("error")]
        gflops = None if costs is None else _mean_flops(costs, m, answered) / 1e9
        low, high = np.quantile(means[i], [0.025, 0.975])
        lowest, highest = np.quantile(means[i] - means[best], [0.025, 0.975])
        if (
            np.ptp(scores[i]) == 0
        ):  # then samples do not vary. Wilson's interval: n of n may mean a share of n / (n + 1.96²)
            unseen = 100 * (1 - len(ids) / (len(ids) + 1.96**2))
            low, high = max(0.0, low - unseen), min(100.0, high + unseen)
        rows.append(
            Row(
                m,
                float(scores[i].mean()),
                (float(low), float(high)),
                float((scores[i] - scores[best]).mean()),
                (float(lowest), float(highest)),
                by_category,
                gflops,
                float(np.median([result["seconds"] for result in answered or of_m])),
            )
        )
    return rows


def _mean_flops(costs, m: int, answered: list[dict]) -> float:
    names = ("num_images", "num_text_tokens", "num_new_tokens")
    counts = Counter(tuple(result[name] for name in names) for result in answered)  # many answers have the same cost
    flops = [
        number * costs(m, num_images=images, num_text_tokens=text, num_new_tokens=max(1, new)).flops
        for (images, text, new), number in counts.items()
    ]
    return sum(flops) / len(answered) if answered else float("nan")


def enough(rows: list[Row], tolerance: float | None = None) -> Row:
    """The smallest m that is not significantly worse than the best; or, with a tolerance in points, the smallest m whose 95 %
    interval of the difference lies within it."""
    if tolerance is None:
        return next(row for row in rows if row.difference_interval[1] >= 0)
    return next(row for row in rows if row.difference_interval[0] >= -tolerance)


def sentence(rows: list[Row], tolerance: float | None = None) -> str:
    row, best = enough(rows, tolerance), max(rows, key=lambda row: row.accuracy)
    if row is best:
        low, high = row.interval
        said = f"m = {row.num_visual_tokens} is right in {row.accuracy:.1f} %, 95 % interval {low:.1f} to {high:.1f}"
        if len(rows) > 1:
            said += "; no other m is right more often"
        if row is not rows[0] and tolerance is None:
            said += "; every smaller m is significantly worse"
        elif row is not rows[0]:
            said += f"; no smaller m is shown to be within {tolerance:g} points of it"
        return f"{said}."
    within = "not significantly worse than" if tolerance is None else f"within {tolerance:g} points of"
    low, high = row.difference_interval
    return (
        f"m = {row.num_visual_tokens} is the smallest that is {within} the best, m = {best.num_visual_tokens}: {row.accuracy:.1f} against "
        f"{best.accuracy:.1f} %, a difference of {row.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} (more questions "
        "narrow it)."
    )


def markdown(rows: list[Row]) -> str:
    names = list(rows[0].by_category)
    titles = [" ".join(name.replace("|", "\\|").split()) for name in names]
    header = ["m", "accuracy, %", "95 % interval", "against the best", *titles, "GFLOP", "ms"]
    lines = [f"| {' | '.join(header)} |", "| ---: |" + " ---: |" * (len(header) - 1)]
    for row in rows:
        cells = [row.num_visual_tokens, f"{row.accuracy:.1f}", "{:.1f} to {:.1f}".format(*row.interval)]
        cells += [f"{row.difference:+.1f} ({row.difference_interval[0]:+.1f} to {row.difference_interval[1]:+.1f})"]
        cells += [f"{row.by_category[name]:.1f}" for name in names]
        cells += ["" if row.gflops is None else f"{row.gflops:.2f}", f"{1000 * row.seconds:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def figure(rows: list[Row], path: Path):
    """Plot accuracy against m, compute and time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_of: list[tuple[str, list]] = [("visual tokens per image (m)", [row.num_visual_tokens for row in rows])]
    if all(row.gflops is not None for row in rows):
        axes_of.append(("GFLOP per answer", [row.gflops for row in rows]))
    axes_of.append(("seconds per answer, in batches", [row.seconds for row in rows]))
    panels = plt.subplots(1, len(axes_of), figsize=(4 * len(axes_of), 3.6), layout="constrained", sharey=True)[1]
    accuracy = [row.accuracy for row in rows]
    errors = np.abs(np.array([row.interval for row in rows]).T - accuracy)
    for axes, (label, values) in zip(panels, axes_of):
        axes.errorbar(values, accuracy, errors, marker="o", capsize=3, linewidth=2)
        for row, x in zip(rows, values):
            axes.annotate(
                str(row.num_visual_tokens), (x, row.accuracy), xytext=(5, -11), textcoords="offset points", fontsize=8
            )
        axes.set(xlabel=label)
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy, %")
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(axes_of[0][1], axes_of[0][1])
    plt.savefig(path, dpi=150)
    plt.close()


def accuracy_json(rows: list[Row]) -> dict:
    """The content of accuracy.json for model cards and `mqt-llava cost`: `{m: {category: %, ..., "all": %}}`."""
    return {str(row.num_visual_tokens): {**row.by_category, "all": row.accuracy} for row in rows}


def write_eval_results(rows: list[Row], folder: Path, dataset_id: str, task_id: str, metric: str):
    """Write one file per m to `.eval_results`, the Hub's format for evaluation results, with m in the notes."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    folder = folder / ".eval_results"
    folder.mkdir(exist_ok=True)
    for row in rows:
        notes = f"num_visual_tokens={row.num_visual_tokens}, {metric}"
        entry = EvalResultEntry(dataset_id=dataset_id, task_id=task_id, value=round(row.accuracy, 2), notes=notes)
        name = f"{dataset_id.replace('/', '--')}_{task_id}_{row.num_visual_tokens}_visual_tokens.yaml"
        (folder / name).write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def read_results(path: Path) -> list[dict]:
    """
    The rows of `results.jsonl`, without an incomplete last line.

    Raises:
        `ValueError`: for a damaged file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    rows = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    if not all(isinstance(row, dict) and {"id", "num_visual_tokens", "score"} <= row.keys() for row in rows):
        raise ValueError("it has lines that are no results")
    return rows


def write_results(results: list[dict], path: Path):
    """Write `results.jsonl` to a temporary file and move it into place."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    partial.replace(path)
