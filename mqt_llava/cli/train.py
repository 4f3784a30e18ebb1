"""`mqt-llava train` and `mqt-llava finetune`: the paper's two stages, and LoRA. Whatever ends a run is reported in one line."""

import contextlib
import os
import re
import shutil
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from ..training.arguments import LoraArguments, StageArguments, options_help, parse_arguments
from .errors import UsageError
from .models import EXTRAS, load_config, load_costs, load_processor


ARGUMENT_NAMES = {  # of the Python names that are not those of the options
    "distribution": "num_visual_tokens",
    "lora_alpha": "alpha",
    "modules_to_save": "targets",
    "r": "rank",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rslora",
}


def train(context: typer.Context):
    """Train in the two stages of the paper.

    The command line takes precedence over --config FILE.yaml, and that over the paper's hyperparameters. On several GPUs: accelerate launch
    -m mqt_llava.cli train ...

    \b
    mqt-llava train --stage 1 --model start --data-path captions.json --output-dir stage1
    mqt-llava train --stage 2 --model stage1 --data-path conversations.json --image-folder images --output-dir stage2
    """
    run(context, StageArguments)


def finetune(context: typer.Context):
    """Fine-tune a LoRA adapter on conversations about images.

    A new m is drawn at every step. The command line takes precedence over --config FILE.yaml. On several GPUs: accelerate launch -m mqt_llava.cli finetune ...

    \b
    mqt-llava finetune data.json --image-folder images --output-dir adapter
    mqt-llava finetune data.jsonl --output-dir adapter --targets language_model,query_transformer -r 32 --bf16
    mqt-llava finetune data.json --output-dir adapter --num-visual-tokens 1,4,16,64 --load-in-4bit
    mqt-llava finetune data.json --output-dir adapter --push-to-hub ORG/REPO
    """
    run(context, LoraArguments)


def run(context: typer.Context, kind):
    for option in ("-h", "--help", "--help-all"):
        if option in context.args:
            print(context.get_help(), options_help(kind, everything=option == "--help-all"), sep="\n\n", end="")
            return
    with reporting():
        from ..training.train import train

        arguments, training = parse_arguments(context.args, kind)
    config = load_config(arguments.model)
    load_processor(arguments.model)
    with reporting(training.output_dir):
        check_memory(arguments, training, config)
        trainer = train(arguments, training)
    if trainer.is_world_process_zero():
        print(f"The {'adapter' if kind is LoraArguments else 'model'} is in {training.output_dir}")


@contextlib.contextmanager
def reporting(output_dir=None):
    """
    Report in one line whatever ends a run, with options in place of Python arguments.

    Raises:
        `UsageError`: for mistakes, and for a full disk.
    """
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # libraries warn of each other
                warnings.simplefilter("ignore", FutureWarning)
            yield
    except UsageError:
        raise
    except KeyboardInterrupt:
        if output_dir is not None and any(Path(output_dir).glob("checkpoint-*/trainer_state.json")):
            message = "Interrupted. The same command with --resume continues from the last checkpoint."
        else:
            message = "Interrupted before the first checkpoint."
        print(f"\n{message}", file=sys.stderr)
        raise
    except ImportError as error:
        if error.name is None:  # in the words of a library
            raise UsageError(str(error)) from None
        extra = EXTRAS.get(error.name.partition(".")[0], "train")
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[{extra}]'") from None
    except (ValueError, FloatingPointError, OSError) as error:
        raise UsageError(as_options(str(error))) from None
    except Exception as error:
        if output_dir is None or not is_full(output_dir):
            raise
        # torch and safetensors raise errors of their own
        raise UsageError(f"cannot write to {output_dir}: no space left on the disk ({type(error).__name__})") from None


def as_options(message: str) -> str:
    """A message with options in place of the Python arguments that it names."""
    from transformers import TrainingArguments

    kinds = (StageArguments, LoraArguments, TrainingArguments)
    names = {argument.name: argument.name for kind in kinds for argument in fields(kind)} | ARGUMENT_NAMES

    def option(match):
        return f"--{names[match[1]].replace('_', '-')}" if match[1] in names else match[0]

    return re.sub(r"`(\w+)(?:=True)?`", option, message)


def check_memory(arguments, training, config):
    """
    Refuse a training that cannot fit on its device, before weights are read. Nothing is checked where weights may be distributed over
    devices or offloaded: with several processes, FSDP or DeepSpeed.

    Raises:
        `ValueError`: as [`~mqt_llava.placement.check_training`], with options that need less memory.
    """
    from ..placement import check_training
    from ..training.train import weights_dtype

    environment = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    distributed = (
        training.world_size > 1 or training.fsdp or training.deepspeed or any(map(os.environ.get, environment))
    )
    costs = load_costs(config)
    if distributed or costs is None:
        return
    if isinstance(arguments, LoraArguments):
        trained: dict[str, Any] = {"num_bits": 4 if arguments.load_in_4bit else None}
        less = "--bf16, --load-in-4bit"
    else:
        parts = ("query_transformer", "embeddings", "language_model", "lm_head")
        num_moments = 2 if training.optim in ("adamw_torch", "adamw_torch_fused") else 0
        trained = {"parts": parts[:1] if arguments.stage == 1 else parts, "num_moments": num_moments}
        less = "--dtype bfloat16"
    try:
        check_training(costs, training.device, weights_dtype(arguments, training), **trained)
    except ValueError as error:
        raise ValueError(f"{error}. Less is needed with {less}") from None


def is_full(folder) -> bool:
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free < 2**20
