"""Reading the tensors of a checkpoint folder, one at a time and without trusting its files."""

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


# File pages that were read count as resident memory until a file is closed, so it is opened anew every so often
REOPEN_AFTER_BYTES = 256 * 2**20
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


@dataclass
class LazyTensor:
    """A tensor that is not read yet.

    Args:
        shape (`tuple[int, ...]`), dtype (`torch.dtype`): known from the file's header.
        load (`Callable[[], torch.Tensor]`): reads it, and computes what it is made of.
        stored (`tuple[Path, int]`, *optional*): the file and the offset at which a safetensors file has its bytes. They
            can be copied without being read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    stored: tuple[Path, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def map(self, function, shape=None, dtype=None) -> "LazyTensor":
        """The tensor that `function` makes of this one when it is loaded."""
        return LazyTensor(
            self.shape if shape is None else tuple(shape),
            self.dtype if dtype is None else dtype,
            lambda: function(self.load()),
        )


class WeightFile:
    """One safetensors or `.bin` file. `.bin` files are pickles: they are read with `weights_only=True` alone."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = None
        self.bytes_read = 0

    def open(self):
        handle = self.handle
        if handle is None:
            self.bytes_read = 0
            try:
                if self.path.suffix == ".safetensors":
                    handle = safe_open(self.path, "pt")
                else:
                    # only zip archives, which torch writes since 1.6, can be mapped into memory
                    handle = torch.load(
                        self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path)
                    )
            except pickle.UnpicklingError as error:  # torch's advice is to load it all the same
                raise ValueError(
                    f"cannot read {self.path}: it is damaged, or holds more than tensors. That could run a program, so "
                    "it is not loaded"
                ) from error
            except Exception as error:  # a damaged file can lead its reader to any exception
                raise ValueError(f"cannot read {self.path}: {one_line(error)}") from error
            if isinstance(handle, dict):
                wrong = [name for name, value in handle.items() if not isinstance(value, torch.Tensor)]
                if wrong:
                    raise ValueError(f"{self.path} holds more than tensors: {', '.join(map(str, wrong[:5]))}")
            self.handle = handle
        return handle  # another thread may have dropped the attribute

    def tensors(self) -> dict[str, LazyTensor]:
        """Everything in the file, in its order."""
        handle = self.open()
        tensors, offsets = {}, {} if isinstance(handle, dict) else self.offsets()
        for name in handle.keys():  # noqa: SIM118  a safetensors file is no dict
            if isinstance(handle, dict):
                shape, dtype = tuple(handle[name].shape), handle[name].dtype
            else:
                part = handle.get_slice(name)
                if part.get_dtype() not in SAFETENSORS_DTYPES:
                    raise ValueError(f"{self.path}: {name} has the unsupported dtype {part.get_dtype()}")
                shape, dtype = tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()]
            stored = (self.path, offsets[name]) if name in offsets else None
            tensors[name] = LazyTensor(shape, dtype, lambda name=name: self.load(name), stored)
        self.handle = None
        return tensors

    def offsets(self) -> dict[str, int]:
        """Where the tensors of a safetensors file begin. Its library has checked the header and keeps them to itself."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
        }

    def load(self, name: str) -> torch.Tensor:
        handle = self.open()
        try:
            tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"cannot read {name} of {self.path}: {error}") from error
        self.bytes_read += tensor.nbytes
        if self.bytes_read >= REOPEN_AFTER_BYTES:
            self.handle = None
        return tensor


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def check_inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder; neither `..` nor a symbolic link may lead out of it.

    A snapshot in the Hub's cache is the exception: its links point to the blobs of the same repository.
    """
    path = folder / name
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent)
    if Path(name).name != name or not any(path.resolve().is_relative_to(parent) for parent in allowed):
        link = f": it is a symbolic link to {path.resolve()}; copy that file here" if path.is_symlink() else ""
        raise ValueError(f"{name!r} leads out of the folder {folder}{link}")
    if not path.is_file():
        raise ValueError(f"{folder} has no file {name}")
    return path


def weight_files(folder: Path) -> list[WeightFile]:
    """The files that hold a checkpoint's weights, safetensors before `.bin`, shards as the index names them."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).exists():
            weight_map = read_json(check_inside(folder, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{folder / index} has no `weight_map` of tensors to files")
            return [WeightFile(check_inside(folder, name)) for name in sorted(set(weight_map.values()))]
        if (folder / single).exists():
            return [WeightFile(check_inside(folder, single))]
    raise ValueError(
        f"{folder} has no weights: none of model.safetensors, pytorch_model.bin and their index files is there"
    )


def one_line(error: Exception) -> str:
    """What went wrong, without the traceback or the advice that a library puts around it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint folder, in the order of its files.

    Raises:
        `ValueError`: for files that are missing or cannot be read, and where the index and its files disagree.
    """
    tensors = {}
    for file in weight_files(folder):
        for name, tensor in file.tensors().items():
            if name in tensors:
                raise ValueError(f"{folder}: the tensor {name} is in two files, one of them {file.path.name}")
            tensors[name] = tensor
    for index in folder.glob("*.index.json"):
        listed = read_json(index).get("weight_map") or {}
        if (missing := sorted(set(listed) - set(tensors))) and _is_of(index, folder):
            raise ValueError(f"{index} names tensors that its files lack: {', '.join(missing[:5])}")
    return tensors


def _is_of(index: Path, folder: Path) -> bool:
    """Whether an index is that of the files which are read: safetensors go before `.bin`."""
    return index.name.startswith("model.safetensors") or not any(folder.glob("model*.safetensors"))


def fetch(name: str, *patterns: str, near: Path | None = None) -> Path:
    """The folder that `name` means: one on this machine, or the files of a Hub repository that fit `patterns`.

    Args:
        name (`str`): A folder or a Hub repository.
        near (`Path`, *optional*): A relative folder may also start from here or from its parent.
    """
    starts = [] if near is None else [near, near.parent, near.resolve().parent]  # of a link, too
    candidates = [*(start / name for start in starts), Path(name)]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} is neither a folder nor the name of a Hub repository")
    from huggingface_hub import list_repo_files, snapshot_download

    # Its HTTP library raises whatever it likes
    if "*.bin" in patterns:
        with contextlib.suppress(Exception):  # offline, what is in the cache will do
            if any(file.endswith(".safetensors") for file in list_repo_files(name)):
                patterns = tuple(pattern for pattern in patterns if pattern != "*.bin")  # the same weights twice
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise ValueError(f"cannot get {name!r}, neither a folder here nor from the Hub: {one_line(error)}") from error
