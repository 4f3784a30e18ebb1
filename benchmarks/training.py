"""A training step of MQT-LLaVA side by side with one of transformers' LLaVA: time, and memory beyond weights and optimizer.

    python -m benchmarks.training --preset cpu --output_dir docs/benchmarks

Both models share one language model with random weights, and have the same vision tower, dtype, attention and machine. A
step is forward, backward and AdamW under autocast to bfloat16, as `Trainer` makes it. `full` is the paper's stage 2: the
language model trains, and the query transformer or LLaVA's projector. `lora` and `qlora` are adapters on the language
model. m = 129 is the mean of {2, 4, ..., 256}, from which the paper draws it. The presets are those of
`benchmarks.generation`: `7b` is for a GPU, without one its rows are written as not measured; `tiny` takes seconds and
is for the tests.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers.utils import is_flash_attn_2_available

from benchmarks.generation import MB, PRESETS, median
from benchmarks.measure import interleave, machine, markdown, peak_memory, seconds, write_csv
from benchmarks.models import IMAGE_TOKEN, LLAVA_TOKENS, build
from mqt_llava.cost import resolve_dtype
from mqt_llava.training.lora import load_quantized, make_lora_config


TEXT_TOKENS = 128  # of each sample: a question or two, with their answers and the system prompt
WAYS = {"tiny": ["full", "lora"], "cpu": ["full", "lora"], "7b": ["lora", "qlora"]}
COLUMNS = {  # the unit and the format of each
    "trained": (None, "s"),
    "model": (None, "s"),
    "batch": (1, "d"),
    "m": (1, "d"),
    "text": (1, "d"),
    "step": (1, ",.2f"),
    "samples/s": (1, ",.2f"),
    "tokens/s": (1, ",.0f"),
    "speed-up": (1, ".2f"),
    "peak": (MB, ",.0f"),
    "less memory": (1, ".2f"),
}
LEGEND = """\
Medians, in s for a whole batch; memory is in MB. `m` is the number of visual tokens, `text` that of text tokens, `tokens/s`
counts both. `peak` is what a step needs at most beyond weights and optimizer: activations and gradients. `speed-up` and
`less memory` compare with LLaVA in the same rows, the speed-up round by round.
"""


def prepare(preset: dict, way: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """LLaVA and MQT-LLaVA, with what trains in this way set to train."""
    models = build(preset, dtype, device)
    llava, mqt = models["LLaVA-1.5"], models["MQT"]
    if way == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            mqt.save_pretrained(folder)
            models["MQT"] = mqt = load_quantized(folder, dtype, device_map=device)
        llava.model.language_model, llava.lm_head = mqt.model.language_model, mqt.lm_head
        for model in models.values():
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # decided below
    attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    for model in models.values():
        model.set_attn_implementation(attention)
        model.requires_grad_(False).train()
        if preset["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "full":
        parts = mqt.model.language_model, mqt.lm_head, mqt.model.query_transformer, llava.model.multi_modal_projector
        for part in parts:
            part.requires_grad_(True)
    else:
        get_peft_model(mqt, make_lora_config(mqt))  # changes the language model, which LLaVA shares, in place
    return models


def training_step(model, optimizer, batch_size: int, num_visual_tokens: int, preset: dict, device: torch.device):
    """A function that trains `model` for one step on random samples of one image each."""
    side = model.config.vision_config.image_size
    ids = torch.randint(5, 30000, (batch_size, preset["text_tokens"] + num_visual_tokens), device=device)
    ids[:, 1 : 1 + num_visual_tokens] = IMAGE_TOKEN
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch_size, 3, side, side, device=device, dtype=model.dtype),
        "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100),
    }

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(preset: dict, way: str, variants, device: torch.device, dtype: torch.dtype) -> tuple[dict, dict]:
    """Seconds of every round, and the peak in bytes, of each variant's step."""
    torch.manual_seed(0)
    steps = {}
    for name, model in prepare(preset, way, device, dtype).items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        for m in (m for of, m in variants if of == name):
            steps[name, m] = training_step(model, optimizer, preset["batch_size"], m, preset, device)
    times, _ = interleave({key: partial(seconds, step, device) for key, step in steps.items()}, preset["repeats"])
    return times, {key: peak_memory(step, device) for key, step in steps.items()}


def benchmark(preset: dict) -> tuple[list[dict], str]:
    """The rows of the table, in seconds and bytes, and the setting in words."""
    device, dtype = torch.device(preset["device"]), resolve_dtype(preset["dtype"])
    measured = device.type != "cuda" or torch.cuda.is_available()
    setting = "Not measured: there is no GPU here."
    if measured:
        checkpointing = "with" if preset["gradient_checkpointing"] else "without"
        setting = f"{machine(device)}, {preset['dtype']}, {checkpointing} gradient checkpointing, "
        setting += f"medians of {preset['repeats']} rounds"
    variants = [("LLaVA-1.5", LLAVA_TOKENS), *(("MQT", m) for m in preset["num_visual_tokens"])]
    rows = []
    for way in preset["ways"]:
        times, peaks = measure(preset, way, variants, device, dtype) if measured else ({}, {})
        for name, m in variants:
            shape = {"batch": preset["batch_size"], "m": m, "text": preset["text_tokens"]}
            row = {"trained": way, "model": name, **shape, "step": "not measured"}
            if measured:
                time = times[name, m]
                row |= {"step": median(time), "samples/s": median(shape["batch"] / time)}
                row["tokens/s"] = row["samples/s"] * (m + shape["text"])
                row["speed-up"] = median(times[variants[0]] / time)
                row |= {"peak": peaks[name, m], "less memory": peaks[variants[0]] / peaks[name, m]}
            rows.append(row)
    return rows, setting


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--ways", nargs="+", choices=["full", "lora", "qlora"], help="default: the preset's")
    parser.add_argument("--repeats", type=int, help="rounds whose median is taken; default: the preset's")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=TEXT_TOKENS)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=[256, 129, 64, 16, 1])
    parser.add_argument("--gradient_checkpointing", action="store_true", help="always so at 7b")
    parser.add_argument("--output_dir", type=Path, help="where to write table and CSV, named after the preset")
    arguments = parser.parse_args()
    preset = {**PRESETS[arguments.preset], "ways": WAYS[arguments.preset]}
    preset |= {name: value for name, value in vars(arguments).items() if value is not None}
    preset["gradient_checkpointing"] |= arguments.preset == "7b"
    rows, setting = benchmark(preset)
    table = f"{setting}\n\n{LEGEND}\n{markdown(rows, COLUMNS)}"
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        path = arguments.output_dir / f"training_{arguments.preset}"
        path.with_suffix(".md").write_text(table)
        write_csv(rows, path.with_suffix(".csv"))


if __name__ == "__main__":
    main()
