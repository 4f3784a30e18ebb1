"""How fast a device is: its matmul rate and its memory bandwidth, measured."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from .cpu import compute_in_float32, is_slow


@dataclass(frozen=True)
class DeviceSpeed:
    """How fast a device multiplies matrices and reads memory; see [`measure_device`]."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The least time for so many FLOPs on so many bytes: computing and reading overlap, the slower one counts."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


def measure_device(device="cpu", dtype: torch.dtype | str = torch.bfloat16, repeats: int = 5) -> DeviceSpeed:
    """The matmul rate and the memory bandwidth that a device reaches: the best of several short runs, in a second or so.

    The rate is that of a linear layer on as many tokens as it has inputs, in float32 on a CPU that is slow in `dtype` (see
    [`compute_in_float32`]). The bandwidth is the better of the layer on one token, which is what decoding does, and a copy,
    which reads and writes.

    Args:
        device: as torch takes it.
        dtype (`torch.dtype` or its name): of the matrices. Weights of this type are what the bandwidth is for.
    """
    device, dtype = torch.device(device), resolve_dtype(dtype)
    side = 2048 if device.type == "cpu" else 8192
    # beyond every cache: 256 MB in float32 on a CPU, 2 GB in bfloat16 on a GPU
    weight = torch.randn(16 * side, side, device=device, dtype=dtype)  # a GPU multiplies ones faster than numbers
    layer = nn.Linear(side, side, bias=False, device="meta")
    layer.weight = nn.Parameter(weight[:side])
    layer = nn.Sequential(layer)
    if device.type == "cpu" and is_slow(dtype):
        compute_in_float32(layer)
    tokens, copy = torch.randn(side, side, device=device, dtype=dtype), torch.empty_like(weight)
    with torch.no_grad():
        flops_per_second = 2 * side**3 / best_time(lambda: layer(tokens), device, repeats)
        read = weight.nbytes / best_time(lambda: nn.functional.linear(tokens[:1], weight), device, repeats)
    copied = 2 * weight.nbytes / best_time(lambda: copy.copy_(weight), device, repeats)
    return DeviceSpeed(flops_per_second, max(read, copied))


def best_time(function, device: torch.device, repeats: int) -> float:
    """Seconds of a call, the fastest of several, after one that is not counted. On a GPU that of many in a row, without the
    time to launch and to wait."""
    calls = 1 if device.type == "cpu" else 20
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"`dtype` must be a floating point type such as bfloat16 or float32; got {dtype!r}.")
    return resolved
