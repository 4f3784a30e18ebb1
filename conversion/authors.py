"""What the authors' config, tokenizer and vision tower say, as config and processor of our model."""

import copy
import math
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..modeling.adaptive_mqt_llava import VisualTokenSchedule
from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from ..modeling.image_processing_mqt_llava import MQTLlavaImageProcessor
from ..modeling.processing_mqt_llava import MQTLlavaProcessor
from .files import LazyTensor, check_inside, fetch, one_line, read_json, read_tensors
from .names import AUTHORS_QUERY_TRANSFORMER, AUTHORS_VISION_TOWER
from .tokenization import load_llama_tokenizer, read_pieces


TEXT_MODEL_TYPES = {"llava_llama": "llama", "llava_mistral": "mistral"}
NUM_HEADS = 16  # of the query transformer; fixed in the authors' code, whatever the widths
KEPT = ("mm_", "image_", "query_", "tokenizer_", "use_mm_", "num_visual_")  # settings that converting back will need
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # besides SentencePiece's
OPENAI_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def check_supported(config: dict):
    """Refuse what the authors' options can make and our model is not: the answers would be wrong without a word."""
    allowed = {
        "query_abstractor_type": ("matry_query",),
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("flat",),
        "image_aspect_ratio": ("pad", "square"),
        "mm_use_im_start_end": (False,),
    }
    for key, values in allowed.items():
        if config.get(key, values[0]) not in (None, *values):
            raise ValueError(
                f"config.json: {key} is {config[key]!r}; this converter takes {' or '.join(map(repr, values))}"
            )


def text_config(config: dict) -> PreTrainedConfig:
    """The language model's part of an authors' config."""
    model_type = config.get("model_type")
    if model_type not in TEXT_MODEL_TYPES:
        raise ValueError(f"config.json: model_type is {model_type!r}; known are {', '.join(TEXT_MODEL_TYPES)}")
    config_class = CONFIG_MAPPING[TEXT_MODEL_TYPES[model_type]]
    names = set(config_class().to_dict()) | {"rope_theta", "rope_scaling"}
    unwanted = {"model_type", "architectures", "transformers_version", "torch_dtype", "_name_or_path"}
    try:
        return config_class(**{name: value for name, value in config.items() if name in names - unwanted})
    except Exception as error:  # its checks raise what is no ValueError
        raise ValueError(f"config.json: {one_line(error.__cause__ or error)}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder in transformers' layout."""
    if not read_json(folder / "config.json").get("model_type"):
        raise ValueError(f"{folder / 'config.json'} names no model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config has checks of its own, and they raise what they like
        raise ValueError(f"cannot read {folder / 'config.json'}: {one_line(error.__cause__ or error)}") from error


class VisionTower:
    """A vision tower's config, preprocessing and tensors, these by the names of `AutoModel`'s class.

    Args:
        name (`str`): A folder or a Hub repository of a CLIP or SigLIP model, or of its vision part alone.
        near (`Path`, *optional*): Where a relative folder may start from.
    """

    def __init__(self, name: str, near: Path | None = None):
        self.name = name
        self.folder = fetch(name, near=near)
        config = read_config(self.folder)
        self.config = getattr(config, "vision_config", config)
        if not hasattr(self.config, "image_size"):
            raise ValueError(f"{name} is no vision tower: its model type is {config.model_type!r}")
        path = self.folder / "preprocessor_config.json"
        if path.exists():
            self.preprocessing = read_json(path)
        elif "clip" in self.config.model_type:
            self.preprocessing = dict(OPENAI_CLIP)
        else:
            raise ValueError(f"{name} has no preprocessor_config.json, to say how images are scaled")

    def tensors(self) -> dict[str, LazyTensor]:
        with torch.device("meta"):
            expected = AutoModel.from_config(self.config).state_dict()
        return without_prefix(read_tensors(self.folder), list(expected), self.name)


class VisionTowerInside:
    """The same for a tower whose tensors are in the checkpoint, and whose folder is out of reach: a CLIP by OpenAI."""

    def __init__(self, name: str, tensors: dict[str, LazyTensor]):
        if not name.startswith("openai/clip-vit"):
            raise ValueError(f"the vision tower {name!r} cannot be found; name it with --vision-tower")
        prefix = AUTHORS_VISION_TOWER + "vision_model."
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}
        sized = {"embeddings.patch_embedding.weight": 4, "embeddings.position_embedding.weight": 2}
        sized["encoder.layers.0.mlp.fc1.weight"] = 2
        for part, rank in sized.items():
            if len(shapes.get(part, ())) != rank:
                raise ValueError(f"the checkpoint lacks {prefix}{part}, or it has not {rank} dimensions")
        width, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
        side = math.isqrt(shapes["embeddings.position_embedding.weight"][0] - 1)
        self.name = name
        self.config = CONFIG_MAPPING["clip_vision_model"](
            hidden_size=width,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=1
            + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")),
            num_attention_heads=width // 64,
            image_size=side * patch_size,
            patch_size=patch_size,
            hidden_act="quick_gelu",
        )
        self.preprocessing = dict(OPENAI_CLIP)


def without_prefix(tensors: dict[str, LazyTensor], expected: list[str], name: str) -> dict[str, LazyTensor]:
    """The tensors that a model is made of, picked from a file that may hold a larger model under longer names."""
    prefixes = {
        stored.removesuffix(expected[0])
        for stored in tensors
        if stored == expected[0] or stored.endswith("." + expected[0])
    }
    lacking = {prefix: [key for key in expected if prefix + key not in tensors] for prefix in prefixes}
    if not lacking:
        raise ValueError(f"{name} lacks the tensor {expected[0]}")
    prefix = min(lacking, key=lambda prefix: (len(lacking[prefix]), prefix != "vision_model.", prefix))
    if lacking[prefix]:
        raise ValueError(f"{name} lacks the tensors {', '.join(prefix + key for key in lacking[prefix][:5])}")
    return {key: tensors[prefix + key] for key in expected}


def split_off_vision(tensors: dict[str, LazyTensor]):
    """Tensors of the language model and the query transformer, and those of a vision tower among them."""
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(AUTHORS_VISION_TOWER)}
    return {name: tensor for name, tensor in tensors.items() if name not in vision}, vision


