"""What the two commands that train have in common: whatever ends a run is said in one line."""

import contextlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from .errors import UsageError
from .models import load_costs


OPTIONS = {  # what Python calls an option of `finetune`
    "r": "--rank",
    "lora_alpha": "--alpha",
    "use_rslora": "--rslora",
    "use_dora": "--dora",
    "target_modules": "--targets",
    "modules_to_save": "--targets",
    "targets": "--targets",
    "distribution": "--num-visual-tokens",
    "num_visual_tokens": "--num-visual-tokens",
    "max_length": "--max-length",
    "truncate": "--truncate",
    "resume": "--resume",
    "overwrite": "--overwrite",
    "per_device_train_batch_size": "--batch-size",
}


def as_options(message: str, options: dict[str, str]) -> str:
    """A message with options in place of the Python arguments that it names."""
    return re.sub(r"`(\w+)(?:=True)?`", lambda match: options.get(match[1], match[0]), message)


@contextlib.contextmanager
def running(output_dir, options: dict[str, str]):
    """A run of training in `output_dir`.

    Args:
        options (`dict[str, str]`): what the command calls the Python arguments.

    Raises:
        `UsageError`: for what the user can mend: mistakes, and a full disk.
    """
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # of libraries about each other
                warnings.simplefilter("ignore", FutureWarning)
            yield
    except UsageError:
        raise
    except KeyboardInterrupt:
        if any(Path(output_dir).glob("checkpoint-*/trainer_state.json")):
            print("\nInterrupted. The same command with --resume goes on from the last checkpoint.", file=sys.stderr)
        else:
            print("\nInterrupted before the first checkpoint.", file=sys.stderr)
        raise
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        raise UsageError(as_options(str(error), options)) from None
    except Exception as error:
        if not is_full(output_dir):
            raise
        # torch and safetensors have errors of their own for it
        raise UsageError(f"cannot write to {output_dir}: no space left on the disk ({type(error).__name__})") from None


def check_memory(training, checkpoint: str, config, dtype, less: str, **trained):
    """
    Refuse a training that cannot fit on its device, before weights are read. Where weights may be shared out or lie elsewhere,
    on several devices, by FSDP or DeepSpeed, nothing is checked.

    Args:
        training (`TrainingArguments`), dtype (`torch.dtype`): of the weights.
        less (`str`): the options with which less is needed. trained: as [`check_training`] takes it.

    Raises:
        `ValueError`: as [`check_training`].
    """
    from ..placement import check_training

    shared = (
        training.fsdp,
        training.deepspeed,
        os.environ.get("ACCELERATE_USE_FSDP"),
        os.environ.get("ACCELERATE_USE_DEEPSPEED"),
    )
    costs = load_costs(checkpoint, config)
    if training.world_size > 1 or any(shared) or costs is None:
        return
    try:
        check_training(costs, training.device, dtype, **trained)
    except ValueError as error:
        raise ValueError(f"{error}. Less is needed with {less}") from None


def is_full(folder) -> bool:
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free < 2**20
