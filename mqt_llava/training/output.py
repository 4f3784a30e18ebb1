"""The output folder of a training run: new, resumed, or replaced on request."""

import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def prepare_output_dir(output_dir, resume=False, overwrite=False) -> str | None:
    """
    Refuse a folder that holds another run.

    Args:
        output_dir (`str` or `Path`): the folder, which need not exist.
        resume (`bool`): resume from the last checkpoint in it.
        overwrite (`bool`): accept a folder with another run, whose checkpoints [`remove_checkpoints`] removes.

    Returns:
        `str` or `None`: the checkpoint to resume from.

    Raises:
        `ValueError`: if the folder holds another run and both are `False`, and if there is no checkpoint to resume from.
    """
    output_dir = Path(output_dir)
    if resume and overwrite:
        raise ValueError("`resume` and `overwrite` are mutually exclusive.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; a folder is needed.")
    if resume:
        complete = [
            path.parent for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        ]  # written last
        if not complete:
            raise ValueError(f"{output_dir} holds no checkpoint to resume from.")
        return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2])))
    found = sorted(path.name for path in output_dir.glob("*")) if output_dir.is_dir() else []
    if found and not overwrite:
        raise ValueError(
            f"{output_dir} is not empty, it holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}: continue that "
            "run (`resume`), replace it (`overwrite`), or choose another folder."
        )
    return None


def remove_checkpoints(output_dir):
    """Remove the checkpoints of an earlier run. Call it when the run that replaces it is ready to start."""
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name):
            shutil.rmtree(path)