def vision_tower(config: dict, folder: Path, inside: dict[str, LazyTensor], choice: str | None):
    """The tower to use, its tensors by the authors' names, and where they come from in words.

    Args:
        inside (`dict[str, LazyTensor]`): vision tensors among the checkpoint's own.
        choice (`str`, *optional*): what `--vision-tower` says; it goes before those.
    """
    named = choice or config.get("mm_vision_tower")
    if not named:
        raise ValueError("config.json names no vision tower (`mm_vision_tower`); name one with --vision-tower")
    try:
        tower = VisionTower(named, near=None if choice else folder)
    except ValueError as error:
        if choice:
            raise
        if not inside:
            raise ValueError(f"{error}; name the vision tower with --vision-tower") from error
        tower = VisionTowerInside(named, inside)
    if inside and not choice:
        return tower, inside, "the checkpoint itself; the authors' loader would take the separate " + named
    tensors = {AUTHORS_VISION_TOWER + "vision_model." + key: tensor for key, tensor in tower.tensors().items()}
    ignored = f"; {len(inside)} vision tensors in the checkpoint are ignored" if inside else ""
    return tower, tensors, named + ignored


def load_tokenizer(folder: Path, vocab_size: int):
    """The tokenizer of a language model's folder, with `<image>`, and the files that the authors' code would need.

    Args:
        vocab_size (`int`): rows of the language model's embeddings.

    Raises:
        `ValueError`: naming the file, for a tokenizer that is missing, damaged or another model's. transformers makes one
            of a few words where there is no file.
    """
    kept = {name: check_inside(folder, name) for name in ("tokenizer.model",) if (folder / name).exists()}
    if not kept and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: none of tokenizer.model, {', '.join(TOKENIZER_FILES)} is there")
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"{folder} has no tokenizer_config.json, without which prompts would get other ids")
    if reads_pieces(folder):
        num_words = read_pieces(folder / "tokenizer.model").get_piece_size()
        check_fits_embeddings(folder / "tokenizer.model", num_words, vocab_size)
        legacy = read_json(folder / "tokenizer_config.json").get("legacy")
        return load_llama_tokenizer(folder, legacy=True if legacy is None else legacy), kept
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file can lead its reader to any exception
        raise ValueError(f"cannot read the tokenizer of {folder}: {one_line(error)}") from error
    check_fits_embeddings(folder, tokenizer.vocab_size, vocab_size)  # added tokens may be behind the embeddings
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, kept


