"""Writing a checkpoint folder: shard by shard, aside, and moved into place when it is whole."""

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .files import SAFETENSORS_DTYPES, LazyTensor


CHUNK_BYTES = 16 * 2**20
MARK = "mqt-llava-convert.lock"  # in the folders that a run makes for itself
WEIGHT_FILES = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin")
CHECKPOINT_FILES = (  # what `convert` and `save_pretrained` write
    "config.json",
    "*_config.json",
    "*.index.json",
    "tokenizer.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "accuracy.json",
    "chat_template.*",
    "*_mqt_llava.py",
    "README.md",
    *WEIGHT_FILES,
)
WRITERS = min(4, os.cpu_count() or 1)  # tensors that are written, and in memory, at a time


@contextlib.contextmanager
def new_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `destination` when the block ends well; else nothing is left of it.

    It is made in a folder of its own beside `destination`. What a killed run left behind is removed by the next one.

    Raises:
        `ValueError`: see [`check_free`].
    """
    destination = Path(os.path.realpath(destination))  # a link stays where it is
    _clean_up(destination)
    check_free(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=destination.parent))
    try:
        with open(aside / MARK, "w") as mark:
            _lock(mark)
            (aside / "new").mkdir()
            yield aside / "new"
            check_free(destination, overwrite)  # of others, meanwhile
            if destination.exists():
                destination.replace(aside / "old")
            (aside / "new").replace(destination)
    finally:
        _remove(aside, destination)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.convert-"


def _clean_up(destination: Path):
    """Remove what killed runs left: folders with our mark, which no run has locked."""
    for mark in destination.parent.glob(f"{glob.escape(_prefix(destination))}*/{MARK}"):
        with open(mark) as file:
            if _lock(file):
                _remove(mark.parent, destination)


def _remove(aside: Path, destination: Path):
    if (aside / "old").exists() and not destination.exists():  # stopped between the two renames
        (aside / "old").replace(destination)
    shutil.rmtree(aside, ignore_errors=True)


def _lock(file) -> bool:
    """Hold a file until this process ends or closes it. Without locks, as on Windows, nobody's is taken for ours to remove."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def check_free(destination: Path, overwrite: bool):
    """
    Raises:
        `ValueError`: where `destination` is a file or holds something. With `overwrite` it may be a checkpoint, and hold
            nothing but what makes one.
    """
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; what is written is a folder")
    found = sorted(path.name for path in destination.iterdir()) if destination.is_dir() else []
    if not found:
        return
    if not overwrite:
        raise ValueError(f"{destination} is not empty; choose another folder or pass --overwrite")
    others = foreign_files(destination)
    if others:
        more = ", ..." * (len(others) > 3)
        raise ValueError(
            f"--overwrite replaces nothing but a checkpoint, and {destination} holds {', '.join(others[:3])}{more}; choose "
            "another folder"
        )


def foreign_files(folder: Path) -> list[str]:
    """What is in a folder beside a checkpoint; all that is in it where that is none."""
    found = sorted(path.name for path in folder.iterdir())
    tower = folder / "vision_tower"  # where `convert` writes that of a checkpoint for the authors' code
    if tower.is_dir() and (others := foreign_files(tower)):
        return [f"vision_tower/{name}" for name in others]
    others = [name for name in found if name != tower.name and not fits(name, CHECKPOINT_FILES)]
    is_checkpoint = any(fits(name, ("config.json", "adapter_config.json")) for name in found)
    return others if is_checkpoint and any(fits(name, WEIGHT_FILES) for name in found) else found


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def parse_size(size: int | str) -> int:
    """`500MB` or `5GiB` in bytes."""
    match = re.fullmatch(r"(\d+\.?\d*) ?(?:([KMGT])(i?))?B?", str(size), re.IGNORECASE)
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if nbytes < 1:
        raise ValueError(f"--max-shard-size takes a size such as 500MB or 5GiB; got {size!r}")
    return nbytes


def check_space(folder: Path, nbytes: int):
    """Refuse before any work what cannot fit."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ValueError(f"the converted weights take {nbytes / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB left")


def plan_shards(tensors: dict[str, LazyTensor], max_shard_size: int | str):
    """Which tensor goes to which file: a `StateDictSplit` of huggingface_hub."""
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def weight_file_names(tensors: dict[str, LazyTensor], max_shard_size: int | str) -> list[str]:
    """The files that [`write_shards`] makes."""
    split = plan_shards(tensors, max_shard_size)
    return [*split.filename_to_tensors, *(["model.safetensors.index.json"] if split.is_sharded else [])]


def write_shards(folder: Path, tensors: dict[str, LazyTensor], max_shard_size: int | str, progress=None):
    """Write `tensors` as safetensors. No more than `WRITERS` of them are in memory at a time.

    Args:
        progress (`Callable[[int], None]`, *optional*): is told the bytes of each tensor that was written.
    """
    split = plan_shards(tensors, max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        write_safetensors(folder / filename, {name: tensors[name] for name in names}, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: dict[str, LazyTensor], progress=None):
    """Write one safetensors file, a few tensors at a time.

    `safetensors.torch.save_file` wants all tensors in memory, and passes the bytes through it that only change their file:
    those the kernel copies here.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # wide types first, as that library orders them: each tensor begins at a multiple of its item's size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    begin_of_data = 8 + len(head)

    def write(name):
        tensor = tensors[name]
        with open(path, "r+b", buffering=0) as file:
            file.seek(begin_of_data + header[name]["data_offsets"][0])
            if tensor.stored is not None:
                copy_bytes(*tensor.stored, tensor.nbytes, file)
            else:
                values = tensor.load()
                if (tuple(values.shape), values.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(f"{name} was announced as {tensor.shape}; its file holds {tuple(values.shape)}")
                write_all(file, values.contiguous().flatten().view(torch.uint8).numpy())
        return tensor.nbytes

    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with ThreadPoolExecutor(WRITERS) as pool:
        try:
            for written in as_completed([pool.submit(write, name) for name in tensors]):
                nbytes = written.result()
                if progress is not None:
                    progress(nbytes)
        except BaseException:  # the first error, or Ctrl-C, ends it
            pool.shutdown(cancel_futures=True)
            raise
    path.chmod(0o644)


def copy_bytes(source: Path, offset: int, count: int, file):
    """Copy a part of a file into another, in the kernel where it can do so."""
    with open(source, "rb", buffering=0) as stored:
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # between file systems, or on one that cannot; a full disk shows below
                while count and (copied := os.copy_file_range(stored.fileno(), file.fileno(), count, offset)):
                    offset, count = offset + copied, count - copied
        stored.seek(offset)
        while count:
            chunk = stored.read(min(count, CHUNK_BYTES))
            if not chunk:
                raise ValueError(f"{source} ends before its tensors do")
            write_all(file, chunk)
            count -= len(chunk)


def write_all(file, content):
    """Write all bytes: an unbuffered file may take a part at a time."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save(tokenizer, folder: Path):
    """`save_pretrained` of a tokenizer or processor."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"cannot write the tokenizer: {error}") from error  # the Rust library's, of a full disk


def cast(tensors: dict[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """All floating point tensors in `dtype`; as they are where it is `None`."""
    if dtype is None:
        return tensors
    return {
        name: tensor.map(lambda values: values.to(dtype), dtype=dtype)
        if tensor.dtype.is_floating_point and tensor.dtype != dtype
        else tensor
        for name, tensor in tensors.items()
    }


def main_dtype(tensors: dict[str, LazyTensor]) -> torch.dtype:
    """What most of the weights are; `from_pretrained(dtype="auto")` goes by it."""
    sizes = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=sizes.get)
