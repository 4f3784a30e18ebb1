"""The paper's central claim at the scale of mqt-llava-tiny: one elastic model beside models trained for one m alone.

    python -m benchmarks.elastic --runs runs --output_dir docs/accuracy

All continue from the pretrained parts that `recipes/tiny/train.sh` writes to `start` in `--runs`, with the same data, seed and number
of steps. They differ only in how m is drawn, and in whether a small m also learns from a larger one. Each is asked about scenes
never trained on. A model takes some 6 minutes on two CPU cores at 400 steps. Called again, the script continues where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny.evaluate import evaluation_set, is_right


NUM_VISUAL_TOKENS = (1, 2, 4, 16, 64)
EVEN = ["--num_visual_tokens", "1,1,1,2,2,2,3,4,4,6,8,8,12,16,16,24,32,32,48,64,64,64"]  # as in recipes/tiny/train.sh
MODELS = {
    "elastic": EVEN,
    "elastic, distilled": [*EVEN, "--distill_weight", "1"],
    **{f"m = {m} alone": ["--num_visual_tokens", str(m)] for m in NUM_VISUAL_TOKENS},
}
LEGEND = "Exact answers in %, lists in any order, all types of questions."


def train(runs: Path, folder: Path, options: list[str], steps: int):
    command = f"""-m torch.distributed.run --nproc_per_node 2 -m recipes.tiny.tune --stage 2 --model {runs}/start
        --data_path {runs}/data/conversations.json --image_folder {runs}/data/images --output_dir {folder}
        --max_steps {steps} --use_cpu --bf16 --max_grad_norm 1 --ddp_backend gloo --per_device_train_batch_size 32
        --gradient_accumulation_steps 1 --gradient_checkpointing false --attn_implementation eager
        --dataloader_num_workers 0 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps {steps // 20}
        --logging_steps 20 --save_steps 200 --save_total_limit 1 --report_to none"""
    resume = ["--resume"] if any(folder.glob("checkpoint-*")) else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command.split(), *options, *resume], check=True, env=environment)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()

    samples = evaluation_set(arguments.pictures)
    lines = [
        "| trained at | " + " | ".join(f"m = {m}" for m in NUM_VISUAL_TOKENS) + " |",
        "| --- |" + " ---: |" * len(NUM_VISUAL_TOKENS),
    ]
    for name, options in MODELS.items():
        folder = arguments.runs / "elastic" / name.replace(", ", "-").replace(" ", "-").replace("=-", "")
        if name in arguments.models and not (folder / "accuracy.json").exists():
            if not (folder / "model.safetensors").exists():
                train(arguments.runs, folder, options, arguments.steps)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(folder)
            right = {m: is_right(model, processor, samples, m) for m in NUM_VISUAL_TOKENS}
            accuracy = {m: 100 * sum(answers) / len(answers) for m, answers in right.items()}
            (folder / "accuracy.json").write_text(json.dumps(accuracy) + "\n")
        if (folder / "accuracy.json").exists():
            accuracy = json.loads((folder / "accuracy.json").read_text())
            lines.append(f"| {name} | " + " | ".join(f"{accuracy[str(m)]:.1f}" for m in NUM_VISUAL_TOKENS) + " |")
    setting = f"{arguments.steps} steps of 64 samples from the pretrained parts, {len(samples)} questions about {arguments.pictures} pictures."
    table = f"{setting} {LEGEND}\n\n" + "\n".join(lines) + "\n"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "elastic.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
