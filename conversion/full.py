"""A full checkpoint of the authors: `model_type: llava_llama`, the vision tower's tensors inside or not."""

from pathlib import Path

from .authors import (
    authors_config,
    check_supported,
    load_tokenizer,
    make_processor,
    split_off_vision,
    text_config,
    vision_tower,
)
from .files import LazyTensor, read_json, read_tensors
from .names import BUFFERS, from_authors
from .plan import Plan


def recognise(source: Path) -> bool:
    config = source / "config.json"
    return config.exists() and str(read_json(config).get("model_type", "")).startswith("llava_")


def plan(source: Path, vision_tower: str | None = None, base_model: str | None = None) -> Plan:
    if base_model is not None:
        raise ValueError("a full checkpoint has its language model inside; --base-model is not for it")
    return plan_of_tensors(
        "full checkpoint", source, read_json(source / "config.json"), read_tensors(source), vision_tower
    )


def plan_of_tensors(
    layout: str,
    folder: Path,
    settings: dict,
    tensors: dict[str, LazyTensor],
    choice: str | None,
    tokenizer_folder=None,
) -> Plan:
    """The plan for tensors by the authors' names: all that the other layouts have to bring together.

    Args:
        folder (`Path`): where relative paths start from.
        settings (`dict`): the authors' config.json.
        choice (`str`, *optional*): what `--vision-tower` says.
    """
    check_supported(settings)
    vocab_size = text_config(settings).vocab_size
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    tensors, inside = split_off_vision(tensors)
    tower, vision_tensors, vision_source = vision_tower(settings, folder, inside, choice)
    tokenizer_folder = tokenizer_folder or folder
    tokenizer, extra_files = load_tokenizer(tokenizer_folder, vocab_size)
    tensors |= vision_tensors
    config = authors_config(settings, tower, tokenizer, tensors)
    return Plan(
        layout=layout,
        config=config,
        tensors=from_authors(tensors, config.text_config.vocab_size - vocab_size),
        processor=make_processor(config, tower, tokenizer, settings.get("image_aspect_ratio", "pad") == "pad"),
        source_tensors=tensors,
        source_config=settings,
        vision_source=vision_source,
        tokenizer_folder=tokenizer_folder,
        base_models=[name for name in (settings.get("_name_or_path"), tower.name) if name],
        extra_files=extra_files,
    )
