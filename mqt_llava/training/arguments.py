"""Arguments of `mqt-llava train` and `mqt-llava finetune`.

The command line takes precedence over `--config FILE.yaml`, and that over our defaults in `configs/`: the paper's values for each stage,
and those for LoRA. Names may be spelled with dashes or underscores. transformers is imported to parse arguments, but not for `--help`.
"""

# ruff: noqa: RUF009  (`option` returns a field)

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import TINY_CHECKPOINT


CONFIGS = Path(__file__).parent / "configs"
STAGES = (1, 2)
SHORT_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "eval_data": "eval_data_path",
    "lr": "learning_rate",
    "num_workers": "dataloader_num_workers",
}
POSITIVE = "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate".split()
POSITIVE += "save_steps logging_steps max_length rank alpha".split()
BOOLEANS = "yes true t y 1 no false f n 0".split()


def option(help: str, default=None, metavar=None, **metadata):
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help, "metavar": metavar, **metadata})


@dataclass(kw_only=True)
class DataArguments:
    """Data, visual tokens and loading, for all kinds of training. Optimization is set by `TrainingArguments`."""

    model: str = option("Checkpoint to start from: a folder or a Hub repository.", MISSING, "DIR_OR_REPO")
    data_path: list[str] = option("LLaVA conversations or chat messages, as JSON or JSON Lines.", MISSING, "FILE")
    image_folder: str | None = option("Folder of the images. Default: that of each data file.", None, "DIR")
    num_visual_tokens: list[str] | None = option(
        "Distribution of m, drawn at each step: even (2, 4, ..., M), uniform, log-uniform, fixed (M), a number, or numbers M,M,... "
        "Default: even, and fixed in stage 1.",
        metavar="DISTRIBUTION",
    )
    max_length: int | None = option("Maximum length of a sample in tokens. Default: the language model's.", None, "N")
    truncate: bool = option("Drop the last turns of longer samples.", False)
    skip_broken: bool = option("Skip broken samples with a warning. Default: stop.", False)
    eval_data_path: list[str] | None = option("Data to evaluate on, by default after each epoch.", None, "FILE")
    eval_num_visual_tokens: list[str] | None = option(
        "Numbers of visual tokens to evaluate at. Default: 1, a quarter of M, and M.", None, "M,M,..."
    )
    global_batch_size: int | None = option("Samples per step on all devices, by gradient accumulation.", None, "N")
    distill_weight: float = option("Weight of self-distillation from m to a smaller m at each step.", 0.0, "W")
    distill_temperature: float = option("Temperature of that distillation.", 1.0, "T")
    dtype: str | None = option(
        "Data type of the weights in memory. Default: float32, and bfloat16 for LoRA with --bf16 or --load-in-4bit.",
        choices=["float32", "bfloat16"],
    )
    attn_implementation: str | None = option("sdpa (the default), eager, flash_attention_2 ...", None, "NAME")
    resume: bool = option("Resume from the last checkpoint in --output-dir.", False)
    overwrite: bool = option("Replace the run in --output-dir.", False)


@dataclass(kw_only=True)
class StageArguments(DataArguments):
    """Arguments of `mqt-llava train`: [`DataArguments`] and the stage."""

    stage: int = option("1: train the query transformer. 2: train the language model, too.", MISSING, choices=STAGES)


@dataclass(kw_only=True)
class LoraArguments(DataArguments):
    """Arguments of `mqt-llava finetune`: [`DataArguments`] and LoRA."""

    model: str = option(
        "Checkpoint: a folder or a Hub repository. Default: the shipped one.", TINY_CHECKPOINT, "DIR_OR_REPO"
    )
    targets: list[str] = option(
        "Parts to tune: language_model, query_transformer (LoRA) or query_transformer_full (all of its weights), "
        "vision_tower. Default: language_model.",
        ["language_model"],
        "NAME,...",
    )
    rank: int = option("Rank of LoRA.", 16, "R")
    alpha: float = option("Scale of LoRA.", 32.0, "ALPHA")
    dropout: float = option("Dropout of LoRA.", 0.05, "P")
    rslora: bool = option("Scale by alpha / sqrt(rank) (rsLoRA).", False)
    dora: bool = option("Tune magnitudes and directions separately (DoRA).", False)
    load_in_4bit: bool = option("QLoRA: load the language model in 4 bits (needs bitsandbytes).", False)


