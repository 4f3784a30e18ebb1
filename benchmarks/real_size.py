"""Everything that a new user does with the authors' 7B checkpoint, at its real size, on this machine: time and memory of each step.

    python -m benchmarks.real_size --folder /tmp/real-size [--layers 32] [--output_dir docs/benchmarks]

The checkpoint is random, in the authors' layout and in bfloat16 (14 GB). It is made, converted and verified, asked at three
numbers of visual tokens, compared, quantized where torchao and bitsandbytes are there, and converted back. Each step is the
command that docs/ names, in a process of its own. It takes twice the checkpoint on the disk, says so first, and leaves
nothing there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from PIL import Image

from benchmarks.checkpoint import random_tensors, write_source
from benchmarks.measure import machine, markdown


QUESTION = "What is this?"
NUM_VISUAL_TOKENS = (1, 16, 256)
COLUMNS = {
    "step": (None, "s"),
    "time": (1, ",.1f"),
    "memory": (1e9, ",.2f"),
    "mapped": (1e9, ",.2f"),
    "result": (None, "s"),
}
LEGEND = """\
`time` is that of the whole process in s, with the start of Python. `memory` is the most that it held for itself in GB, `mapped` the
most that it saw of files beside that, which the system takes back when others need memory (both sampled ten times a second).
"""


def run(step: str, *command) -> dict:
    """A row of the table: a command, its time, its memory and the last line that it printed."""
    print(f"+ {' '.join(map(str, command))}", file=sys.stderr, flush=True)
    start, peaks = time.perf_counter(), [0, 0]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for i, size in enumerate(resident(process.pid)):
                peaks[i] = max(peaks[i], size)
            time.sleep(0.1)
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"Error: {step} failed with exit code {process.returncode}")
    print(output, file=sys.stderr)
    row = {"step": step, "time": time.perf_counter() - start, "memory": peaks[0], "mapped": peaks[1]}
    return row | {"output": output}


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process in memory: its own, and of files."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:  # it has ended
        return 0, 0
    shared = getattr(memory, "shared", 0)  # Linux alone tells
    return memory.rss - shared, shared


def rehearse(folder: Path, layers: int) -> list[dict]:
    program = [sys.executable, "-c", "from mqt_llava_cli import main; main()"]
    source, converted, photo = folder / "MQT-LLaVA-7b", folder / "mqt-llava-7b-hf", folder / "photo.jpg"
    start = time.perf_counter()
    write_source(source, layers)
    rows = [{"step": "a checkpoint of random numbers is made", "time": time.perf_counter() - start, "result": ""}]
    Image.effect_noise((900, 600), 90).convert("RGB").save(photo)

    def convert(step, *arguments):
        rows.append(run(step, *program, "convert", *arguments, "--verify", "--json"))
        report = json.loads(rows[-1]["output"])
        worst = {}
        for check in report["checks"]:
            worst[check["name"]] = max(check["difference"], worst.get(check["name"], 0))
        differences = ", ".join(f"{name} {difference:.1g}" for name, difference in worst.items())
        rows[-1]["result"] = f"{report['nbytes'] / 1e9:.2f} GB; {differences}"

    def ask(step, *options):
        question = [photo, QUESTION, "--model", converted, "--max-new-tokens", 8, "--json", *options]
        rows.append(run(step, *program, "ask", *question))
        answer = json.loads(rows[-1]["output"])
        answers = answer.get("compare", [answer])
        seconds = ", ".join(f"m = {one['num_visual_tokens']}: {one['seconds']:.2f} s" for one in answers)
        rows[-1]["result"] = f"{answer['dtype']}, {seconds}"

    convert("`mqt-llava convert MQT-LLaVA-7b mqt-llava-7b-hf --verify`", source, converted)
    rows.append(
        run("`mqt-llava cost --new-tokens 8`", *program, "cost", "--model", converted, "--new-tokens", 8, "--json")
    )
    costs = json.loads(rows[-1]["output"])
    wanted = [row for row in costs["costs"] if row["num_visual_tokens"] in NUM_VISUAL_TOKENS]
    predicted = ", ".join(f"m = {row['num_visual_tokens']}: {row['latency']:.2f} s" for row in wanted)
    rows[-1]["result"] = f"{costs['dtype']}, {predicted} predicted"
    for m in NUM_VISUAL_TOKENS:
        ask(f"`mqt-llava ask ... --num-visual-tokens {m}`", "--num-visual-tokens", m)
    compared = ",".join(map(str, NUM_VISUAL_TOKENS))
    ask(f"`mqt-llava ask ... --compare {compared}`", "--compare", compared)
    rows.append(evaluate(folder, program, converted, photo))
    for library, option in (("torchao", "--load-in-8bit"), ("bitsandbytes", "--load-in-4bit")):
        if find_spec(library) is not None:
            ask(f"`mqt-llava ask ... --num-visual-tokens 16 {option}`", "--num-visual-tokens", 16, option)
    shutil.rmtree(source)
    convert("`mqt-llava convert mqt-llava-7b-hf MQT-LLaVA-7b-again --verify`", converted, folder / "again")
    return rows


def evaluate(folder: Path, program: list[str], model: Path, photo: Path) -> dict:
    """A row of the table: eight questions about one photo."""
    data, results = folder / "questions.json", folder / "results"
    turns = [
        [{"from": "human", "value": f"<image>\n{QUESTION} {i}"}, {"from": "gpt", "value": "Noise."}] for i in range(8)
    ]
    data.write_text(json.dumps([{"image": photo.name, "conversations": one} for one in turns]))
    compared = ",".join(map(str, NUM_VISUAL_TOKENS))
    options = ["--num-visual-tokens", compared, "--max-new-tokens", 4, "--batch-size", 4]
    command = [*program, "evaluate", data, "--model", model, *options, "--output-dir", results]
    row = run(f"`mqt-llava evaluate ... --num-visual-tokens {compared} --batch-size 4`, 8 questions", *command)
    answers = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    if len(answers) != 8 * len(NUM_VISUAL_TOKENS) or any("error" in answer for answer in answers):
        raise SystemExit(f"Error: {answers}")
    seconds = {
        m: statistics.median(one["seconds"] for one in answers if one["num_visual_tokens"] == m)
        for m in NUM_VISUAL_TOKENS
    }
    row["result"] = ", ".join(f"m = {m}: {value:.2f} s an answer" for m, value in seconds.items())
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, which is removed at the end")
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    parser.add_argument("--output_dir", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the vision tower is in the checkpoint
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} is there already")
    if arguments.layers < 1:
        parser.error(f"--layers must be at least 1; got {arguments.layers}")
    need = 2.1 * sum(tensor.nbytes for tensor in random_tensors(arguments.layers).values())
    arguments.folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(arguments.folder).free
        print(
            f"This takes {need / 1e9:.1f} GB in {arguments.folder}, which has {free / 1e9:.1f} GB free.",
            file=sys.stderr,
        )
        if need > free:
            parser.error("not enough space on the disk")
        setting = f"{machine(torch.device('cpu'))}, {psutil.virtual_memory().total / 1e9:.1f} GB of memory"
        rows = rehearse(arguments.folder, arguments.layers)
    finally:
        shutil.rmtree(arguments.folder)
    table = f"{setting}\n\n{LEGEND}\n{markdown(rows, COLUMNS)}"
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "real_size.md").write_text(table)


if __name__ == "__main__":
    main()
