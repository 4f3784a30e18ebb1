"""Quantization to 4 or 8 bits, with the library that is fastest on the device."""

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig


# Small, and quantizing them costs the most accuracy at a small m: see docs/benchmarks/quantization.md. Both libraries skip the head
KEPT = ["model.vision_tower", "model.query_transformer", "lm_head"]


def quantization_config(
    num_bits: int, device, compute_dtype: torch.dtype = torch.bfloat16, kept: list[str] | None = None
):
    """
    The `quantization_config` for `from_pretrained` that quantizes the language model and nothing else.

    4 bits: NormalFloat with double quantization (arXiv 2305.14314), by bitsandbytes. 8 bits: LLM.int8 by bitsandbytes on a GPU;
    integer products by torchao on a CPU, where LLM.int8 is 30 times slower (docs/benchmarks/quantization.md has the times).

    Args:
        num_bits (`int`): 4 or 8.
        device (`str` or `torch.device`): the device that the model will run on.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): dtype of the products with 4-bit weights.
        kept (`list[str]`, *optional*): modules that are not quantized. Defaults to the vision tower, the query transformer and the
            language modeling head.

    Raises:
        `ValueError`: for another number of bits.
        `ImportError`: if the library is missing.
    """
    if num_bits not in (4, 8):
        raise ValueError(f"`num_bits` must be 4 or 8; got {num_bits!r}.")
    kept = KEPT if kept is None else kept
    if num_bits == 8 and torch.device(device).type == "cpu":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    import bitsandbytes  # noqa: F401  to raise here if it is missing

    if num_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )
