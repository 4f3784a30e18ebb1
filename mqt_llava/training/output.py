"""The folder of a training run: fresh, gone on with, or replaced on purpose."""

import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def prepare_output_dir(output_dir, resume=False, overwrite=False) -> str | None:
    """
    See to it that a run does not mix with another in the same folder.

    Args:
        output_dir (`str` or `Path`): it need not exist.
        resume (`bool`): go on from the last checkpoint in it.
        overwrite (`bool`): results in it will be overwritten, and its checkpoints by [`remove_checkpoints`].

    Returns:
        `str` or `None`: the checkpoint to resume from.

    Raises:
        `ValueError`: when it holds another run and neither is asked for, and when there is no checkpoint to resume from.
    """
    output_dir = Path(output_dir)
    if resume and overwrite:
        raise ValueError("`resume` and `overwrite` exclude each other.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; a folder is needed.")
    if resume:
        whole = [
            path.parent for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        ]  # written last
        if not whole:
            raise ValueError(f"{output_dir} holds no checkpoint to resume from.")
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))
    found = sorted(path.name for path in output_dir.glob("*")) if output_dir.is_dir() else []
    if found and not overwrite:
        raise ValueError(
            f"{output_dir} is not empty, it holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}: go on with that "
            "run (`resume`), replace it (`overwrite`), or choose another folder."
        )
    return None


def remove_checkpoints(output_dir):
    """Remove the checkpoints of an earlier run, when all is ready for the one that replaces it."""
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name):
            shutil.rmtree(path)
