"""What quantizing each part of the model changes, at small and large numbers of visual tokens.

    python -m benchmarks.quantization --output_dir docs/benchmarks [--pictures 150] [--num_bits 8 4]

On scenes that `mqt-llava-tiny` was not trained on: how many greedy answers are right, and how far the distribution of each token
of the right answer moves (Kullback-Leibler divergence in nats, mean over tokens). 12 M parameters feel rounding more than 7 B do;
what the table is for is the comparison of the parts, and of small with large m. The head is never quantized: both libraries leave it
out, and here it is tied to the embeddings. Then the time of a layer of a 7B model by each library.
"""

import argparse
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.measure import machine, markdown, seconds
from mqt_llava import TINY_CHECKPOINT
from mqt_llava.quantization import quantization_config
from recipes.tiny.evaluate import evaluation_set, is_right


NUM_VISUAL_TOKENS = (1, 4, 16, 64)
PARTS = {
    "language model": "model.language_model",
    "query transformer": "model.query_transformer",
    "vision tower": "model.vision_tower",
}
QUANTIZED = {"nothing": (), **{name: (name,) for name in PARTS}, "everything": tuple(PARTS)}
TOKEN_COUNTS = (1, 16, 57, 300)
TIME_COLUMNS = {"layer": (None, "s")} | {str(count): (1e-3, ",.1f") for count in TOKEN_COUNTS}
COLUMNS = {"bits": (None, "s"), "quantized": (None, "s")}
COLUMNS |= {f"right, m = {m}": (0.01, ".1f") for m in NUM_VISUAL_TOKENS}
COLUMNS |= {f"divergence, m = {m}": (1, ".2g") for m in NUM_VISUAL_TOKENS}


def load(num_bits: int | None, quantized: tuple[str, ...]):
    options = {}
    if quantized:
        kept = ["lm_head", *(module for name, module in PARTS.items() if name not in quantized)]
        options = {"device_map": "cpu", "quantization_config": quantization_config(num_bits, "cpu", kept=kept)}
    return AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, dtype=torch.bfloat16, **options).eval()


@torch.no_grad()
def distributions(model, processor, samples, m: int, batch_size: int = 100) -> torch.Tensor:
    """Log-probabilities of all tokens where the right answers have theirs, `(tokens of all answers, vocab_size)`."""
    found = []
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        conversations = [
            [
                {"role": "user", "content": "<image>\n" * len(pictures) + question},
                {"role": "assistant", "content": answer},
            ]
            for pictures, _, question, answer in rows
        ]
        prompts = processor.apply_chat_template([turns[:1] for turns in conversations], add_generation_prompt=True)
        whole = processor.apply_chat_template(conversations)
        options = {
            "images": [picture for row in rows for picture in row[0]],
            "num_visual_tokens": m,
            "add_special_tokens": False,
        }
        inputs = processor(text=whole, padding=True, padding_side="right", return_tensors="pt", **options)
        lengths = [len(ids) for ids in processor(text=prompts, **options)["input_ids"]]
        logits = model(**inputs).logits[:, :-1]
        position = torch.arange(logits.shape[1])
        is_answer = (position >= torch.tensor(lengths)[:, None] - 1) & inputs["attention_mask"][:, 1:].bool()
        found.append(F.log_softmax(logits[is_answer].float(), dim=-1))
    return torch.cat(found)


@torch.no_grad()
def layer_times() -> list[dict]:
    """How long a layer of a 7B model takes in bfloat16, and quantized by each library. Several take turns: one stays in caches."""

    def plain():
        return nn.Linear(4096, 11008, bias=False, dtype=torch.bfloat16)

    kinds = {"bfloat16": plain}
    if find_spec("bitsandbytes"):
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

        def eight_bits():
            layer = Linear8bitLt(4096, 11008, bias=False, has_fp16_weights=False)
            layer.weight = Int8Params(plain().weight.data, requires_grad=False, has_fp16_weights=False)
            return layer.to("cpu")

        def four_bits():
            layer = Linear4bit(4096, 11008, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = Params4bit(plain().weight.data, requires_grad=False, quant_type="nf4")
            return layer.to("cpu")

        kinds |= {"8 bits, bitsandbytes": eight_bits, "4 bits, bitsandbytes": four_bits}
    if find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        def by_torchao():
            layer = nn.Sequential(plain())
            quantize_(layer, Int8DynamicActivationInt8WeightConfig())
            return layer

        kinds["8 bits, torchao"] = by_torchao
    rows = []
    for name, make in kinds.items():
        layers, row = [make() for _ in range(12)], {"layer": name}
        for count in TOKEN_COUNTS:
            tokens = torch.randn(count, 4096, dtype=torch.bfloat16)
            times = [seconds(partial(layer, tokens), torch.device("cpu")) for layer in layers * 2]
            row[str(count)] = statistics.median(times[len(layers) :])
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--num_bits", type=int, nargs="+", choices=[8, 4], default=[8, 4])
    parser.add_argument("--output_dir", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    processor, samples = AutoProcessor.from_pretrained(TINY_CHECKPOINT), evaluation_set(arguments.pictures)
    few = samples[:: max(len(samples) // 400, 1)]
    rows, exact = [], {}
    for num_bits in arguments.num_bits:
        for name, quantized in QUANTIZED.items():
            if not quantized and exact:
                continue
            model = load(num_bits, quantized)
            row = {"bits": str(num_bits) if quantized else "16", "quantized": name}
            for m in NUM_VISUAL_TOKENS:
                right = is_right(model, processor, samples, m)
                row[f"right, m = {m}"] = sum(right) / len(right)
                found = distributions(model, processor, few, m)
                expected = exact.setdefault(m, found)
                row[f"divergence, m = {m}"] = F.kl_div(found, expected, reduction="batchmean", log_target=True).item()
            rows.append(row)
            print(row, flush=True)
    setting = f"{machine(torch.device('cpu'))}. {len(samples)} questions, divergence over {len(few)} of them."
    times = "A linear layer of 4096 x 11008 on so many tokens, in ms (medians of 12), by the libraries that there are:"
    table = f"{setting}\n\n{markdown(rows, COLUMNS)}\n{times}\n\n{markdown(layer_times(), TIME_COLUMNS)}"
    print(table)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "quantization.md").write_text(table)


if __name__ == "__main__":
    main()
