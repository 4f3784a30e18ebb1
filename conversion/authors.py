"""Convert the authors' config, tokenizer and vision tower to the config and processor of our model."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from ..modeling.image_processing_mqt_llava import MQTLlavaImageProcessor
from ..modeling.processing_mqt_llava import MQTLlavaProcessor
from .files import LazyTensor, check_inside, fetch, first, one_line, read_json, read_tensors
from .names import AUTHORS_QUERY_TRANSFORMER, AUTHORS_VISION_TOWER


TEXT_MODEL_TYPES = {"llava_llama": "llama", "llava_mistral": "mistral"}
NUM_HEADS = 16  # of the query transformer; fixed in the authors' code for all widths
KEPT = ("mm_", "image_", "query_", "tokenizer_", "use_mm_", "num_visual_")  # settings needed to convert back
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # besides SentencePiece's
OPENAI_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# --- configs ---


def check_supported(config: dict):
    """Refuse options of the authors' code that our model doesn't have, since its answers would be silently wrong."""
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
                f"config.json: {key} is {config[key]!r}; this converter supports {' or '.join(map(repr, values))}"
            )


def text_config(config: dict) -> PreTrainedConfig:
    """The language model's config, from the authors' config.json."""
    model_type = config.get("model_type")
    if model_type not in TEXT_MODEL_TYPES:
        raise ValueError(f"config.json: model_type is {model_type!r}; supported are {', '.join(TEXT_MODEL_TYPES)}")
    config_class = CONFIG_MAPPING[TEXT_MODEL_TYPES[model_type]]
    names = set(config_class().to_dict()) | {"rope_theta", "rope_scaling"}
    unwanted = {"model_type", "architectures", "transformers_version", "torch_dtype", "_name_or_path"}
    try:
        return config_class(**{name: value for name, value in config.items() if name in names - unwanted})
    except Exception as error:  # its checks raise errors that are not a ValueError
        raise ValueError(f"config.json: {one_line(error.__cause__ or error)}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder in transformers' layout."""
    if not read_json(folder / "config.json").get("model_type"):
        raise ValueError(f"{folder / 'config.json'} has no model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class has its own checks and exceptions
        raise ValueError(f"cannot read {folder / 'config.json'}: {one_line(error.__cause__ or error)}") from error


def make_config(text: PreTrainedConfig, tower: "VisionTower", tokenizer, **settings) -> MQTLlavaConfig:
    """Our config, with `<image>` in the vocabulary."""
    text = copy.deepcopy(text)
    text.name_or_path = tower.config.name_or_path = ""  # a local folder
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    text.vocab_size = max(text.vocab_size, image_token_id + 1)
    return MQTLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=image_token_id,
        tie_word_embeddings=getattr(text, "tie_word_embeddings", False),
        **settings,
    )


