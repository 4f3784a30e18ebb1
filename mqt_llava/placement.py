"""Where a model fits, before its weights are read: in which dtype, and on which devices."""

from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from .cost import CostModel


ROOM = 1.25  # how much of what float32 takes must be free, for it to be chosen in place of the checkpoint's own dtype
QUANTIZED_ITEMSIZE = {4: 4.5 / 8, 8: 1.01}  # bytes of a weight with its share of the scales


@dataclass(frozen=True)
class Placement:
    """How to load a model.

    Args:
        dtype (`torch.dtype`): of weights that are not quantized.
        options (`dict`): further arguments of `from_pretrained`, where a GPU does not hold all of it.
        note (`str`, *optional*): what is to be said of it, in one line.
    """

    dtype: torch.dtype
    options: dict = field(default_factory=dict)
    note: str | None = None


def stored_dtype(config) -> torch.dtype:
    """Of a checkpoint's weights, by its config."""
    return config.dtype or config.text_config.dtype or torch.float32


def free_memory(device, cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that a device has free for this process: of a CPU, what the machine has available and the container, by its
    cgroups' limits, allows. Infinite for a kind of device that cannot be asked here."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return float("inf")
    return min([psutil.virtual_memory().available, *_free_in_cgroups(cgroups, process)])


def _free_in_cgroups(root: Path, process: Path) -> list[int]:
    """What each limit that holds for this process leaves, of version 1 or 2. Cached files are not counted as used."""
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
        # inside a container the own group is the root of what can be seen
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
    """In which dtype a model is loaded where nothing is said: the checkpoint's own; on a CPU float32, where there is room to
    spare, since not every CPU computes fast in another one."""
    own = stored_dtype(costs.config)
    if torch.device(device).type != "cpu":
        return own
    spare = ROOM * costs(dtype=torch.float32, **request).memory_bytes <= free_memory(device)
    return torch.float32 if spare else own


def place_model(
    costs: CostModel, device, dtype: torch.dtype | None = None, num_bits: int | None = None, **request
) -> Placement:
    """
    Find how a model fits into what a device has free.

    Args:
        costs (`CostModel`): of the model.
        dtype (`torch.dtype`, *optional*): of the weights. Without it that of [`choose_dtype`], or the checkpoint's own where
            they are quantized.
        num_bits (`int`, *optional*): 4 or 8, for a language model whose weights are quantized.
        request: number and length of prompts and answers, as [`CostModel`] takes them.

    Raises:
        `ValueError`: where it fits nowhere, with what is needed, what is free and what would fit.
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
    # What bitsandbytes has quantized for a GPU, it does not compute on a CPU
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
    raise ValueError(
        f"{words}. {'What would fit: ' + '; '.join(fitting) if fitting else 'Nothing that there is would fit'}"
    )


def as_options(dtype: torch.dtype, num_bits: int | None) -> str:
    quantized = "" if num_bits is None else f" --load-in-{num_bits}bit"
    return f"--dtype {str(dtype).removeprefix('torch.')}{quantized}"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def check_training(
    costs: CostModel, device, dtype: torch.dtype, parts=(), num_moments: int = 2, num_bits: int | None = None
):
    """
    Refuse a training that cannot fit, by what it needs at least: weights, and of those that are trained gradients and the
    optimizer's moments. Activations come on top, and depend on much. LoRA's own weights are small.

    Args:
        dtype (`torch.dtype`): of weights, gradients and moments.
        parts (`tuple[str]`): what is trained in full, as `Cost.weight_bytes` names it.
        num_moments (`int`): numbers that the optimizer keeps for each weight, as AdamW its two.
        num_bits (`int`, *optional*): 4 or 8, for a language model whose weights are quantized.

    Raises:
        `ValueError`: with what is needed and what is free.
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
