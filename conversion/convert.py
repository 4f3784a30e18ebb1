"""Convert a checkpoint: recognise its layout, plan, write to a temporary folder, verify, move into place."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import layouts, to_authors
from .files import cast, check_free, check_space, counted, fetch, new_folder, parse_size, read_json
from .names import AUTHORS_PACKED
from .verify import Check, VerificationError, broken_tensors, check_verifiable


LAYOUTS = {
    "full": "full checkpoints",
    "stage-1": "stage-1 weights",
    "lora": "LoRA folders",
    "parts": "language models",
    "back": "checkpoints of ours",
}


@dataclass
class Report:
    """A report of a conversion, or of what it would do with `dry_run`.

    Args:
        layout (`str`): a description of the source.
        vision_source (`str`): a description of where the vision tower comes from.
        tensors_in, tensors_out (`int`): number of tensors that are read and written.
        renamed (`int`): number of tensors that get another name.
        split (`int`): number of packed q/k/v tensors that are split, or merged when converting back.
        dtypes (`list[str]`): dtypes of the tensors that are written.
        nbytes (`int`): size of the weights that are written, in bytes.
        files (`list[str]`): names of the files that are written.
        base_models (`list[str]`): folders and repositories that the result is made of.
        checks (`list[Check]`): the comparisons, if `verify` was set.
        broken (`list[str]`): tensors in which NaN or infinity was found, see [`broken_tensors`].
        seconds (`float`): duration of the conversion.
    """

    layout: str
    vision_source: str
    tensors_in: int
    tensors_out: int
    renamed: int
    split: int
    dtypes: list[str]
    nbytes: int
    files: list[str]
    base_models: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0


def recognise(source: Path) -> str:
    """The layout of `source`, one of `LAYOUTS`."""
    if layouts.find_stage1(source):
        return "stage-1"
    if (source / "adapter_config.json").exists():
        return "lora"
    if not (source / "config.json").exists():
        raise ValueError(
            f"{source} has no known layout: it has none of config.json, adapter_config.json and {layouts.STAGE1_FILES[0]}"
        )
    model_type = str(read_json(source / "config.json").get("model_type"))
    return "full" if model_type.startswith("llava_") else "back" if model_type == "mqt_llava" else "parts"


def convert(
    source: str,
    destination: str | Path,
    layout: str | None = None,
    vision_tower: str | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    keep_adapter: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress=None,
    prepare=None,
    finish=None,
) -> Report:
    """Convert `source` and write the result to the folder `destination`.

    Args:
        source (`str`): A folder or a Hub repository; for stage-1 weights also the file itself.
        destination (`str` or `Path`): A new or empty folder.
        layout (`str`, *optional*): One of `LAYOUTS`. By default, it is recognised from the files.
        vision_tower (`str`, *optional*): A folder or a Hub repository. Defaults to the tower in the source, or the one named there.
        base_model (`str`, *optional*): The language model of stage-1 weights; the base model of a LoRA folder; with `keep_adapter`,
            the converted MQT-LLaVA checkpoint that the adapter is for.
        dtype (`torch.dtype`, *optional*): Dtype of the weights that are written. Defaults to that of the source.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): As for `save_pretrained`.
        keep_adapter (`bool`, *optional*): Write a PEFT adapter instead of merging a LoRA folder.
        verify (`bool`, *optional*): Compare the result with the source before it is moved to `destination`.
        overwrite (`bool`, *optional*): Replace a checkpoint in `destination`.
        dry_run (`bool`, *optional*): Check everything that can be checked without writing anything.
        progress (`Callable[[str, int, int], None]`, *optional*): Called with "converting" or "verifying", the bytes read so far and
            the bytes in total.
        prepare (`Callable[[Report], None]`, *optional*): Called before anything is written, with `dry_run` too.
        finish (`Callable[[Path, Report], None]`, *optional*): Called with the complete folder before it is moved. Neither is called
            when converting back to the authors' layout.

    Raises:
        `ValueError`: for a source that cannot be converted, and a destination that is not free.
        `VerificationError`: a `ValueError`, if the result differs from its source. As with every error, `destination` is unchanged.
    """
    start = time.perf_counter()
    destination = Path(destination)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    check_free(destination, overwrite)
    max_shard_size = parse_size(max_shard_size)
    path = Path(source) if Path(source).is_file() else fetch(source)
    used: str | Path | None
    for used in (path, vision_tower, base_model):
        if used and Path(used).exists() and Path(used).resolve().is_relative_to(destination.resolve()):
            raise ValueError(f"{destination} is or contains the source {used}; choose another folder")
    layout = layout or recognise(path)
    for option, given, allowed in (
        ("--keep-adapter", keep_adapter, ("lora",)),
        ("--base-model", base_model, ("stage-1", "lora")),
        ("--vision-tower", vision_tower, ("full", "stage-1", "lora", "parts")),
    ):
        if given and layout not in allowed:
            names = " and ".join(LAYOUTS[name] for name in allowed)
            raise ValueError(f"{option} is for {names}; the layout here is {layout!r}")
    if keep_adapter and vision_tower:
        raise ValueError(
            "--keep-adapter uses the vision tower of the MQT-LLaVA checkpoint, so --vision-tower cannot be set"
        )

    plan: layouts.Plan
    if layout == "full":
        plan = layouts.plan_full(path, vision_tower)
    elif layout == "stage-1":
        plan = layouts.plan_stage1(path, vision_tower, base_model)
    elif keep_adapter:
        plan = layouts.plan_adapter(path, base_model)
    elif layout == "lora":
        plan = layouts.plan_lora(path, vision_tower, base_model)
    elif layout == "parts":
        plan = layouts.plan_parts(source, vision_tower)
    else:
        plan = to_authors.plan(path, destination)
        prepare = finish = None
    plan.tensors = cast(plan.tensors, dtype)
    if verify and plan.settings is not None:
        check_verifiable(plan.config, plan.settings)

    theirs = plan.tensors if layout == "back" else plan.sources
    packed = sum(name.startswith(AUTHORS_PACKED) for name in theirs)
    report = Report(
        layout=plan.layout,
        vision_source=plan.vision_source,
        tensors_in=len(plan.sources),
        tensors_out=len(plan.tensors),
        renamed=len(theirs) - packed - ("lm_head.weight" in theirs),
        split=packed,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in plan.tensors.values()}),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors.values()),
        files=sorted(plan.file_names(max_shard_size)),
        base_models=plan.base_models,
    )
    check_space(destination, report.nbytes)
    if prepare is not None:
        prepare(report)
    if not dry_run:
        with new_folder(destination, overwrite) as folder:
            counted_plan(plan, progress, "converting").write(folder, max_shard_size)
            report.broken = broken_tensors(folder)
            if verify:
                report.checks = counted_plan(plan, progress, "verifying").verify(folder, dtype)
                if not all(check.passed for check in report.checks):
                    raise VerificationError(report.checks, plan.sources)
            if finish is not None:
                finish(folder, report)
            report.files = sorted(path.name for path in folder.iterdir())
    report.seconds = time.perf_counter() - start
    return report


def counted_plan(plan: layouts.Plan, progress, phase: str) -> layouts.Plan:
    """The same plan with tensors that report the bytes read to `progress`."""
    if progress is None:
        return plan
    # each tensor is read once to be written; verifying reads the sources too
    total = sum(tensor.nbytes for tensor in plan.tensors.values()) * (1 if phase == "converting" else 2)
    done = 0

    def report_bytes(nbytes):
        nonlocal done
        done = min(done + nbytes, total)
        progress(phase, done, total)

    return replace(plan, tensors=counted(plan.tensors, report_bytes), sources=counted(plan.sources, report_bytes))
