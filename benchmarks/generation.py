"""MQT-LLaVA side by side with transformers' LLaVA: time to first token, decoding, memory, and every part alone.

    python -m benchmarks.generation --preset cpu --output_dir docs/benchmarks

Both models have the same vision tower, language model, dtype, attention and machine, and random weights. One run measures
all of it in interleaved rounds and takes medians. `cpu` has CLIP ViT-L/14 at 336 pixels and a language model of 0.5 B;
`7b` is for a GPU, without one its rows are written as not measured; `7b-cpu` needs 18 GB of memory; `tiny` takes seconds and
is for the tests.
"""

import argparse
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_flash_attn_2_available

from benchmarks.figure import PARTS, draw
from benchmarks.measure import interleave, machine, markdown, peak_memory, seconds, write_csv
from benchmarks.models import build, configs, llava_flops, measurements, variants
from mqt_llava import MQTLlavaProcessor
from mqt_llava.cost import CostModel, measure_device, resolve_dtype
from mqt_llava.cpu import is_slow
from tests.small_model import make_tokenizer


CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAMA_HALF_B = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
PRESETS = {
    "tiny": {"vision": TINY, "text": TINY, "dtype": "float32", "device": "cpu", "new_tokens": 3, "repeats": 1},
    "cpu": {
        "vision": CLIP_LARGE,
        "text": LLAMA_HALF_B,
        "dtype": "bfloat16",
        "device": "cpu",
        "new_tokens": 9,
        "repeats": 3,
    },
    "7b-cpu": {
        "vision": CLIP_LARGE,
        "text": {},
        "dtype": "bfloat16",
        "device": "cpu",
        "new_tokens": 4,
        "repeats": 3,
        "batch_sizes": [1],
        "num_visual_tokens": [256, 64, 16, 4, 1],
    },
    "7b": {
        "vision": CLIP_LARGE,
        "text": {},
        "dtype": "bfloat16",
        "device": "cuda",
        "new_tokens": 65,
        "repeats": 10,
        "ways": ["sdpa", "flash_attention_2", "compiled"],
    },
}
WAYS = {
    "sdpa": {},
    "float32": {"float32": True},
    "flash_attention_2": {"attention": "flash_attention_2"},
    "compiled": {"compiled": True},
}
DEFAULTS = {"batch_sizes": [1, 8], "num_visual_tokens": [256, 144, 64, 36, 16, 4, 1]}
LEGEND = """\
Times are medians in ms for the whole batch, memory is in MB. `m` is the number of visual tokens; `text` that of text
tokens. `connector` is the query transformer or LLaVA's projector. `preprocess` decodes and prepares a JPEG of 3000 x
2000 for each row; `first token` is `generate` from there on. `glue` is the share of `first token` that is in none of
its parts (`vision`, `connector`, `merge`, `prefill`) run alone. `speed-up` and `FLOP ratio` compare the first token
with LLaVA's, round by round. `predicted` is the first token as `mqt_llava.cost` predicts it from the speed of layers
that was measured before anything was loaded, `predicted step` a further token, and `of bound` the share of the memory bandwidth
which decoding in `generate` uses; `decode step` is one forward pass, `tokens/s` all rows together in `generate`. In rows with
`float32` the CPU multiplies many tokens in float32 (`mqt_llava.cpu`). `first call` is in s: the first whole answer,
with whatever is compiled for it. `peak` is the most memory beyond the weights, up to the first token; `prefill peak`
that of the prefill alone.
"""
MS, MB = 1e-3, 1e6
COLUMNS = {  # the unit and the format of each
    "model": (None, "s"),
    "batch": (1, "d"),
    "m": (1, "d"),
    "text": (1, "d"),
    **dict.fromkeys(("preprocess", *PARTS, "first token", "predicted"), (MS, ",.1f")),
    "glue": (1, ".1%"),
    "speed-up": (1, ".2f"),
    "FLOP ratio": (1, ".2f"),
    "of ratio": (1, ".0%"),
    "decode step": (MS, ",.2f"),
    "predicted step": (MS, ",.2f"),
    "tokens/s": (1, ",.1f"),
    "of bound": (1, ".0%"),
    "images/s": (1, ",.2f"),
    "first call": (1, ",.1f"),
    "peak": (MB, ",.1f"),
    "prefill peak": (MB, ",.1f"),
}