def from_authors_config(config: dict, tower: "VisionTower", tokenizer, tensors: dict[str, LazyTensor]):
    """Our config, from the authors' config and their tensors, whose shapes determine M."""
    query = tensors.get(AUTHORS_QUERY_TRANSFORMER + "query")
    if query is None or len(query.shape) != 2:
        raise ValueError(
            f"the checkpoint has no matrix {AUTHORS_QUERY_TRANSFORMER}query: is this an MQT-LLaVA checkpoint?"
        )
    depth, layer = tower.config.num_hidden_layers, config.get("mm_vision_select_layer", -2)
    if layer not in range(-depth - 1, depth + 1):
        raise ValueError(
            f"config.json: mm_vision_select_layer is {layer!r}; with the vision tower's {depth} layers, it must be from {-depth - 1} to {depth}"
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


def make_processor(config: MQTLlavaConfig, tower: "VisionTower", tokenizer, pad_to_square: bool = True):
    """Our processor. Images are padded to a square as in LLaVA 1.5, or cropped as by CLIP's own processor."""
    tokenizer.padding_side = "left"  # for `generate`
    side = config.vision_config.image_size
    settings = {key: tower.preprocessing[key] for key in ("image_mean", "image_std") if key in tower.preprocessing}
    square = {"height": side, "width": side}
    size = square if pad_to_square else {"shortest_edge": side}
    image_processor = MQTLlavaImageProcessor(
        do_pad=pad_to_square, size=size, do_center_crop=not pad_to_square, crop_size=square, resample=3, **settings
    )
    return MQTLlavaProcessor(image_processor, tokenizer, num_query_tokens=config.num_query_tokens)


# --- vision towers ---


@dataclass
class VisionTower:
    """A CLIP or SigLIP vision tower.

    Args:
        preprocessing (`dict`): the content of its preprocessor_config.json.
        folder (`Path`, *optional*): the folder of its weights; `None` if they are part of the checkpoint.
    """

    name: str
    config: PreTrainedConfig
    preprocessing: dict
    folder: Path | None = None

    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors by their names in the class that `AutoModel` builds."""
        with torch.device("meta"):
            expected = AutoModel.from_config(self.config).state_dict()
        assert self.folder is not None  # only OpenAI's CLIP has none, and its tensors are in the checkpoint
        return without_prefix(read_tensors(self.folder), list(expected), self.name)


def read_vision_tower(name: str, near: Path | None = None) -> VisionTower:
    """
    Args:
        name (`str`): A folder or a Hub repository of a CLIP or SigLIP model, or of its vision tower only.
        near (`Path`, *optional*): A folder that a relative path may start from.
    """
    folder = fetch(name, near)
    full_config = read_config(folder)
    config = getattr(full_config, "vision_config", full_config)
    if not hasattr(config, "image_size"):
        raise ValueError(f"{name} is not a vision tower: its model_type is {full_config.model_type!r}")
    path = folder / "preprocessor_config.json"
    if not path.exists() and "clip" not in config.model_type:
        raise ValueError(f"{name} has no preprocessor_config.json, which is needed to normalize images")
    return VisionTower(name, config, read_json(path) if path.exists() else OPENAI_CLIP, folder)


def openai_clip(name: str, inside: dict[str, LazyTensor]) -> VisionTower:
    """OpenAI's CLIP, if its folder is not available but the checkpoint has its tensors. The authors' code fixes its sizes."""
    widths = [tensor.shape[0] for name, tensor in inside.items() if name.endswith("mlp.fc1.weight") and tensor.shape]
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=widths[0] if widths else 4096,
        num_hidden_layers=num_vision_layers(inside),
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    return VisionTower(name, config, OPENAI_CLIP)


def num_vision_layers(tensors: dict[str, LazyTensor]) -> int:
    return len({name.split(".layers.")[1].split(".")[0] for name in tensors if ".layers." in name})


def split_off_vision(tensors: dict[str, LazyTensor]):
    """Split the tensors into those of the language model and query transformer, and those of a vision tower."""
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(AUTHORS_VISION_TOWER)}
    return {name: tensor for name, tensor in tensors.items() if name not in vision}, vision


def choose_vision_tower(config: dict, folder: Path, inside: dict[str, LazyTensor], choice: str | None):
    """The tower to use, its tensors by the authors' names, and a description of their source.

    Args:
        inside (`dict[str, LazyTensor]`): the vision tower's tensors in the checkpoint.
        choice (`str`, *optional*): the value of `--vision-tower`, which takes precedence over those.
    """
    name = choice or config.get("mm_vision_tower")
    if not name:
        raise ValueError("config.json has no vision tower (`mm_vision_tower`); pass one with --vision-tower")
    try:
        tower = read_vision_tower(name, near=None if choice else folder)
    except ValueError as error:
        if choice:
            raise
        if not inside or not name.startswith("openai/clip-vit"):
            raise ValueError(f"{error}; pass the vision tower with --vision-tower") from error
        tower = openai_clip(name, inside)
    if inside and not choice:
        return tower, inside, "the checkpoint itself; the authors' loader would use the separate " + name
    tensors = {AUTHORS_VISION_TOWER + "vision_model." + key: tensor for key, tensor in tower.tensors().items()}
    ignored = f"; {len(inside)} vision tensors in the checkpoint are ignored" if inside else ""
    return tower, tensors, name + ignored


def without_prefix(tensors: dict[str, LazyTensor], expected: list[str], name: str) -> dict[str, LazyTensor]:
    """The tensors of a model, picked from those of a larger model, where their names have a prefix."""
    prefixes = [stored.removesuffix(expected[0]) for stored in tensors if f".{stored}".endswith(f".{expected[0]}")]
    if not prefixes:
        raise ValueError(f"{name} lacks the tensor {expected[0]}")
    lacking = {prefix: [prefix + key for key in expected if prefix + key not in tensors] for prefix in prefixes}
    prefix = min(lacking, key=lambda prefix: (len(lacking[prefix]), prefix != "vision_model.", prefix))
    if lacking[prefix]:
        raise ValueError(f"{name} lacks the tensors {first(lacking[prefix])}")
    return {key: tensors[prefix + key] for key in expected}


# --- tokenizers ---


def load_tokenizer(folder: Path, vocab_size: int):
    """Load a language model's tokenizer, with `<image>` added, and the files that the authors' code would need.

    Args:
        vocab_size (`int`): number of rows of the language model's embeddings.

    Raises:
        `ValueError`: for a tokenizer that is missing, damaged or another model's. (transformers silently creates a tokenizer with a
            few words if the file is missing.)
    """
    kept = {name: check_inside(folder, name) for name in ("tokenizer.model",) if (folder / name).exists()}
    if not kept and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: it has none of tokenizer.model, {', '.join(TOKENIZER_FILES)}")
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"{folder} has no tokenizer_config.json, which the ids of prompts depend on")
    if reads_pieces(folder):
        num_words = read_pieces(folder / "tokenizer.model").get_piece_size()
        check_fits_embeddings(folder / "tokenizer.model", num_words, vocab_size)
        legacy = read_json(folder / "tokenizer_config.json").get("legacy")
        return load_llama_tokenizer(folder, legacy=True if legacy is None else legacy), kept
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # readers raise all kinds of exceptions on damaged files
        raise ValueError(f"cannot read the tokenizer of {folder}: {one_line(error)}") from error
    check_fits_embeddings(folder, tokenizer.vocab_size, vocab_size)  # added tokens may exceed the embeddings
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, kept


def reads_pieces(folder: Path) -> bool:
    """Whether a folder's tokenizer is Llama's, with a SentencePiece model."""
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class", "LlamaTokenizer")
    return (folder / "tokenizer.model").exists() and name.startswith("LlamaTokenizer")


def check_fits_embeddings(path: Path, num_words: int, vocab_size: int):
    """Refuse another model's tokenizer. Embeddings may have more rows than the tokenizer has tokens if they were padded, in the
    models in use by at most 2 %."""
    if num_words > vocab_size or (vocab_size - num_words) * 8 > vocab_size:
        raise ValueError(
            f"{path} has {num_words} tokens, but the language model has {vocab_size} embeddings: is it another model's tokenizer?"
        )


def load_llama_tokenizer(folder, legacy: bool, image_token: str = "<image>") -> PreTrainedTokenizerFast:
    """A Llama tokenizer that gives the same ids as SentencePiece, with `image_token` as a special token.

    It differs from `LlamaTokenizer` of transformers 5 in two ways:

    * Runs of spaces. SentencePiece scores pieces of spaces below all others, so `"  this"` is `▁`, `▁this`; transformers ranks their
      merges first and gives `▁▁`, `this`.
    * With `legacy`, a text that begins with a space still gets the prefix `▁`, at the start and after special tokens.

    Args:
        folder (`str`): A folder with `tokenizer.model` and `tokenizer_config.json`.
        legacy (`bool`): `legacy` as it was when the checkpoint was trained; a missing key means `True`.
        image_token (`str`): The placeholder of an image.
    """
    slow_names = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
    specification = json.loads(slow_names.backend_tokenizer.to_str())
    merges = specification["model"]["merges"]
    specification["model"]["merges"] = sorted(merges, key=lambda merge: not "".join(merge).strip("▁"))
    backend = Tokenizer.from_str(json.dumps(specification))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={"image_token": image_token},
        legacy=legacy,  # for information only; the backend implements it
        model_max_length=slow_names.model_max_length,
        padding_side=slow_names.padding_side,
        **{name: getattr(slow_names, name) for name in names if getattr(slow_names, name) is not None},
    )


def read_pieces(path: Path):
    """Load a SentencePiece model.

    Raises:
        `ValueError`: for an empty or damaged file.
        `ImportError`: for a missing package.
    """
    try:
        import google.protobuf  # noqa: F401  without it, transformers takes the file for another format
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"{error.name} is needed to read {path.name}: pip install 'mqt-llava[convert]'") from error
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
        pieces.encode("a")  # an empty file is read as a model without pieces
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model, or it is damaged") from error
    return pieces
