"""Convert a checkpoint: recognise its layout, plan, write aside, verify, move into place."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

from .. import modeling
from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from . import back, full, lora, parts, stage1
from .authors import make_generation_config
from .files import (
    cast,
    check_free,
    check_space,
    fetch,
    main_dtype,
    new_folder,
    parse_size,
    read_json,
    read_tensors,
    save,
    weight_file_names,
    write_shards,
)
from .plan import Plan
from .verify import (
    Check,
    broken_tensors,
    check_verifiable,
    require,
    verify_adapter,
    verify_back,
    verify_plan,
    verify_tensors,
)


LAYOUTS = ("full", "stage-1", "lora", "parts", "back")
FOLDER_FILES = (  # beside the weights
    *sorted(path.name for path in Path(modeling.__file__).parent.glob("*_mqt_llava.py")),
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass
class Report:
    """What a conversion did, or with `dry_run` would do.

    Args:
        split (`int`): packed q/k/v tensors that were taken apart, or put together on the way back.
        nbytes (`int`): of the weights that were written.
        base_models (`list[str]`): folders and repositories that the result is made of.
        broken (`list[str]`): tensors in which NaN or infinity was seen, see [`broken_tensors`].
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
    """The layout of what is in `source`, one of `LAYOUTS`."""
    for name, module in (("stage-1", stage1), ("lora", lora), ("full", full), ("back", back)):
        if module.recognise(source):
            return name
    if (source / "config.json").exists():
        return "parts"
    raise ValueError(
        f"{source} is in no known layout: it has none of config.json, adapter_config.json and {stage1.FILES[0]}"
    )


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
        layout (`str`, *optional*): One of `LAYOUTS`. Recognised from the files where it is not given.
        vision_tower (`str`, *optional*): A folder or a Hub repository, to take instead of what the source says.
        base_model (`str`, *optional*): The language model of stage-1 weights; the base of a LoRA folder; with
            `keep_adapter` the MQT-LLaVA checkpoint, converted already, that the adapter will go on.
        dtype (`torch.dtype`, *optional*): Of the weights that are written. As they are stored where it is not given.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): As for `save_pretrained`.
        keep_adapter (`bool`, *optional*): Write a PEFT adapter instead of merging a LoRA folder.
        verify (`bool`, *optional*): Compare the result with the source before it is moved to `destination`.
        progress (`Callable[[str, int, int], None]`, *optional*): Is told "converting" and the bytes that were written, then
            with `verify` "verifying" and the tensors that were read, each time with how many there will be.
        prepare (`Callable[[Report], None]`, *optional*): Is called before anything is written, with `dry_run` too.
        finish (`Callable[[Path, Report], None]`, *optional*): Is called when the folder is whole, before it is moved.

    Raises:
        `ValueError`: for a source that cannot be converted and a destination that is not free.
        `VerificationError`: a `ValueError`, where the result differs from its source.
        Nothing is left at `destination` then, and what was there stays.
    """
    start = time.perf_counter()
    destination = Path(destination)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    check_free(destination, overwrite)
    max_shard_size = parse_size(max_shard_size)
    source_path = Path(source) if Path(source).is_file() else fetch(source)
    for path in filter(None, (source_path, vision_tower, base_model)):
        if Path(path).exists() and Path(path).resolve().is_relative_to(destination.resolve()):
            raise ValueError(f"{destination} is or holds the source {path}; choose another folder")
    layout = layout or recognise(source_path)
    arguments = {"vision_tower": vision_tower, "base_model": base_model}
    if keep_adapter and layout != "lora":
        raise ValueError(f"--keep-adapter is for LoRA folders; this is the layout {layout!r}")
    if vision_tower is not None and (keep_adapter or layout == "back"):
        raise ValueError("the vision tower is that of the MQT-LLaVA checkpoint; --vision-tower has no use here")
    if base_model is not None and layout in ("parts", "back"):
        raise ValueError(f"--base-model is for stage-1 weights and LoRA folders; this is the layout {layout!r}")

    if keep_adapter:
        return _keep_adapter(
            source_path, destination, base_model, verify, overwrite, dry_run, progress, prepare, finish, start
        )
    if layout == "back":
        return _convert_back(
            source_path, destination, dtype, max_shard_size, verify, overwrite, dry_run, progress, start
        )
    if layout == "parts":
        plan = parts.plan(source, vision_tower)
    else:
        plan = {"full": full, "stage-1": stage1, "lora": lora}[layout].plan(source_path, **arguments)
    plan.tensors = cast(plan.tensors, dtype)
    plan.check()
    if verify and plan.parts is None:
        check_verifiable(plan.config, plan.source_config)
    report = _report(plan, max_shard_size)
    check_space(destination, report.nbytes)
    if prepare is not None:
        prepare(report)
    if not dry_run:
        with new_folder(destination, overwrite) as folder:
            _write(plan, folder, max_shard_size, _counter(progress, "converting", report.nbytes))
            report.broken = broken_tensors(folder)
            if verify:
                report.checks = verify_plan(
                    plan, folder, dtype, _counter(progress, "verifying", 3 * len(plan.tensors))
                )
                require(report.checks, plan.source_tensors or plan.tensors)
            if finish is not None:
                finish(folder, report)
            report.files = sorted(path.name for path in folder.iterdir())
    report.seconds = time.perf_counter() - start
    return report


def _report(plan: Plan, max_shard_size) -> Report:
    sources = plan.source_tensors or {}
    kept = len(plan.tensors.keys() & (sources.keys() or {"lm_head.weight"}))
    packed = sum(name.rsplit("_", 1)[0].endswith("attn.in_proj") for name in sources)
    return Report(
        layout=plan.layout,
        vision_source=plan.vision_source,
        tensors_in=len(sources) or len(plan.tensors) - plan.num_fresh,
        tensors_out=len(plan.tensors),
        renamed=len(plan.tensors) - plan.num_fresh - kept - 3 * packed,
        split=packed,
        dtypes=_dtypes(plan.tensors),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors.values()),
        files=sorted([*weight_file_names(plan.tensors, max_shard_size), *FOLDER_FILES, *plan.extra_files]),
        base_models=plan.base_models,
    )


def _dtypes(tensors) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})


def _counter(progress, phase: str, total: int):
    """A function that is told what was done, and hands on how much is done."""
    done = 0

    def count(more):
        nonlocal done
        done += more
        if progress is not None:
            progress(phase, min(done, total), total)

    return count


def _write(plan: Plan, folder: Path, max_shard_size, progress):
    """Everything that a checkpoint folder has; the weights first, which are the most likely to fail."""
    write_shards(folder, plan.tensors, max_shard_size, progress)
    for name, path in plan.extra_files.items():
        shutil.copyfile(path, folder / name)
    model = plan.empty_model()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = main_dtype(plan.tensors)
    custom_object_save(model, folder)
    model.config.save_pretrained(folder)
    make_generation_config(plan.config, plan.processor.tokenizer).save_pretrained(folder)
    save(plan.processor, folder)


def _convert_back(source, destination, dtype, max_shard_size, verify, overwrite, dry_run, progress, start) -> Report:
    ours = read_tensors(source)
    plan = back.plan(source, ours, dtype)
    if verify:
        check_verifiable(plan.config, plan.config.text_config.to_dict())
    tensors = plan.language | plan.vision
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    check_space(destination, nbytes)
    packed = sum(name.rsplit("_", 1)[0].endswith("attn.in_proj") for name in tensors)
    report = Report(
        layout="MQT-LLaVA, to the authors' layout",
        # their loader takes a path as it is, from wherever it runs
        vision_source=f"the checkpoint itself, into {destination.absolute() / 'vision_tower'}; config.json has this path, as "
        "mm_vision_tower, for the authors' loader: edit it when the folder moves",
        tensors_in=len(ours),
        tensors_out=len(tensors),
        renamed=len(tensors) - len(ours.keys() & tensors.keys()) - packed,
        split=packed,
        dtypes=_dtypes(tensors),
        nbytes=nbytes,
        files=sorted([*weight_file_names(plan.language, max_shard_size), *back.file_names(source)]),
    )
    if not dry_run:
        with new_folder(destination, overwrite) as folder:
            back.write(plan, folder, destination, max_shard_size, _counter(progress, "converting", nbytes))
            if verify:
                again = full.plan(folder, str(folder / "vision_tower"))
                again.check()
                whole = back.whole_tower(ours, plan.config)
                expected, found = (back.without_image_row(part, plan.config) for part in (whole, again.tensors))
                tick = _counter(progress, "verifying", 3 * len(expected))
                report.checks = [
                    verify_tensors(expected, found, dtype, tick),
                    *verify_back(again, source, dtype, tick),
                ]
                require(report.checks, ours)
            report.files = sorted(path.name for path in folder.iterdir())
    report.seconds = time.perf_counter() - start
    return report


def _keep_adapter(
    source, destination, base_model, verify, overwrite, dry_run, progress, prepare, finish, start
) -> Report:
    base = None if base_model is None else fetch(base_model)
    if base is None or read_json(base / "config.json").get("model_type") != "mqt_llava":
        raise ValueError(
            "--keep-adapter needs --base-model: the MQT-LLaVA checkpoint, converted already, it will go on"
        )
    pairs, others = lora.adapter_tensors(source)
    if verify:
        config = MQTLlavaConfig.from_pretrained(base)
        check_verifiable(config, config.text_config.to_dict())
    halves = {f"{module}.lora_{part}": half for module, pair in pairs.items() for part, half in zip("AB", pair)}
    tensors = list((halves | others).values())
    report = Report(
        layout="LoRA folder, kept as a PEFT adapter",
        vision_source=base_model,
        tensors_in=len(tensors),
        tensors_out=len(tensors),
        renamed=len(tensors),
        split=0,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        files=["adapter_config.json", "adapter_model.safetensors"],
        base_models=[base_model],
    )
    if prepare is not None:
        prepare(report)
    if not dry_run:
        with new_folder(destination, overwrite) as folder:
            lora.write_adapter(source, folder, base_model)
            if verify:
                of_base = read_tensors(base)
                tick = _counter(progress, "verifying", 2 * len(of_base))
                report.checks = verify_adapter(base, source, folder, tick)
                require(report.checks, of_base | halves | others)
            if finish is not None:
                finish(folder, report)
            report.files = sorted(path.name for path in folder.iterdir())
    report.seconds = time.perf_counter() - start
    return report