@dataclass
class MostUsed:
    """The `TrainingArguments` that `--help` shows."""

    output_dir: str = option("Folder for checkpoints and the result.", None, "DIR")
    num_train_epochs: float = option("Passes over the data.", None, "N")
    max_steps: int = option("Optimizer steps, instead of epochs.", None, "N")
    per_device_train_batch_size: int = option("Samples per device and batch.", None, "N")
    learning_rate: float = option("Peak learning rate.", None, "LR")
    dataloader_num_workers: int = option("Processes that prepare batches.", None, "N")
    bf16: bool = option("Compute in bfloat16.", False)
    use_cpu: bool = option("Do not use GPUs.", False)
    gradient_checkpointing: bool = option("Save memory at the cost of compute.", False)
    seed: int = option("Seed of the weights, of the order of samples and of m.", None, "N")
    save_steps: int = option("Save a checkpoint every N steps.", None, "N")
    logging_steps: int = option("Log every N steps.", None, "N")
    report_to: str = option("none, tensorboard, wandb ...", None, "NAME")


def short_names(kind) -> dict[str, str]:
    lora = {"r": "rank", "push_to_hub": "hub_model_id"}  # an adapter is pushed once, after training
    return SHORT_NAMES | (lora if kind is LoraArguments else {})


def options_help(kind, everything: bool = False) -> str:
    """Help for the options of a command; with `everything` all of `TrainingArguments` as well."""
    own_first = sorted(fields(kind), key=lambda argument: argument.name not in kind.__annotations__)
    groups: dict[str, Sequence[Field]] = {"Options": own_first}
    if everything:
        from transformers import TrainingArguments

        groups["Options of transformers' TrainingArguments"] = fields(TrainingArguments)
    else:
        title = "The most used options of transformers' TrainingArguments (all are accepted: --help-all shows them)"
        groups[title] = fields(MostUsed)
    defaults = _read_yaml(CONFIGS / "lora.yaml") if kind is LoraArguments else {}
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    for title, arguments in groups.items():
        group = parser.add_argument_group(title)
        for argument in arguments:
            names = [argument.name, *(short for short, name in short_names(kind).items() if name == argument.name)]
            spellings = [f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}" for name in names]
            help, default = argument.metadata["help"], defaults.get(argument.name, argument.default)
            if default not in (None, False, MISSING, "") and "Default:" not in help:
                help += f" (default: {default})"
            if default is False:
                group.add_argument(*spellings, action="store_true", help=help)
            else:
                settings: dict[str, Any] = {name: argument.metadata.get(name) for name in ("metavar", "choices")}
                group.add_argument(*spellings, **settings, help=help)
    return parser.format_help()


def parse_arguments(command_line=None, kind=StageArguments):
    """
    Read the arguments of a training run.

    Args:
        command_line (`list[str]`, *optional*): defaults to `sys.argv[1:]`.
        kind (`type`, *optional*, defaults to [`StageArguments`]): or [`LoraArguments`], for which words that belong to no option
            are data files.

    Returns:
        `tuple` of `kind` and [`~transformers.TrainingArguments`].

    Raises:
        `ValueError`: for unknown arguments, with the closest known one; for values of a wrong type or out of range; if something is
            missing; and if `global_batch_size` is not a multiple of what all devices take at once.
    """
    from transformers import HfArgumentParser, TrainingArguments

    kinds: Any = (kind, TrainingArguments)
    parser = HfArgumentParser(kinds, add_help=False, allow_abbrev=False)
    parser.set_defaults(gradient_accumulation_steps=None, per_device_eval_batch_size=None)
    parser.error = _raise_error  # type: ignore[method-assign]  # else it ends the process
    flags = {
        argument.name
        for arguments in parser.dataclass_types
        for argument in fields(arguments)
        if argument.type in (bool, bool | None)
    }
    given = _read_words(sys.argv[1:] if command_line is None else command_line, kind, flags)
    config = read_config(" ".join(given.pop("config")) or "--config", kind) if "config" in given else {}
    stage = next(iter(given.get("stage", [])), config.get("stage"))
    path = CONFIGS / ("lora.yaml" if kind is LoraArguments else f"stage{stage}.yaml")
    defaults = read_config(path, kind) if path.exists() else {}
    namespace, unknown = parser.parse_known_args(_as_options(defaults | config | given))
    if unknown:
        raise ValueError(f"The command line has words that belong to no argument: {' '.join(unknown)}.")
    values = vars(namespace)
    _check(values)
    batch_size = values["per_device_train_batch_size"]
    if values["gradient_accumulation_steps"] is None:
        values["gradient_accumulation_steps"] = accumulation_steps(values["global_batch_size"], batch_size)
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = batch_size
    if "targets" in values:
        values["targets"] = [target.strip() for target in ",".join(values["targets"]).split(",")]
    if values["eval_data_path"] and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    if values.get("activation_checkpointing", False) is None:  # the newer name; the older one warns
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    return parser.parse_dict(values)


