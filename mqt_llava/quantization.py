"""Weights in 4 or 8 bits, by the library that serves the device best."""

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig


# Small, and what a small m feels most: see docs/benchmarks/quantization.md. The head is left out by both libraries
KEPT = ["model.vision_tower", "model.query_transformer", "lm_head"]


def quantization_config(
    num_bits: int, device, compute_dtype: torch.dtype = torch.bfloat16, kept: list[str] | None = None
):
    """
    For `from_pretrained(quantization_config=...)`: the language model quantized, everything else as it is.

    4 bits are NormalFloat, doubly quantized (arXiv 2305.14314), by bitsandbytes. 8 bits are LLM.int8 by bitsandbytes on a GPU,
    and on a CPU, where that takes 30 times as long, products of integers by torchao (docs/benchmarks/quantization.md has the times).

    Args:
        num_bits (`int`): 4 or 8.
        device: where the model will be, as torch takes it.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of the products with 4-bit weights.
        kept (`list[str]`, *optional*): what is not quantized. Defaults to the vision tower, the query transformer and the head.

    Raises:
        `ValueError`: for another number of bits.
        `ImportError`: where the library is missing.
    """
    if num_bits not in (4, 8):
        raise ValueError(f"`num_bits` must be 4 or 8; got {num_bits!r}.")
    kept = KEPT if kept is None else kept
    if num_bits == 8 and torch.device(device).type == "cpu":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    import bitsandbytes  # noqa: F401  to say here that it is missing

    if num_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )
