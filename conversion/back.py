"""Our checkpoint in the authors' layout again, for their code and what was built on it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from .authors import NUM_HEADS, TEXT_MODEL_TYPES, check_fits_embeddings, load_tokenizer, split_off_vision
from .files import LazyTensor, cast, main_dtype, read_json, save, write_json, write_shards
from .names import AUTHORS_VISION_TOWER, EMBEDDINGS, rename, to_authors
from .plan import check
from .tokenization import read_pieces


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def recognise(source: Path) -> bool:
    config = source / "config.json"
    return config.exists() and read_json(config).get("model_type") == "mqt_llava"


def check_fits(config: MQTLlavaConfig):
    """The sizes that are written into the authors' code."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    sizes = {
        "the language model": (config.text_config.model_type, tuple(TEXT_MODEL_TYPES.values())),
        "the vision tower": (vision.model_type, ("clip_vision_model",)),
        "the vision tower's width": (vision.hidden_size, (1024,)),
        "the number of patches": (patches, (576,)),
        "num_query_tokens": (config.num_query_tokens, (256,)),
        "query_transformer_layer_norm_eps": (config.query_transformer_layer_norm_eps, (1e-6,)),
        "query_transformer_num_attention_heads": (config.query_transformer_num_attention_heads, (NUM_HEADS,)),
    }
    for name, (value, allowed) in sizes.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value}; the authors' code takes {' or '.join(map(str, allowed))} only")


@dataclass
class BackPlan:
    """What will be written: the checkpoint without its vision tower, and that as the authors' loader wants it."""

    source: Path
    config: MQTLlavaConfig
    language: dict[str, LazyTensor]
    vision: dict[str, LazyTensor]


def plan(source: Path, tensors: dict[str, LazyTensor], dtype=None) -> BackPlan:
    config = MQTLlavaConfig.from_pretrained(source)
    check_fits(config)
    # refuse what is missing or damaged
    _, extra_files = load_tokenizer(source, config.text_config.vocab_size)
    for path in extra_files.values():
        check_fits_embeddings(path, read_pieces(path).get_piece_size(), vocab_size(config))
    read_json(source / "processor_config.json")
    check(config, tensors)
    theirs = cast(to_authors(whole_tower(tensors, config), vocab_size(config)), dtype)
    language, vision = split_off_vision(theirs)
    return BackPlan(source, config, language, vision)


def whole_tower(tensors: dict[str, LazyTensor], config: MQTLlavaConfig) -> dict[str, LazyTensor]:
    """Our tensors with a vision tower that its own library loads. A checkpoint saved by our model lacks what is behind the
    features: the layers are left out of the config too ([`num_vision_layers`]), and the last norm, which nothing reads, is
    written as a fresh one."""
    name, width = "model.vision_tower.post_layernorm.", config.vision_config.hidden_size
    dtype = tensors["model.vision_tower.pre_layrnorm.weight"].dtype
    ones = LazyTensor((width,), dtype, lambda: torch.ones(width, dtype=dtype))
    zeros = LazyTensor((width,), dtype, lambda: torch.zeros(width, dtype=dtype))
    return {name + "weight": ones, name + "bias": zeros, **tensors}


def num_vision_layers(vision: dict[str, LazyTensor]) -> int:
    return 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in vision if ".layers." in name)


def vocab_size(config: MQTLlavaConfig) -> int:
    """Rows of the authors' embeddings: all but that of `<image>`, where it was added behind the language model's own."""
    rows = config.text_config.vocab_size
    is_theirs = original(config).get("vocab_size") == rows or config.image_token_id != rows - 1
    return rows if is_theirs else rows - 1


def without_image_row(tensors: dict[str, LazyTensor], config: MQTLlavaConfig) -> dict[str, LazyTensor]:
    """Our tensors without what the authors' layout has no place for."""
    rows = vocab_size(config)
    embeddings = {rename(name) for name in EMBEDDINGS}
    return {
        name: tensor.map(lambda values: values[:rows]) if name in embeddings else tensor
        for name, tensor in tensors.items()
    }