def reads_pieces(folder: Path) -> bool:
    """Whether a folder's tokenizer is Llama's, of SentencePiece's own file."""
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class", "LlamaTokenizer")
    return (folder / "tokenizer.model").exists() and name.startswith("LlamaTokenizer")


def check_fits_embeddings(path: Path, num_words: int, vocab_size: int):
    """Refuse a tokenizer that is another model's. Embeddings have a few more rows than there are words, where they were
    rounded up: of the models in use, one in fifty at most."""
    if num_words > vocab_size or (vocab_size - num_words) * 8 > vocab_size:
        raise ValueError(
            f"{path} has {num_words} words, and the language model {vocab_size} embeddings: is it another model's tokenizer?"
        )


def make_config(text: PreTrainedConfig, tower, tokenizer, **settings) -> MQTLlavaConfig:
    """Our config, with a place for `<image>` in the vocabulary."""
    text = copy.deepcopy(text)
    text.name_or_path = tower.config.name_or_path = ""  # a folder on this machine
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    text.vocab_size = max(text.vocab_size, image_token_id + 1)
    return MQTLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=image_token_id,
        tie_word_embeddings=getattr(text, "tie_word_embeddings", False),
        **settings,
    )


def authors_config(config: dict, tower, tokenizer, tensors: dict[str, LazyTensor]) -> MQTLlavaConfig:
    """Our config of the authors', as far as it is not in the tensors' shapes."""
    query = tensors.get(AUTHORS_QUERY_TRANSFORMER + "query")
    if query is None or len(query.shape) != 2:
        raise ValueError(f"there is no matrix {AUTHORS_QUERY_TRANSFORMER}query: is this an MQT-LLaVA checkpoint?")
    depth, layer = tower.config.num_hidden_layers, config.get("mm_vision_select_layer", -2)
    if layer not in range(-depth - 1, depth + 1):
        raise ValueError(
            f"config.json: mm_vision_select_layer is {layer!r}; the vision tower has {depth} layers, from {-depth - 1} to {depth}"
        )
    return make_config(
        text_config(config),
        tower,
        tokenizer,
        num_query_tokens=query.shape[0],
        query_transformer_num_attention_heads=NUM_HEADS,
        vision_feature_layer=layer,
        authors_config={key: value for key, value in config.items() if key.startswith(KEPT) or key == "vocab_size"},
    )


def make_processor(config: MQTLlavaConfig, tower, tokenizer, pad_to_square: bool = True) -> MQTLlavaProcessor:
    """Our processor; images are padded to a square as LLaVA 1.5 has it, or cropped as CLIP's own processor does."""
    tokenizer.padding_side = "left"  # as `generate` wants a batch
    side = config.vision_config.image_size
    settings = {key: tower.preprocessing[key] for key in ("image_mean", "image_std") if key in tower.preprocessing}
    square = {"height": side, "width": side}
    size = square if pad_to_square else {"shortest_edge": side}
    image_processor = MQTLlavaImageProcessor(
        do_pad=pad_to_square, size=size, do_center_crop=not pad_to_square, crop_size=square, resample=3, **settings
    )
    return MQTLlavaProcessor(image_processor, tokenizer, num_query_tokens=config.num_query_tokens)


def make_generation_config(config: MQTLlavaConfig, tokenizer) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.image_token_id],
        visual_token_schedule=VisualTokenSchedule.default(config.num_query_tokens).to_dict(),
    )
