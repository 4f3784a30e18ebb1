"""The paper's central claim at the scale of mqt-llava-tiny: one elastic model beside models trained for one m alone.

    python -m benchmarks.elastic --runs runs --output_dir docs/accuracy

All go on from stage 1 of `examples/train_tiny.sh`, whose folder is `--runs`, with the same data, seed and number of steps;
how m is drawn is all that differs. Each is asked about scenes never trained on, at every m. A model takes some 20 minutes
on a CPU core; called again, the script goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mqt_llava.training.evaluate import evaluation_set, is_right


NUM_VISUAL_TOKENS = (1, 4, 16, 64)
DISTRIBUTIONS = {"elastic": "even", **{f"m = {m} alone": str(m) for m in NUM_VISUAL_TOKENS}}
LEGEND = """\
Exact answers in %, all types of questions. The elastic model was trained as in the paper, with m from {2, 4, ..., M}.
"""


def train(runs: Path, folder: Path, num_visual_tokens: str, steps: int):
    command = f"""-m mqt_llava.training.train --stage 2 --model {runs}/stage1 --data_path {runs}/data/conversations.json
        --image_folder {runs}/data/images --output_dir {folder} --num_visual_tokens {num_visual_tokens}
        --max_steps {steps} --use_cpu --bf16 --max_grad_norm 1 --per_device_train_batch_size 64
        --gradient_accumulation_steps 1 --gradient_checkpointing false --train_sampling_strategy random
        --dataloader_num_workers 0 --learning_rate 1e-3 --warmup_steps {steps // 10}
        --logging_steps 20 --save_steps 200 --save_total_limit 1 --report_to none"""
    resume = ["--resume"] if any(folder.glob("checkpoint-*")) else []
    subprocess.run([sys.executable, *command.split(), *resume], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--num_visual_tokens", nargs="+", choices=DISTRIBUTIONS.values(), default=list(DISTRIBUTIONS.values())
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()

    samples = evaluation_set(arguments.pictures)
    lines = [
        "| trained at | " + " | ".join(f"m = {m}" for m in NUM_VISUAL_TOKENS) + " |",
        "| --- |" + " ---: |" * len(NUM_VISUAL_TOKENS),
    ]
    for name, distribution in DISTRIBUTIONS.items():
        folder = arguments.runs / "elastic" / distribution
        if distribution in arguments.num_visual_tokens and not (folder / "accuracy.json").exists():
            if not (folder / "model.safetensors").exists():
                train(arguments.runs, folder, distribution, arguments.steps)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(folder)
            right = {m: is_right(model, processor, samples, m) for m in NUM_VISUAL_TOKENS}
            accuracy = {m: 100 * sum(answers) / len(answers) for m, answers in right.items()}
            (folder / "accuracy.json").write_text(json.dumps(accuracy) + "\n")
        if (folder / "accuracy.json").exists():
            accuracy = json.loads((folder / "accuracy.json").read_text())
            lines.append(f"| {name} | " + " | ".join(f"{accuracy[str(m)]:.1f}" for m in NUM_VISUAL_TOKENS) + " |")
    setting = f"{arguments.steps} steps of 64 samples from stage 1, {len(samples)} questions about {arguments.pictures} pictures."
    table = f"{setting} {LEGEND}\n" + "\n".join(lines) + "\n"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "elastic.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