def benchmark(preset: dict) -> tuple[list[dict], str]:
    """The rows of the table, in seconds and bytes, and the setting in words."""
    device, dtype = torch.device(preset["device"]), resolve_dtype(preset["dtype"])
    float32 = device.type == "cpu" and is_slow(dtype)  # what `mqt-llava ask` would take, and what is predicted
    ways = [WAYS[name] for name in preset.get("ways", ["float32" if float32 else "sdpa"])]
    chosen = variants(preset["batch_sizes"], preset["num_visual_tokens"], ways)
    costs = CostModel(configs(preset)[1])
    full_flops = llava_flops(preset, costs)
    if device.type == "cuda" and not torch.cuda.is_available():
        return [describe(variant, costs, full_flops) for variant in chosen], "Not measured: there is no GPU here."

    setting = f"{machine(device)}, {preset['dtype']}"
    speed = measure_device(device, dtype)
    torch.manual_seed(0)
    models = build(preset, dtype, device)
    timed, remembered = {}, {}
    for variant in chosen:
        if variant.attention != "flash_attention_2" or is_flash_attn_2_available():
            times, memories = measurements(models[variant.model], variant, preset["new_tokens"], device)
            for name, function in times.items():
                timed.setdefault((variant.tower if name == "vision" else variant, name), function)
            remembered |= {(variant, name): function for name, function in memories.items()}
    side = configs(preset)[0].vision_config.image_size
    for model in models:
        for batch_size in preset["batch_sizes"]:
            timed[(model, batch_size), "preprocess"] = preprocessing(model, side, batch_size, device)

    results, first_calls = interleave(timed, preset["repeats"], 60 * preset.get("minutes", float("inf")))
    setting += f", medians of {len(next(iter(results.values())))} rounds"
    peaks = {key: peak_memory(function, device) for key, function in remembered.items()}

    rows, llava = [], {}
    for variant in chosen:
        row = describe(variant, costs, full_flops)
        rows.append(row)
        if (variant, "generate") not in results:
            continue
        # arrays of one number for each round, until `median`
        first, step = results[variant, "generate"].T
        parts = {name: values for (of, name), values in results.items() if of in variant.shared and name != "generate"}
        row |= {name: median(values) for name, values in parts.items()}
        row |= {name: peak for (of, name), peak in peaks.items() if of == variant}
        row |= {"first token": median(first), "tokens/s": median(variant.batch_size / step)}
        row |= {"images/s": median(variant.batch_size / first)}
        first_call, first_step = first_calls[variant, "generate"]
        row["first call"] = float(first_call + preset["new_tokens"] * first_step)
        if "prefill" in row:
            row["glue"] = median(1 - sum(parts[name] for name in PARTS) / first)
        llava.setdefault((row["way"], row["batch"]), first)  # its row is the first one
        row["speed-up"] = median(llava[row["way"], row["batch"]] / first)
        row["of ratio"] = row["speed-up"] / row["FLOP ratio"]
        if variant.model == "MQT" and variant.float32 == float32:
            cost = costs(**variant.request, num_new_tokens=1 + preset["new_tokens"], dtype=dtype)
            row["predicted"] = cost.time_to_first_token(speed)
            row["predicted step"] = cost.time_per_token(speed)
            row["of bound"] = median(cost.decode_read_bytes / speed.bytes_per_second / step)
    return rows, f"{setting}, {speed.flops_per_second / 1e12:.3g} TFLOP/s, {speed.bytes_per_second / 1e9:.3g} GB/s"


def median(values) -> float:
    return float(np.median(values))


def describe(variant, costs: CostModel, full_flops: int) -> dict:
    """What is known of a row before anything is measured."""
    way = ", ".join([variant.attention, *["compiled"] * variant.compiled, *["float32"] * variant.float32])
    flops = costs(**variant.request).flops if variant.model == "MQT" else variant.batch_size * full_flops
    return {
        "model": f"{variant.model}, {way}",
        "way": way,
        "batch": variant.batch_size,
        "m": variant.num_visual_tokens,
        "text": variant.num_text_tokens,
        "first token": "not measured",
        "FLOP ratio": variant.batch_size * full_flops / flops,
    }


def preprocessing(model: str, side: int, batch_size: int, device: torch.device):
    """A function that measures how long JPEGs of 3000 x 2000 pixels take to become pixel values: the same ones."""
    file = io.BytesIO()
    Image.effect_noise((300, 200), 80).resize((3000, 2000)).convert("RGB").save(file, "JPEG", quality=90)
    size = {"height": side, "width": side}
    process = LlavaImageProcessorPil(do_pad=True, size=size, do_center_crop=False, crop_size=size)
    if model == "MQT":
        processor = MQTLlavaProcessor(process, make_tokenizer(), image_side=side)
        process = partial(processor, text=["<image>"] * batch_size)

    def preprocess():
        process(images=[Image.open(file).convert("RGB") for _ in range(batch_size)], return_tensors="pt")

    return lambda: seconds(preprocess, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--device", help="default: the preset's")
    parser.add_argument("--dtype", help="default: the preset's")
    parser.add_argument("--repeats", type=int, help="rounds whose median is taken; default: the preset's")
    parser.add_argument("--minutes", type=float, help="after which no further round begins; default: none")
    parser.add_argument("--new_tokens", type=int, help="decoded behind the first one; default: the preset's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: the preset's")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="default: the preset's, or 1 8")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="default: the preset's, or all")
    parser.add_argument("--output_dir", type=Path, help="where to write table, CSV and figure")
    parser.add_argument("--name", help="of these files, behind `generation_`; default: the preset's")
    arguments = parser.parse_args()
    preset = DEFAULTS | PRESETS[arguments.preset]
    preset |= {name: value for name, value in vars(arguments).items() if value is not None}
    rows, setting = benchmark(preset)
    table = f"{setting}\n\n{LEGEND}\n{markdown(rows, COLUMNS)}"
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        path = arguments.output_dir / f"generation_{arguments.name or arguments.preset}"
        path.with_suffix(".md").write_text(table)
        write_csv(rows, path.with_suffix(".csv"))
        if any("glue" in row for row in rows):
            draw(rows, setting, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
