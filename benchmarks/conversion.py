"""Memory and speed of `mqt-llava convert` on a checkpoint with the tensors of MQT-LLaVA 7B, with fewer layers.

    python -m benchmarks.conversion [--layers 8] [--folder /tmp/conversion] [--repeats 3] [--formats ...] [--dtypes ...]

The checkpoint is random, in bfloat16, once in safetensors shards and once as one `.bin` file. Every conversion runs in a process of
its own, which tells its peak resident memory (VmHWM of Linux); the files are copied by `shutil.copytree` beside it, in turn.
`process` is the whole of it, with the start of Python and the imports, until the files are on the disk; `convert` is the
function alone.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.checkpoint import write_source


CONVERT = """
import sys, torch
from pathlib import Path
from mqt_llava.conversion import convert
report = convert(sys.argv[1], sys.argv[2], dtype=None if sys.argv[3] == "stored" else getattr(torch, sys.argv[3]))
print(report.seconds)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def timed(*command) -> list[float]:
    """Seconds that a Python program takes until its files are on the disk, and the numbers that it prints."""
    start = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True, text=True).stdout
    os.sync()
    return [time.perf_counter() - start, *map(float, output.split())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/conversion"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=["safetensors", "bin"], default=["safetensors", "bin"])
    parser.add_argument("--dtypes", nargs="+", default=["stored", "float16"])
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the vision tower is in the checkpoint

    columns = ["source", "written as", "weights (GB)", "largest shard (GB)", "peak memory (GB)", "process (s)"]
    columns += ["convert (s)", "copy (s)", "process / copy", "convert / copy"]
    print("| " + " | ".join(columns) + " |\n| --- | --- |" + " ---: |" * (len(columns) - 2))
    for name in arguments.formats:
        source = arguments.folder / name
        write_source(source, arguments.layers, as_bin=name == "bin")
        for dtype in arguments.dtypes:
            target = arguments.folder / "target"
            conversions, copies = [], []
            for _ in range(arguments.repeats):
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                copy = f"import shutil; shutil.copytree({str(source)!r}, {str(target)!r})"
                copies.append(timed(copy)[0])
                shutil.rmtree(target)
                os.sync()
                conversions.append(timed(CONVERT, str(source), str(target), dtype))
            shards = [file.stat().st_size / 1e9 for file in target.glob("*.safetensors")]
            process, convert, memory = zip(*conversions)
            row = [
                sum(shards),
                max(shards),
                max(memory) * 1024 / 1e9,
                *map(statistics.median, (process, convert, copies)),
            ]
            row += [statistics.median(one / copy for one, copy in zip(ours, copies)) for ours in (process, convert)]
            print(f"| {name} | {dtype} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)
        shutil.rmtree(source)
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
