"""`mqt-llava cost`: what an answer costs at each number of visual tokens. No weights are loaded."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .errors import UsageError, requiring
from .models import find_file, load_config, loading, name_checkpoint, resolve_device, silence_libraries
from .options import Dtype, check_num_visual_tokens, parse_num_visual_tokens


PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def parse_amount(text: str) -> float:
    """`2.5T`, `16GB`, `16GiB`, `800 GFLOP` or `2e12` as a number."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+) ?([kKMGTP]i|[kKMGTP]?)(FLOPs?|B)?", text.strip())
    if match is None:
        raise UsageError(
            f"an amount is a number with or without k, M, G, T, such as 2.5T, 16GB or 16GiB; got {text!r}"
        )
    if match[2].endswith("i"):
        return float(match[1]) * 1024 ** ("KMGTP".index(match[2][0].upper()) + 1)
    return float(match[1]) * PREFIXES[match[2].replace("K", "k")]


def cost(
    model: options.Model = None,
    num_visual_tokens: Annotated[
        str | None, typer.Option(metavar="M,M,...", help="Numbers of visual tokens per image, one row each.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Text tokens of a prompt.")] = 40,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a prompt.")] = 1,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of an answer.")] = 1,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per batch.")] = 1,
    device: Annotated[str, typer.Option(help="Device to measure: auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    flops: Annotated[
        float | None,
        typer.Option(metavar="AMOUNT", parser=parse_amount, help="Maximum FLOPs of the batch, such as 2.5T."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="BYTES", parser=parse_amount, help="Maximum memory, such as 16GB or 16GiB."),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Maximum time to the last token.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot accuracy against compute, if the checkpoint has an accuracy.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
):
    """Estimate the compute, memory and time of an answer.

    The table has a row for each number of visual tokens m. Compute and memory follow from the checkpoint's config. Times are predicted from them and from the speed of the device, which is
    measured now: linear layers and memory reads. With --flops, --memory or --latency, the largest m
    within these limits is shown.

    \b
    mqt-llava cost --new-tokens 100
    mqt-llava cost --model DIR --num-visual-tokens 1,16,256 --batch-size 8 --device cuda
    mqt-llava cost --model DIR --flops 2.5T --memory 16GB
    """
    sizes = [] if num_visual_tokens is None else [parse_num_visual_tokens(m) for m in num_visual_tokens.split(",")]
    silence_libraries()
    checkpoint = name_checkpoint(model)
    config = load_config(checkpoint)
    accuracy = load_accuracy(checkpoint)
    if plot is not None and accuracy is None:
        raise UsageError(f"no accuracy to draw: the model {checkpoint} carries no readable accuracy.json")
    num_query_tokens = config.num_query_tokens
    powers = [2**i for i in range(num_query_tokens.bit_length()) if 2**i < num_query_tokens]
    sizes = [check_num_visual_tokens(m, num_query_tokens) for m in sizes or accuracy or [*powers, num_query_tokens]]

    from ..cost import CostModel, measure_device
    from ..placement import choose_dtype

    measured = resolve_device(device)
    with loading(checkpoint):
        costs = CostModel(config)
    request: dict[str, Any] = {"num_text_tokens": text_tokens, "num_images": images}
    request |= {"batch_size": batch_size, "num_new_tokens": new_tokens}
    chosen = dtype.value if dtype is not Dtype.auto else str(choose_dtype(costs, measured, **request))
    request["dtype"] = chosen.removeprefix("torch.")
    speed = measure_device(measured, request["dtype"])
    budgets = {"flops": flops, "memory_bytes": memory, "latency_s": latency}
    budgets = {name: budget for name, budget in budgets.items() if budget is not None}
    fitting = None
    if budgets:
        try:
            fitting = costs.num_visual_tokens_for(**budgets, speed=speed, **request)
        except ValueError as error:
            raise UsageError(str(error)) from None
        sizes = sorted({*sizes, fitting})
    rows = [describe(costs(m, **request), speed, (accuracy or {}).get(m)) for m in sizes]

    if as_json:
        result = {"model": checkpoint, "device": str(measured), **request, **vars(speed), **budgets}
        print(json.dumps(result | {"largest_num_visual_tokens": fitting, "costs": rows}))
    else:
        print_table(rows, full_flops=costs(num_query_tokens, **request).flops, fitting=fitting)
        print(
            f"Prompts: {batch_size} of {text_tokens} text tokens and {images} image{'s' * (images > 1)}. Answers of "
            f"{new_tokens} token{'s' * (new_tokens > 1)}. {request['dtype']} on {measured}.\nTimes are predicted "
            f"from layers of a 7B model, measured now at up to {speed.flops_per_second / 1e12:.3g} TFLOP/s and "
            f"{speed.bytes_per_second / 1e9:.3g} GB/s;\nsmall models take longer than their share."
        )
        if fitting is not None:
            print(f"Largest number of visual tokens within the budget: {fitting}")
    if plot is not None:
        draw(rows, plot, Path(checkpoint).name)


def load_accuracy(checkpoint: str) -> dict[int, dict[str, float]] | None:
    """The checkpoint's accuracy.json: percentages of right answers by kind of question, for each m that was evaluated."""
    try:
        table = json.loads(find_file(checkpoint, "accuracy.json").read_text())
        # other rows, such as `64, blank picture`, are controls
        return {int(m): row for m, row in table.items() if m.isdecimal()} or None
    except (OSError, ValueError, AttributeError):
        return None


def describe(cost, speed, accuracy: dict[str, float] | None) -> dict:
    """One row of the table."""
    return {
        "num_visual_tokens": cost.num_visual_tokens,
        "num_prompt_tokens": cost.num_prompt_tokens,
        "flops": cost.flops,
        "prefill_flops": cost.prefill_flops,
        "decode_flops_per_step": cost.decode_flops,
        "weight_bytes": cost.weight_bytes,
        "kv_cache_bytes": cost.kv_cache_bytes,
        "activation_bytes": cost.activation_bytes,
        "memory_bytes": cost.memory_bytes,
        "time_to_first_token": cost.time_to_first_token(speed),
        "time_per_step": cost.time_per_token(speed),
        "latency": cost.latency(speed),
        "accuracy": accuracy,
    }


def with_prefix(number: float, unit: str) -> str:
    """Three digits with an SI prefix: `1.74 TFLOP`."""
    prefix = max((p for p, size in PREFIXES.items() if number >= size), key=PREFIXES.__getitem__, default="")
    return f"{number / PREFIXES[prefix]:.3g} {prefix}{unit}"


def print_table(rows: list[dict], full_flops: int, fitting: int | None):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)  # fits 80 columns
    headers = ["m", "compute", "of M", "vision", "memory", "cache", "first\ntoken", "per\ntoken"]
    with_accuracy = any(row["accuracy"] for row in rows)
    for header in headers + ["accuracy"] * with_accuracy:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            str(row["num_visual_tokens"]),
            with_prefix(row["flops"], "FLOP"),
            f"{row['flops'] / full_flops:.0%}",
            f"{row['prefill_flops']['vision_tower'] / row['flops']:.0%}",
            with_prefix(row["memory_bytes"], "B"),
            with_prefix(row["kv_cache_bytes"], "B"),
            *(
                f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
                for seconds in (row["time_to_first_token"], row["time_per_step"])
            ),
        ]
        if with_accuracy:
            values = row["accuracy"] or {}
            cells.append(f"{values.get('all', sum(values.values()) / len(values)):.1f}" if values else "")
        table.add_row(*cells, style="bold" if row["num_visual_tokens"] == fitting else None)
    Console(file=sys.stdout).print(table)