def read_config(path, kind=StageArguments) -> dict:
    """A YAML file of arguments, without those that are empty.

    Raises:
        `ValueError`: if it cannot be read, is not a mapping, or has an unknown key.
    """
    config = _read_yaml(path)
    return {_known(str(key), kind, path): value for key, value in config.items() if value is not None}


def _read_yaml(path) -> dict:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(config).__name__}.")
    return config


def _read_words(words, kind, flags: set[str]) -> dict[str, list[str]]:
    """Group the words of a command line by option. `finetune` takes one word per option; other words are data files."""
    options, name, others = {}, None, []
    for word in map(str, words):
        if re.match(r"-+[a-zA-Z]", word):
            name, has_value, value = word.partition("=")
            name = _known(name, kind, "the command line")
            options[name] = [value] if has_value else []
            continue
        takes_one = kind is LoraArguments and name != "data_path"
        if name is None or (takes_one and (options[name] or (name in flags and word.lower() not in BOOLEANS))):
            others.append(word)
        else:
            options[name].append(word)
    if others and kind is not LoraArguments:
        raise ValueError(f"The command line has words that belong to no argument: {' '.join(others)}.")
    if others:
        options["data_path"] = others + options.get("data_path", [])
    return options


def _known(key: str, kind, source) -> str:
    """The name of an argument, in any spelling.

    Raises:
        `ValueError`: if there is no such argument. The message names the closest one.
    """
    from transformers import TrainingArguments

    known = [argument.name for of in (kind, TrainingArguments) for argument in fields(of) if argument.init]
    short, name = short_names(kind), key.lstrip("-").replace("-", "_")
    name = short.get(name, name)
    if name in known or name.removeprefix("no_") in known or key == "--config":
        return name
    closest = "".join(difflib.get_close_matches(name, [*known, *short], 1))
    if closest and key.startswith("-"):
        closest = f"--{closest.replace('_', '-')}"
    hint = f"; the closest one is {closest}" if closest else ""
    raise ValueError(f"{source}: there is no argument {key}{hint}.")


def _as_options(arguments: dict) -> list[str]:
    """Convert arguments to command-line words, so that `argparse` checks values from all sources."""
    options = []
    for key, value in arguments.items():
        if isinstance(value, list) and len(value) != 1:
            options += [f"--{key}", *map(str, value)]
        else:
            value = value[0] if isinstance(value, list) else value
            options.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _raise_error(message: str):
    """Replaces `ArgumentParser.error`, which would exit. argparse names both spellings of an option; keep one."""
    raise ValueError(re.sub(r"--\w+/(--[\w-]+)", r"\1", message))


def _check(values: dict):
    for name in POSITIVE:
        value = values.get(name)
        if value is not None and not value > 0 and (name, value) != ("max_steps", -1):
            raise ValueError(f"`{name}` must be above 0; got {value}.")
    if not 0 <= values.get("dropout", 0) < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1; got {values['dropout']}.")
    if values["eval_num_visual_tokens"] and not values["eval_data_path"]:
        raise ValueError("`eval_num_visual_tokens` needs `eval_data_path`.")


def accumulation_steps(global_batch_size: int | None, per_device_train_batch_size: int) -> int:
    """The number of gradient accumulation steps for a global batch size and the number of processes.

    Raises:
        `ValueError`: if `global_batch_size` is not a multiple of the batch size of all processes together.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    at_once = per_device_train_batch_size * num_processes
    if global_batch_size is None:
        return 1
    if global_batch_size < at_once or global_batch_size % at_once:
        raise ValueError(
            f"`global_batch_size` must be a multiple of `per_device_train_batch_size` times the number of processes, "
            f"{per_device_train_batch_size} x {num_processes}; got {global_batch_size}."
        )
    return global_batch_size // at_once
