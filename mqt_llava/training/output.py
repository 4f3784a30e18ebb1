"""The folder of a training run: fresh, gone on with, or replaced on purpose."""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


def prepare_output_dir(output_dir, resume=False, overwrite=False) -> str | None:
    """
    See to it that a run does not mix with another in the same folder.

    Args:
        output_dir (`str` or `Path`): it need not exist.
        resume (`bool`): go on from the last checkpoint in it.
        overwrite (`bool`): remove its checkpoints. Results in it will be overwritten.

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
        checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"{output_dir} holds no checkpoint to resume from.")
        return checkpoint
    found = sorted(path.name for path in output_dir.glob("*")) if output_dir.is_dir() else []
    if found and not overwrite:
        raise ValueError(
            f"{output_dir} is not empty, it holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}: resume that run, "
            "overwrite it, or choose another folder."
        )
    for name in found:
        if name.startswith(PREFIX_CHECKPOINT_DIR):
            shutil.rmtree(output_dir / name)
    return None
