"""What every benchmark needs: a clock for the device, interleaved repeats, peak memory, the machine's name, tables."""

import csv
import os
import platform
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.generation.streamers import BaseStreamer


def machine(device: torch.device) -> str:
    """The machine in words: what computes, with how many threads, with which versions, and how busy it was before."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    name = models[0] if models else platform.processor() or platform.machine()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    level = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {level}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {versions}{load}"


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(function, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleave(measurements: dict, repeats: int, limit_s: float = float("inf")) -> tuple[dict, dict]:
    """What each of the functions measures in every round, `(repeats, ...)`, and what in the round before, not counted.

    Every function once, then all again, so that a slow minute of the machine hits all alike: ratios within a round are
    surer than those of medians. A function returns a number or a tuple of numbers. No round begins, after two, that would
    likely end later than `limit_s`.
    """
    rounds, start = [], time.perf_counter()
    for i in range(repeats + 1):
        rounds.append({name: np.array(measure()) for name, measure in measurements.items()})
        elapsed = time.perf_counter() - start
        print(f"round {i} of {repeats} done after {elapsed:.0f} s", file=sys.stderr)
        if i == 0:
            first = elapsed
        elif elapsed + (elapsed - first) / i > limit_s:
            break
    return {name: np.stack([one[name] for one in rounds[1:]]) for name in measurements}, rounds[0]


class Stopwatch(BaseStreamer):
    """A streamer that notes when `generate` hands over each token; all earlier work is then done, on any device."""

    def __init__(self):
        self.start = time.perf_counter()
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter() - self.start)

    def end(self):
        pass

    def result(self) -> tuple[float, float]:
        """Seconds to the first token and for each further one. `generate` hands over the prompt before these."""
        first, *further = self.times[1:]
        return first, (further[-1] - first) / len(further) if further else float("nan")


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors alive at once that were made inside, for devices whose allocator keeps no such count."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_iter(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and storage._cdata not in given:
                    self.known.add(storage)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return outputs

    def forget(self, num_bytes: int):
        self.alive -= num_bytes


def peak_memory(function, device: torch.device) -> int:
    """Bytes that `function` needs at most beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        function()
    return memory.peak


def markdown(rows: list[dict], columns: dict[str, tuple[float | None, str]]) -> str:
    """A table with one line for each row. `columns` gives the unit and the format of each value; text stays as it is."""

    def cell(value, unit, style):
        return (
            value
            if isinstance(value, str)
            else ""
            if value is None
            else format(value / unit if unit != 1 else value, style)
        )

    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cell(row.get(name), *columns[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_csv(rows: list[dict], path: Path):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
