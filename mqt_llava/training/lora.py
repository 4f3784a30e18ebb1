"""LoRA for MQT-LLaVA: target layers by the names of parts, and the 4-bit base model for QLoRA."""

import re

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import AutoModelForImageTextToText

from ..quantization import quantization_config


TARGETS = {
    "language_model": "LoRA on all linear layers of the language model except the head",
    "query_transformer": "LoRA on the five projections of the query transformer",
    "query_transformer_full": "all weights of the query transformer, saved with the adapter",
    "vision_tower": "LoRA on all linear layers of the vision tower up to the one whose features are used",
}


def make_lora_config(model, targets=("language_model",), r=16, lora_alpha=32, lora_dropout=0.05, **kwargs):
    """
    Make a [`~peft.LoraConfig`] for parts of the model, by name.

    Args:
        model (`MQTLlavaForConditionalGeneration`):
            The base model. It is not modified.
        targets (`str` or `tuple[str]`, *optional*, defaults to `("language_model",)`):
            `"language_model"`: LoRA on all linear layers of the language model except the head. `"query_transformer"`: LoRA on the
            five projections of the query transformer. `"query_transformer_full"`: all weights of the query transformer, saved with
            the adapter. `"vision_tower"`: LoRA on all linear layers of the vision tower up to the one whose features are used.
        r, lora_alpha, lora_dropout, kwargs:
            As for [`~peft.LoraConfig`]: `use_rslora=True`, `use_dora=True`, ...

    Returns:
        [`~peft.LoraConfig`]: for [`~peft.get_peft_model`].

    Raises:
        `ValueError`: for an unknown target, no target, or both targets of the query transformer.
    """
    targets = check_targets(targets)
    config = model.config
    # No adapters on layers of the tower after the features, which would get no gradient
    used = range(config.vision_feature_depth)
    parts = {
        "language_model": r"model\.language_model\.(.*\.)?",
        "query_transformer": r"model\.query_transformer\.",
        "vision_tower": rf"model\.vision_tower\.(.*\.)?layers\.({'|'.join(map(str, used))})\.(.*\.)?",
    }
    patterns = [part + _linear_names(model, part) for target, part in parts.items() if target in targets]
    full = ["query_transformer"] if "query_transformer_full" in targets else None
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules="|".join(patterns) or DUMMY_TARGET_MODULES,
        modules_to_save=full,
        task_type="CAUSAL_LM",
        **kwargs,
    )


def check_targets(targets) -> list[str]:
    """`targets` as a list of names of `TARGETS`.

    Raises:
        `ValueError`: as in [`make_lora_config`].
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"LoRA targets must be among {', '.join(TARGETS)}; got {target!r}.")
    if not targets or {"query_transformer", "query_transformer_full"} <= set(targets):
        raise ValueError(
            "`targets` must name at least one part, and only one of `query_transformer` and `query_transformer_full`; "
            f"got {targets}."
        )
    return targets


def with_exact_weights(model):
    """Convert the trainable weights to float32. PEFT does that for LoRA, but not for `modules_to_save` of a bfloat16 base model,
    in which most updates would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _linear_names(model, part: str) -> str:
    """A regular expression for the names of the linear layers in a part of the model."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = {name.rpartition(".")[2] for name in layers if re.match(part, name)}
    return f"({'|'.join(sorted(names))})"


def load_quantized(checkpoint, compute_dtype=torch.bfloat16, **kwargs):
    """
    Load the base model for QLoRA: the language model in 4-bit NormalFloat with double quantization (arXiv 2305.14314), everything
    else unchanged. Needs bitsandbytes. Call [`~peft.prepare_model_for_kbit_training`] next.

    Args:
        checkpoint (`str`): a folder or a Hub repository.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): dtype of computations and of the
            weights that are not quantized.
        kwargs: passed to `from_pretrained`.
    """
    return AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=quantization_config(4, "cpu", compute_dtype), dtype=compute_dtype, **kwargs
    )
