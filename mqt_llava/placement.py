"""Choose the dtype and the devices of a model by the memory that is free, before its weights are read."""

from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from .cost import CostModel


ROOM = 1.25  # float32 is the default on a CPU if this many times the memory that it needs is free
QUANTIZED_ITEMSIZE = {4: 4.5 / 8, 8: 1.01}  # bytes per weight, with its share of the scales


@dataclass(frozen=True)
class Placement:
    """How to load a model.

    Args:
        dtype (`torch.dtype`): of the weights that are not quantized.
        options (`dict`): further arguments of `from_pretrained`, if the model doesn't fit on one GPU.
        note (`str`, *optional*): a line to show to the user.
    """

    dtype: torch.dtype
    options: dict = field(default_factory=dict)
    note: str | None = None


def stored_dtype(config) -> torch.dtype:
    """The dtype of a checkpoint's weights according to its config."""
    return config.dtype or config.text_config.dtype or torch.float32


def free_memory(device, cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Free memory of a device in bytes. For a CPU, the smaller of what the machine has available and what the container's cgroup
    limits leave. Infinite for a type of device that this function doesn't know."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in torch's cache
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return float("inf")
    return min([psutil.virtual_memory().available, *_free_in_cgroups(cgroups, process)])


def _free_in_cgroups(root: Path, process: Path) -> list[int]:
    """What each cgroup limit of this process (version 1 or 2) leaves free, in bytes. Cached files don't count as used."""
    free = []
    for line in process.read_text().splitlines() if process.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            home, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            home, files = root, ("memory.max", "memory.current")
        else:
            continue
        folder = home / name.lstrip("/")
        # inside a container, the process's own group is the visible root
        for group in (folder, *folder.parents) if folder.is_dir() else (home,):
            try:
                limit, used = (int((group / file).read_text()) for file in files)
                usage = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                prefix = "total_" * (home != root)
                cached = sum(int(usage[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                free.append(limit - used + cached)
            except (KeyError, OSError, ValueError):  # no such file, or no limit: "max"
                pass
            if group == home:
                break
    return free


def choose_dtype(costs: CostModel, device, **request) -> torch.dtype:
    """The default dtype of a model: that of the checkpoint, or float32 on a CPU with enough free memory, since not every CPU is
    fast in another dtype."""
    own = stored_dtype(costs.config)
    if torch.device(device).type != "cpu":
        return own
    spare = ROOM * costs(dtype=torch.float32, **request).memory_bytes <= free_memory(device)
    return torch.float32 if spare else own


def place_model(
    costs: CostModel, device, dtype: torch.dtype | None = None, num_bits: int | None = None, **request
) -> Placement:
    """
    Find out how a model fits in the free memory of a device.

    Args:
        costs (`CostModel`): the model's.
        dtype (`torch.dtype`, *optional*): of the weights. Defaults to [`choose_dtype`], or to the checkpoint's own with `num_bits`.
        num_bits (`int`, *optional*): 4 or 8 for a quantized language model.
        request: number and length of prompts and answers, as for [`CostModel`].

    Raises:
        `ValueError`: if it fits nowhere. The message says how much is needed, how much is free and what would fit.
    """
    device = torch.device(device)
    own = stored_dtype(costs.config)
    free = free_memory(device)

    def needed(dtype, num_bits):
        cost = costs(dtype=dtype, **request)
        weights = cost.weight_bytes["language_model"]
        quantized = weights if num_bits is None else weights / dtype.itemsize * QUANTIZED_ITEMSIZE[num_bits]
        return cost.memory_bytes - weights + quantized

    if dtype is None:
        dtype = choose_dtype(costs, device, **request) if num_bits is None else own
    need = needed(dtype, num_bits)
    if need <= free:
        return Placement(dtype)
    words = (
        f"the model needs {gigabytes(need)} with {as_options(dtype, num_bits)}; {device} has {gigabytes(free)} free"
    )
    # bitsandbytes does not run layers on a CPU that it quantized for a GPU
    if device.type == "cuda" and num_bits is None:
        gpus: dict[int | str, float] = {
            index: free_memory(f"cuda:{index}") for index in range(torch.cuda.device_count())
        }
        max_memory = gpus | {"cpu": free_memory("cpu")}
        if need <= sum(max_memory.values()):
            rest = "other GPUs" if need <= sum(gpus.values()) else "the CPU, which is slow"
            options = {"device_map": "auto", "max_memory": max_memory}
            return Placement(dtype, options, f"{words}: the rest goes to {rest} (device_map='auto')")
    others = dict.fromkeys([(own, num_bits), (torch.bfloat16, num_bits), (own, 8), (own, 4)])
    fitting = [f"{as_options(*other)} needs {gigabytes(needed(*other))}" for other in others if needed(*other) <= free]
    raise ValueError(f"{words}. {'What would fit: ' + '; '.join(fitting) if fitting else 'No other option would fit'}")


def as_options(dtype: torch.dtype, num_bits: int | None) -> str:
    quantized = "" if num_bits is None else f" --load-in-{num_bits}bit"
    return f"--dtype {str(dtype).removeprefix('torch.')}{quantized}"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def check_training(
    costs: CostModel, device, dtype: torch.dtype, parts=(), num_moments: int = 2, num_bits: int | None = None
):
    """
    Refuse a training run that cannot fit in memory, by a lower bound: the weights, and the gradients and optimizer states of those
    that are trained. Activations and LoRA's own weights are not counted.

    Args:
        dtype (`torch.dtype`): of weights, gradients and optimizer states.
        parts (`tuple[str]`): the parts that are trained in full, by their names in `Cost.weight_bytes`.
        num_moments (`int`, *optional*, defaults to 2): numbers per weight in the optimizer's state; AdamW has two.
        num_bits (`int`, *optional*): 4 or 8 for a quantized language model.

    Raises:
        `ValueError`: if it cannot fit, with what is needed and what is free.
    """
    weights: dict[str, float] = dict(costs(1, dtype=dtype).weight_bytes)
    trained = sum(weights[part] for part in parts)
    if num_bits is not None:
        weights["language_model"] *= QUANTIZED_ITEMSIZE[num_bits] / dtype.itemsize
    need, free = sum(weights.values()) + (1 + num_moments) * trained, free_memory(device)
    if need > free:
        what = "weights, gradients and optimizer" if parts else "the weights"
        what += f" in {str(dtype).removeprefix('torch.')}" + ("" if num_bits is None else f" and {num_bits} bits")
        raise ValueError(
            f"training needs more than {gigabytes(need)} for {what}; {torch.device(device)} has {gigabytes(free)} free"
        )