def draw(rows: list[dict], path: Path, name: str):
    """Plot accuracy against the compute of an answer, with m at the points."""
    with requiring("plot"):
        import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((row for row in rows if row["accuracy"]), key=lambda row: row["flops"])
    if not rows:
        raise UsageError("no accuracy to draw: accuracy.json has none of these numbers of visual tokens")
    exponent = max(e for e in range(0, 16, 3) if rows[-1]["flops"] >= 10**e)
    unit = next(p for p, size in PREFIXES.items() if size == 10**exponent)
    compute = [row["flops"] / 10**exponent for row in rows]
    names = list(rows[0]["accuracy"])
    groups = [group for group in ("coarse", "all", "fine-grained") if group in names]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind in groups or names:
        values = [row["accuracy"].get(kind) for row in rows]
        axes.plot(compute, values, marker="o", linewidth=2.5 if kind == "all" else 1.5, label=kind)
    lowest = [min(row["accuracy"][kind] for kind in groups or names) for row in rows]
    for x, y, row in zip(compute, lowest, rows):
        label = f"m = {row['num_visual_tokens']}" if row is rows[0] else str(row["num_visual_tokens"])
        axes.annotate(label, (x, y), xytext=(7, -11), textcoords="offset points", fontsize=9)
    axes.set(xlabel=f"compute of an answer, {unit}FLOP", ylabel="accuracy, %")
    axes.margins(x=0.08, y=0.1)
    axes.set_ylim(top=101 if max(axes.get_ylim()) > 100 else None)
    axes.set_title(f"{name}: accuracy against compute, by visual tokens m", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw to {path}: {error}") from None
    print(f"drawn to {path}", file=sys.stderr)
