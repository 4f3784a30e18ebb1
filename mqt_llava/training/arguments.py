"""What `mqt-llava train` is told: the paper's values for a stage, then a YAML file, then the command line."""

import difflib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments


CONFIGS = Path(__file__).parent / "configs"
STAGES = (1, 2)


@dataclass
class StageArguments:
    """What is trained on what. Optimisation is set by `TrainingArguments`."""

    stage: int = field(
        metadata={"help": "1: the query transformer alone; 2: and the language model.", "choices": STAGES}
    )
    model: str = field(metadata={"help": "The MQT-LLaVA checkpoint to start from: converted, or of an earlier stage."})
    data_path: list[str] = field(metadata={"help": "LLaVA conversations or chat messages: JSON or JSON Lines."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where the images are. Default: beside each data file."}
    )
    num_visual_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "How m is drawn for each step: even (2, 4, ..., M), uniform, log-uniform, fixed (M), a number, or "
            "numbers M,M,... Default: fixed in stage 1, even in stage 2."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples per step on all devices together: sets gradient_accumulation_steps, where that is not given."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sample in tokens. Default: as the model has positions."}
    )
    truncate: bool = field(default=False, metadata={"help": "Shorten longer samples at their last turns."})
    skip_broken: bool = field(
        default=False, metadata={"help": "Warn of broken samples and leave them out, instead of stopping."}
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Evaluate on this, after each epoch unless eval_strategy is given."}
    )
    eval_num_visual_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Numbers of visual tokens to evaluate at: M,M,... Default: 1, a quarter, all."},
    )
    distill_weight: float = field(
        default=0.0,
        metadata={"help": "Above 0: a second, smaller m in every step, which learns from the larger one."},
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Softens the answers that it learns from."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the weights in memory. With bf16, computing is in bfloat16 all the same.",
            "choices": ["float32", "bfloat16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (the default), eager, flash_attention_2, flex_attention."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})


class ArgumentParser(HfArgumentParser):
    """One that raises, instead of printing its usage and ending the process."""

    def error(self, message):
        raise ValueError(message)


def make_parser(*kinds) -> ArgumentParser:
    return ArgumentParser(
        kinds,
        prog="mqt-llava train",
        usage="%(prog)s --stage {1,2} --model DIR_OR_REPO --data_path FILE ... --output_dir DIR [options]",
        description="Train in the paper's two stages. Values given here go before those in --config FILE.yaml, and these "
        f"before the paper's, which are in {CONFIGS}/stage1.yaml and stage2.yaml.",
        epilog="All options of transformers' TrainingArguments are taken, too, such as --output_dir, --learning_rate, "
        "--num_train_epochs and --per_device_train_batch_size: --help-all shows them.",
        allow_abbrev=False,
    )


def help_text(everything: bool = False) -> str:
    """Our options; with `everything` those of `TrainingArguments` as well."""
    return make_parser(StageArguments, *([TrainingArguments] if everything else [])).format_help()


def parse_arguments(command_line=None) -> tuple[StageArguments, TrainingArguments]:
    """
    Read the arguments of a training run.

    The command line goes before `--config FILE.yaml`, and that before the paper's values for the stage, which are in
    `configs/stage1.yaml` and `configs/stage2.yaml`. Keys are the fields of [`StageArguments`] and of
    [`~transformers.TrainingArguments`].

    Args:
        command_line (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Raises:
        `ValueError`: for unknown keys, with the closest known one; for values of a wrong type; when something is missing;
        and when `global_batch_size` is no multiple of what all devices take at once.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--stage")
    chosen, command_line = first.parse_known_args(command_line)
    for word in command_line:
        if word.startswith("--") and word != "--help":
            _check_known(word.partition("=")[0], "the command line")
    config = read_config(chosen.config) if chosen.config else {}
    stage = chosen.stage or config.get("stage")

    parser = make_parser(StageArguments, TrainingArguments)
    parser.set_defaults(gradient_accumulation_steps=None)
    paper = CONFIGS / f"stage{stage}.yaml"
    layers = [
        *_as_options(read_config(paper) if paper.exists() else {}),
        *_as_options(config),
        *command_line,
        *_as_options({"stage": stage}),
    ]
    values, unknown = parser.parse_known_args(layers)
    if unknown:
        raise ValueError(f"The command line has words that belong to no argument: {' '.join(unknown)}.")
    values = vars(values)
    if values["gradient_accumulation_steps"] is None:
        values["gradient_accumulation_steps"] = accumulation_steps(
            values["global_batch_size"], values["per_device_train_batch_size"]
        )
    if values["eval_data_path"] and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    if values.get("activation_checkpointing", False) is None:  # the newer name; the older one warns
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    return parser.parse_dict(values)


def read_config(path) -> dict:
    """A YAML file of arguments.

    Raises:
        `ValueError`: when there is none, it holds something else, or a key is unknown.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(config).__name__}.")
    for key in config:
        _check_known(str(key), path)
    return config


def _check_known(key: str, source):
    known = [
        argument.name for kind in (StageArguments, TrainingArguments) for argument in fields(kind) if argument.init
    ]
    name = key.lstrip("-").replace("-", "_")
    if name not in known and name.removeprefix("no_") not in known:
        closest = "".join(f"; the closest one is {word}" for word in difflib.get_close_matches(name, known, 1))
        raise ValueError(f"{source}: there is no argument {key}{closest}.")


def _as_options(config: dict) -> list[str]:
    """As if they stood on the command line, so that `argparse` checks values of all sources alike."""
    options = []
    for key, value in config.items():
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def accumulation_steps(global_batch_size: int | None, per_device_train_batch_size: int) -> int:
    """How many batches make the global batch, on as many processes as torchrun or `accelerate launch` has started."""
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
