"""`mqt-llava convert SRC DST`: checkpoints of the authors' code to ours, and back."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError
from .models import load_config, silence_libraries
from .options import Dtype


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a Hub repository, or query_abstractor.bin.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to create.")],
    layout: Annotated[
        str | None,
        typer.Option(help="Layout of SRC: full, stage-1, lora, parts or back. Default: detected from the files."),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO",
            help="Use this vision tower instead of the one that the checkpoint contains or names.",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO", help="The language model for stage-1 weights, or the base model of a LoRA folder."
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Data type of the converted weights. auto: that of the source.")
    ] = Dtype.auto,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of one weight file, for example 500MB.")
    ] = "5GB",
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Convert a LoRA folder to a PEFT adapter instead of merging it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare visual tokens and logits with those computed from the source.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at DST.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done without doing it.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is created.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    commit_message: Annotated[str, typer.Option(help="Message of the commit on the Hub.")] = "Upload MQT-LLaVA",
    license: Annotated[
        str | None,
        typer.Option(
            help="For the model card, for example apache-2.0. Default with --push-to-hub: that of the base model."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="REPO", help="For the model card: a training dataset. Can be repeated."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="For the model card. Can be repeated. Default: en.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Convert checkpoints from and to the layout of the authors' code.

    A language model and a --vision-tower become a new model, with a fresh query transformer.

    \b
    mqt-llava convert MQT-LLaVA-7b mqt-llava-7b-hf --verify
    mqt-llava convert query_abstractor.bin stage1-hf --base-model vicuna-7b --vision-tower clip-vit-large-patch14-336
    mqt-llava convert my-lora merged-hf --base-model MQT-LLaVA-7b
    mqt-llava convert vicuna-7b new-hf --vision-tower clip-vit-large-patch14-336
    mqt-llava convert mqt-llava-7b-hf MQT-LLaVA-7b-again
    """
    silence_libraries()
    import torch

    from ..conversion import VerificationError
    from ..conversion import convert as run
    from ..conversion.files import first
    from ..hub import check_base_is_on_hub, is_repository, license_of, push_folder, write_adapter_card, write_card

    if push_to_hub is not None and not is_repository(push_to_hub):
        raise UsageError(f"--push-to-hub takes the name of a repository, such as someone/model; got {push_to_hub!r}")

    def prepare(report):
        nonlocal license
        if push_to_hub is not None and keep_adapter and base_model is not None:
            check_base_is_on_hub(base_model)
        if push_to_hub is not None and license is None:
            license = license_of([name for name in report.base_models if is_repository(name)])
            if license is None:
                raise UsageError("no base model states a license; name that of the model with --license")
        report.files = sorted([*report.files, "README.md"])

    def finish(folder, report):
        origin = f"Converted from `{Path(source).name}` ({report.layout}) with `mqt-llava convert`."
        repo_id = push_to_hub or str(destination)
        if keep_adapter and base_model is not None:
            num_query_tokens = load_config(base_model).num_query_tokens
            write_adapter_card(folder, repo_id, num_query_tokens, license, dataset, language, origin)
        else:
            write_card(folder, repo_id, license, report.base_models, dataset, language, origin)

    try:
        with progress_bar() as progress:
            report = run(
                source,
                destination,
                layout=layout,
                vision_tower=vision_tower,
                base_model=base_model,
                dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
                max_shard_size=max_shard_size,
                keep_adapter=keep_adapter,
                verify=verify,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=progress,
                prepare=prepare,
                finish=finish,
            )
    except VerificationError as error:
        print_checks(error.checks, file=sys.stderr)
        raise UsageError(str(error)) from error
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        print_report(report, dry_run)
    if report.broken:
        print(f"Warning: NaN or infinity in {first(report.broken)}, as in the source", file=sys.stderr)
    if push_to_hub is not None:
        if dry_run:
            print(f"would push to {push_to_hub}: {', '.join(report.files)}", file=sys.stderr)
            return
        try:
            url = push_folder(destination, push_to_hub, private or None, revision, commit_message)
        except (ValueError, OSError) as error:
            raise UsageError(f"{destination} is converted, but cannot be pushed: {error}") from error
        print(f"pushed to {url}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar():
    """A bar on stderr for each phase of the work: `with progress_bar() as progress: progress(phase, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict = {}

    def update(phase: str, done: int, total: int):
        if phase not in tasks:
            bar.start()
            for task in tasks.values():
                bar.remove_task(task)
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    try:
        yield update
    finally:
        if tasks:
            bar.stop()


def print_report(report, dry_run: bool):
    lines = {
        "layout": report.layout,
        "vision tower": report.vision_source,
        "tensors": f"{report.tensors_in} in, {report.tensors_out} out, {report.renamed} renamed, {report.split} split",
        "weights": f"{report.nbytes / 1e9:.2f} GB, {', '.join(report.dtypes)}",
        "files": ", ".join(report.files),
        "time": "nothing was written" if dry_run else f"{report.seconds:.1f} s",
    }
    for name, value in lines.items():
        print(f"{name:<13} {value}")
    print_checks(report.checks)


def print_checks(checks, file=None):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not checks:
        return
    table = Table(box=box.SIMPLE)
    for name in ("check", "compared", "difference", "allowed", ""):
        table.add_column(name, justify="right" if name in ("difference", "allowed") else "left")
    for check in checks:
        allowed = f"{check.tolerance:.0e}" if check.tolerance else "0"
        verdict = "ok" if check.passed else "FAILED"
        table.add_row(check.name, check.amount, f"{check.difference:.2g}", allowed, verdict)
    Console(file=file or sys.stdout).print(table)
