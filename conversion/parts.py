"""A new MQT-LLaVA of a vision tower, a language model and a fresh query transformer, ready for stage 1."""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel

from .authors import (
    VisionTower,
    load_tokenizer,
    make_config,
    make_processor,
    read_config,
    without_prefix,
)
from .files import LazyTensor, fetch, read_tensors
from .names import add_rows
from .plan import Plan


def plan(
    language_model: str,
    vision_tower: str | None,
    num_query_tokens: int = 256,
    num_attention_heads: int | None = None,
    seed: int = 0,
) -> Plan:
    """
    Args:
        language_model (`str`): A causal language model: a folder or a Hub repository.
        vision_tower (`str`): A CLIP or SigLIP model: a folder or a Hub repository.
        num_query_tokens (`int`, *optional*, defaults to 256): M, a square number.
        num_attention_heads (`int`, *optional*): Of the query transformer. Defaults to one for every 64 channels.
        seed (`int`, *optional*, defaults to 0): Of the query transformer's fresh weights.
    """
    folder = fetch(language_model)
    text = read_config(folder)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{language_model} is a {text.model_type!r} model; what can be converted is a checkpoint of the authors' code "
            "(model_type 'llava_llama'), one of ours, or a causal language model to start a new one from"
        )
    text = getattr(text, "text_config", text)
    if vision_tower is None:
        raise ValueError(
            f"{language_model} is a {text.model_type!r} model without vision; to start a new model from it, name a vision "
            "tower with --vision-tower"
        )
    tower = VisionTower(vision_tower)
    with torch.device("meta"):
        empty = AutoModel.from_config(text)
    expected, embeddings = list(empty.state_dict()), empty.get_input_embeddings().weight
    embeddings_name = next(name for name, parameter in empty.named_parameters() if parameter is embeddings)
    if getattr(text, "tie_word_embeddings", False) and embeddings_name != "embed_tokens.weight":
        raise ValueError(
            f"{language_model} ties its head to {embeddings_name}; models that do are to have embed_tokens"
        )
    tokenizer, extra_files = load_tokenizer(folder, text.vocab_size)
    width = tower.config.hidden_size
    config = make_config(
        text,
        tower,
        tokenizer,
        num_query_tokens=num_query_tokens,
        query_transformer_num_attention_heads=num_attention_heads or max(width // 64, 1),
        # CLIP has a class token, SigLIP has none
        vision_feature_select_strategy="default" if "clip" in tower.config.model_type else "full",
    )
    stored = read_tensors(folder)
    tensors = {"model.vision_tower." + name: tensor for name, tensor in tower.tensors().items()}
    for name, tensor in without_prefix(stored, expected, language_model).items():
        tensors["model.language_model." + name] = tensor
    head = stored.get("lm_head.weight")
    if head is not None:
        tensors["lm_head.weight"] = head
    for name in ("model.language_model." + embeddings_name, "lm_head.weight"):
        if name in tensors:
            tensors[name] = add_rows(tensors[name], config.text_config.vocab_size - text.vocab_size)
    plan = Plan(
        layout="parts, with a fresh query transformer",
        config=config,
        tensors=tensors,
        processor=make_processor(config, tower, tokenizer),
        source_tensors=None,
        source_config={},
        vision_source=vision_tower,
        tokenizer_folder=folder,
        parts=(folder, tower.folder),
        base_models=[language_model, vision_tower],
        extra_files=extra_files,
    )
    fresh = fresh_query_transformer(plan, seed)
    plan.num_fresh = len(fresh)
    plan.tensors |= fresh
    return plan


def fresh_query_transformer(plan: Plan, seed: int) -> dict[str, LazyTensor]:
    """The query transformer's weights as a new model has them."""
    model = plan.empty_model()
    query_transformer = model.model.query_transformer.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        query_transformer.apply(model._init_weights)
    return {
        "model.query_transformer." + name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in query_transformer.state_dict().items()
    }
