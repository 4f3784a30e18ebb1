"""Checkpoint folders. Tensors are read one at a time, without trusting the files; folders are written under a temporary name and moved
into place."""

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import list_repo_files, snapshot_download, split_state_dict_into_shards_factory
from safetensors import safe_open


HUB_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "tokenizer.model")  # to download
WEIGHT_FILES = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin")
CHECKPOINT_FILES = (  # written by `convert` and `save_pretrained`
    *"config.json *_config.json *.index.json tokenizer.* special_tokens_map.json added_tokens.json vocab.json".split(),
    *"merges.txt accuracy.json chat_template.* *_mqt_llava.py README.md".split(),
    *WEIGHT_FILES,
)
MARK = "mqt-llava-convert.lock"  # in temporary folders
REMAP_AFTER_BYTES = 256 * 2**20
WRITERS = min(4, os.cpu_count() or 1)  # number of tensors in memory and being written at a time
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# --- reading ---


@dataclass
class LazyTensor:
    """A tensor that is not read yet.

    Args:
        shape (`tuple[int, ...]`), dtype (`torch.dtype`): from the file's header.
        load (`Callable[[], torch.Tensor]`): reads, and if necessary computes, the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def map(self, function) -> "LazyTensor":
        """Apply `function` to the tensor when it is loaded. The resulting shape and dtype are computed on the meta device."""
        made = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return LazyTensor(tuple(made.shape), made.dtype, lambda: function(self.load()))


def cast(tensors: dict[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Cast all floating-point tensors to `dtype`, unless it is `None`."""
    return {
        name: tensor.map(lambda values: values.to(dtype))
        if dtype is not None and tensor.dtype.is_floating_point and tensor.dtype != dtype
        else tensor
        for name, tensor in tensors.items()
    }


def counted(tensors: dict[str, LazyTensor], on_read) -> dict[str, LazyTensor]:
    """The same tensors, which call `on_read` with their number of bytes when they are loaded, from one thread at a time."""
    lock = threading.Lock()

    def load(tensor):
        values = tensor.load()
        with lock:
            on_read(tensor.nbytes)
        return values

    return {name: replace(tensor, load=partial(load, tensor)) for name, tensor in tensors.items()}


class BinFile:
    """A `.bin` file, mapped into memory. Such files are pickles, and are only read with `weights_only=True`."""

    def __init__(self, path: Path):
        self.path = path
        self.mapped = None
        self.bytes_read = 0

    def map(self) -> dict[str, torch.Tensor]:
        mapped = self.mapped
        if mapped is None:
            try:
                mapped = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                wrong = [name for name, value in mapped.items() if not isinstance(value, torch.Tensor)]
            except Exception as error:  # torch's own message suggests to load it anyway
                raise ValueError(
                    f"cannot read {self.path}: it is damaged, older than torch 1.6, or contains more than tensors, which could run "
                    "code"
                ) from error
            if wrong:
                raise ValueError(f"{self.path} contains more than tensors: {first(wrong)}")
            self.mapped, self.bytes_read = mapped, 0
        return mapped  # not `self.mapped`, which another thread may have reset

    def load(self, name: str) -> torch.Tensor:
        tensor = self.map()[name]
        # pages that were read count as resident memory as long as the file is mapped
        self.bytes_read += tensor.nbytes
        if self.bytes_read >= REMAP_AFTER_BYTES:
            self.mapped = None
        return tensor


def load_safetensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def read_file(path: Path) -> dict[str, LazyTensor]:
    """All tensors of a safetensors or `.bin` file.

    Raises:
        `ValueError`: if the file is damaged or contains more than tensors.
    """
    if path.suffix != ".safetensors":
        file = BinFile(path)
        return {
            name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(file.load, name))
            for name, tensor in file.map().items()
        }
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                header = file.get_slice(name)
                if (dtype := SAFETENSORS_DTYPES.get(header.get_dtype())) is None:
                    raise ValueError(f"{name} has the unsupported dtype {header.get_dtype()}")
                tensors[name] = LazyTensor(tuple(header.get_shape()), dtype, partial(load_safetensor, path, name))
    except Exception as error:  # readers raise all kinds of exceptions on damaged files
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    return tensors


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint folder. Safetensors take precedence over `.bin` files; shards are those in the index.

    Raises:
        `ValueError`: for files that are missing or cannot be read, and for an index that doesn't match its files.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index, files = folder / f"{single}.index.json", [single]
        listed: Any = {}
        if index.exists():
            listed = read_json(check_inside(folder, index.name)).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise ValueError(f"{index} has no `weight_map` from tensors to files")
            files = sorted(set(listed.values()))
        elif not (folder / single).exists():
            continue
        tensors = {}
        for file in files:
            for name, tensor in read_file(check_inside(folder, file)).items():
                if name in tensors:
                    raise ValueError(f"{folder}: the tensor {name} is in two files, one of them {file}")
                tensors[name] = tensor
        if missing := sorted(listed.keys() - tensors.keys()):
            raise ValueError(f"{index} lists tensors that its files lack: {first(missing)}")
        return tensors
    raise ValueError(
        f"{folder} has no weights: it has none of model.safetensors, pytorch_model.bin and their index files"
    )


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object; got {type(content).__name__}")
    return content


def check_inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, which neither `..` nor a symbolic link may lead out of.

    Snapshots in the Hub's cache are an exception: their links point to blobs of the same repository.
    """
    path = folder / name
    home = folder.resolve()
    allowed = [home, home.parent.parent] if home.parent.name == "snapshots" else [home]
    if Path(name).name != name or not any(path.resolve().is_relative_to(parent) for parent in allowed):
        link = f": it is a symbolic link to {path.resolve()}; copy that file here" if path.is_symlink() else ""
        raise ValueError(f"{name!r} is outside the folder {folder}{link}")
    if not path.is_file():
        raise ValueError(f"{folder} has no file {name}")
    return path


def one_line(error: BaseException) -> str:
    """An error's message on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first(names: list, count: int = 3) -> str:
    more = len(names) - count
    return ", ".join(map(str, names[:count])) + (f" and {more} more" if more > 0 else "")


def fetch(name: str, near: Path | None = None) -> Path:
    """The local folder of that name, or the downloaded files of a Hub repository.

    Args:
        name (`str`): A folder or a Hub repository.
        near (`Path`, *optional*): A folder that a relative path may start from, as well as from its parent.
    """
    starts = [] if near is None else [near, near.parent, near.resolve().parent]  # of a link's target too
    for folder in [*(start / name for start in starts), Path(name)]:
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} is neither a folder nor the name of a Hub repository")
    unwanted = None
    with contextlib.suppress(Exception):  # offline, use the cache
        if any(file.endswith(".safetensors") for file in list_repo_files(name)):
            unwanted = "*.bin"  # the same weights again
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=unwanted))
    except Exception as error:  # its HTTP library has many exceptions
        raise ValueError(
            f"{name!r} is not a local folder and cannot be downloaded from the Hub: {one_line(error)}"
        ) from error


# --- writing ---


@contextlib.contextmanager
def new_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that is moved to `destination` at the end of the block, or removed if the block raises.

    It is created next to `destination`. A folder that a killed run left behind is removed by the next run.

    Raises:
        `ValueError`: see [`check_free`].
    """
    destination = Path(os.path.realpath(destination))  # a link stays where it is
    prefix = f".{destination.name}.convert-"
    for mark in destination.parent.glob(f"{glob.escape(prefix)}*/{MARK}"):
        with open(mark) as file:
            if _lock(file):  # otherwise, another run is using it
                _remove(mark.parent, destination)
    check_free(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        with open(aside / MARK, "w") as lock:
            _lock(lock)
            (aside / "new").mkdir()
            yield aside / "new"
            check_free(destination, overwrite)  # again: it may have been filled in the meantime
            if destination.exists():
                destination.replace(aside / "old")
            (aside / "new").replace(destination)
    finally:
        _remove(aside, destination)


def _remove(aside: Path, destination: Path):
    if (aside / "old").exists() and not destination.exists():  # stopped between the two renames
        (aside / "old").replace(destination)
    shutil.rmtree(aside, ignore_errors=True)


def _lock(file) -> bool:
    """Lock a file until this process ends or closes it. Without locks, as on Windows, no folder is considered abandoned."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def check_free(destination: Path, overwrite: bool):
    """
    Raises:
        `ValueError`: if `destination` is a file or a folder that is not empty. With `overwrite`, the folder may contain a checkpoint,
            but no other files.
    """
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; a folder is needed")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{destination} is not empty; choose another folder or pass --overwrite")
    if others := foreign_files(destination):
        raise ValueError(
            f"--overwrite replaces only checkpoints, but {destination} contains {first(others)}; choose another folder"
        )


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder that don't belong to a checkpoint; all names if there is no checkpoint."""

    def fits(name: str, patterns) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    found = sorted(path.name for path in folder.iterdir())
    tower = folder / "vision_tower"  # part of a checkpoint in the authors' layout
    if tower.is_dir() and (others := foreign_files(tower)):
        return [f"vision_tower/{name}" for name in others]
    is_checkpoint = all(
        any(fits(name, patterns) for name in found)
        for patterns in (WEIGHT_FILES, ("config.json", "adapter_config.json"))
    )
    return [name for name in found if not is_checkpoint or (name != tower.name and not fits(name, CHECKPOINT_FILES))]


def parse_size(size: int | str) -> int:
    """`500MB` or `5GiB` in bytes."""
    try:
        nbytes = convert_file_size_to_int(size)
    except ValueError:
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"--max-shard-size must be a size such as 500MB or 5GiB; got {size!r}")
    return nbytes


def check_space(folder: Path, nbytes: int):
    """Refuse, before any work, weights that don't fit on the disk."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ValueError(f"the converted weights take {nbytes / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB left")


def plan_shards(tensors: dict[str, LazyTensor], max_shard_size: int | str):
    """Assign tensors to files, as a `StateDictSplit` of huggingface_hub."""
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


def write_shards(folder: Path, tensors: dict[str, LazyTensor], max_shard_size: int | str):
    """Write `tensors` as safetensors, with at most `WRITERS` of them in memory at a time."""
    split = plan_shards(tensors, max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        write_safetensors(folder / filename, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: dict[str, LazyTensor]):
    """Write a safetensors file, a few tensors at a time: `safetensors.torch.save_file` needs all of them in memory."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # wide dtypes first, as in that library, so that each tensor is aligned to its item size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(name):
        tensor, values = tensors[name], tensors[name].load()
        if (tuple(values.shape), values.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} should have the shape {tensor.shape} and dtype {tensor.dtype}; got {tuple(values.shape)}, {values.dtype}"
            )
        with open(path, "r+b", buffering=0) as file:
            file.seek(8 + len(head) + header[name]["data_offsets"][0])
            write_all(file, values.contiguous().flatten().view(torch.uint8).numpy())

    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with ThreadPoolExecutor(WRITERS) as pool:
        try:
            for written in as_completed([pool.submit(write, name) for name in tensors]):
                written.result()
        except BaseException:  # stop at the first error or Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def write_all(file, content):
    """Write all bytes: a single write to an unbuffered file may be partial."""
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
        raise OSError(
            f"cannot write the tokenizer: {error}"
        ) from error  # from the Rust library, such as for a full disk


def main_dtype(tensors: dict[str, LazyTensor]) -> torch.dtype:
    """The dtype of the largest tensor, to store in the config for `from_pretrained(dtype="auto")`."""
    return max(tensors.values(), key=lambda tensor: tensor.nbytes).dtype