def original(config: MQTLlavaConfig) -> dict:
    """What [`authors.authors_config`] kept of the authors' config; nothing for a model trained from parts."""
    return getattr(config, "authors_config", None) or {}


def write(plan: BackPlan, folder: Path, final_folder: Path, max_shard_size, progress):
    """Write the authors' checkpoint, the vision tower in a folder of its own.

    Args:
        folder (`Path`), final_folder (`Path`): where to write, and where the folder will be when it is whole.
    """
    write_shards(folder, plan.language, max_shard_size, progress)
    tower = folder / "vision_tower"
    tower.mkdir()
    vision = {name.removeprefix(AUTHORS_VISION_TOWER): tensor for name, tensor in plan.vision.items()}
    write_shards(tower, vision, max_shard_size, progress)
    dtype = str(main_dtype(plan.language)).removeprefix("torch.")
    num_layers = num_vision_layers(plan.vision)
    tower_name = str(final_folder.absolute() / "vision_tower")
    write_configs(plan.source, plan.config, num_layers, dtype, folder, tower, tower_name)


def write_configs(
    source: Path, config: MQTLlavaConfig, num_layers: int, dtype: str, folder: Path, tower: Path, tower_name: str
):
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict() | {"num_hidden_layers": num_layers}
    kept = original(config)
    rope = text.pop("rope_parameters", None) or {}
    text.pop("dtype", None)
    vision.pop("dtype", None)
    text_model_type = {ours: theirs for theirs, ours in TEXT_MODEL_TYPES.items()}[text["model_type"]]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    write_json(
        folder / "config.json",
        {
            "image_aspect_ratio": "pad",
            "mm_hidden_size": vision["hidden_size"],
            "mm_patch_merge_type": "flat",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "num_visual_tokens": "second_stage",
            "query_abstractor_type": "matry_query",
            "use_mm_proj": True,
            **text,
            **kept,
            "architectures": ["LlavaLlamaForCausalLM" if "llama" in text_model_type else "LlavaMistralForCausalLM"],
            "mm_vision_select_layer": config.vision_feature_depth - num_layers - 1,
            "mm_vision_tower": tower_name,
            "model_type": text_model_type,
            "rope_scaling": {"type": rope["rope_type"], **scaling} if scaling else None,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "torch_dtype": dtype,
            "vocab_size": vocab_size(config),
        },
    )
    write_json(tower / "config.json", {**vision, "architectures": ["CLIPVisionModel"], "torch_dtype": dtype})
    processing = read_json(source / "processor_config.json").get("image_processor", {})
    side = vision["image_size"]
    write_json(
        tower / "preprocessor_config.json",
        {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": processing.get("image_mean"),
            "image_std": processing.get("image_std"),
            "resample": 3,
            "size": side,
        },
    )
    write_tokenizer(source, folder)


def file_names(source: Path) -> list[str]:
    """What is written beside the weights."""
    tokenizer = "tokenizer.model" if (source / "tokenizer.model").exists() else "tokenizer.json"
    special = ["special_tokens_map.json"] if tokenizer == "tokenizer.model" else []
    return ["config.json", tokenizer, "tokenizer_config.json", "vision_tower", *special]


def write_tokenizer(source: Path, folder: Path):
    """The SentencePiece model and its settings, as the authors' pinned transformers reads them."""
    if not (source / "tokenizer.model").exists():
        save(AutoTokenizer.from_pretrained(source, trust_remote_code=False), folder)
        return
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    settings = read_json(source / "tokenizer_config.json")
    special = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": settings.get("legacy", True),
            "model_max_length": settings.get("model_max_length"),
            "padding_side": "right",
            "tokenizer_class": "LlamaTokenizer",
            **special,
        },
    )
