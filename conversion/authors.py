"""What the authors' config, tokenizer and vision tower say, as config and processor of our model."""

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
NUM_HEADS = 16  # of the query transformer; fixed in the authors' code, whatever the widths
KEPT = ("mm_", "image_", "query_", "tokenizer_", "use_mm_", "num_visual_")  # settings that converting back will need
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # besides SentencePiece's
OPENAI_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# --- configs ---


def check_supported(config: dict):
    """Refuse options of the authors' code that our model does not have: its answers would be silently wrong."""
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


def make_config(text: PreTrainedConfig, tower: "VisionTower", tokenizer, **settings) -> MQTLlavaConfig:
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


def from_authors_config(config: dict, tower: "VisionTower", tokenizer, tensors: dict[str, LazyTensor]):
    """Our config of the authors', whose M is in the shape of a tensor."""
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


def make_processor(config: MQTLlavaConfig, tower: "VisionTower", tokenizer, pad_to_square: bool = True):
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


# --- vision towers ---


@dataclass
class VisionTower:
    """A CLIP or SigLIP vision tower.

    Args:
        preprocessing (`dict`): its preprocessor_config.json.
        folder (`Path`, *optional*): where its weights are; `None` for those inside a checkpoint.
    """

    name: str
    config: PreTrainedConfig
    preprocessing: dict
    folder: Path | None = None

    def tensors(self) -> dict[str, LazyTensor]:
        """By the names of `AutoModel`'s class."""
        with torch.device("meta"):
            expected = AutoModel.from_config(self.config).state_dict()
        assert self.folder is not None  # only OpenAI's CLIP has none, and its tensors are in the checkpoint
        return without_prefix(read_tensors(self.folder), list(expected), self.name)


def read_vision_tower(name: str, near: Path | None = None) -> VisionTower:
    """
    Args:
        name (`str`): A folder or a Hub repository of a CLIP or SigLIP model, or of its vision part alone.
        near (`Path`, *optional*): Where a relative folder may start from.
    """
    folder = fetch(name, near)
    full_config = read_config(folder)
    config = getattr(full_config, "vision_config", full_config)
    if not hasattr(config, "image_size"):
        raise ValueError(f"{name} is no vision tower: its model type is {full_config.model_type!r}")
    path = folder / "preprocessor_config.json"
    if not path.exists() and "clip" not in config.model_type:
        raise ValueError(f"{name} has no preprocessor_config.json, to say how images are scaled")
    return VisionTower(name, config, read_json(path) if path.exists() else OPENAI_CLIP, folder)


def openai_clip(name: str, inside: dict[str, LazyTensor]) -> VisionTower:
    """OpenAI's CLIP, whose folder is out of reach but whose tensors are in the checkpoint. The authors' code fixes its sizes."""
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
    """Tensors of the language model and the query transformer, and those of a vision tower among them."""
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(AUTHORS_VISION_TOWER)}
    return {name: tensor for name, tensor in tensors.items() if name not in vision}, vision


def choose_vision_tower(config: dict, folder: Path, inside: dict[str, LazyTensor], choice: str | None):
    """The tower to use, its tensors by the authors' names, and where they come from in words.

    Args:
        inside (`dict[str, LazyTensor]`): vision tensors among the checkpoint's own.
        choice (`str`, *optional*): the value of `--vision-tower`, which goes before those.
    """
    name = choice or config.get("mm_vision_tower")
    if not name:
        raise ValueError("config.json names no vision tower (`mm_vision_tower`); name one with --vision-tower")
    try:
        tower = read_vision_tower(name, near=None if choice else folder)
    except ValueError as error:
        if choice:
            raise
        if not inside or not name.startswith("openai/clip-vit"):
            raise ValueError(f"{error}; name the vision tower with --vision-tower") from error
        tower = openai_clip(name, inside)
    if inside and not choice:
        return tower, inside, "the checkpoint itself; the authors' loader would take the separate " + name
    tensors = {AUTHORS_VISION_TOWER + "vision_model." + key: tensor for key, tensor in tower.tensors().items()}
    ignored = f"; {len(inside)} vision tensors in the checkpoint are ignored" if inside else ""
    return tower, tensors, name + ignored


def without_prefix(tensors: dict[str, LazyTensor], expected: list[str], name: str) -> dict[str, LazyTensor]:
    """The tensors that a model is made of, picked from a file that may hold a larger model under longer names."""
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


def load_llama_tokenizer(folder, legacy: bool, image_token: str = "<image>") -> PreTrainedTokenizerFast:
    """A Llama tokenizer that gives the ids of SentencePiece, with `image_token` added as a token of its own.

    Two things differ from `LlamaTokenizer` of transformers 5:

    * Runs of spaces. SentencePiece scores pieces made of spaces below all others, so `"  this"` is `▁`, `▁this`;
      transformers ranks their merges first and gives `▁▁`, `this`.
    * With `legacy`, a text that begins with a space still gets the prefix `▁`, at the start and after special tokens.

    Args:
        folder (`str`): Folder of `tokenizer.model` and `tokenizer_config.json`.
        legacy (`bool`): What `legacy` meant when the checkpoint was trained: a missing key is `True`.
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
        legacy=legacy,  # for those who ask; what it means is in the backend
        model_max_length=slow_names.model_max_length,
        padding_side=slow_names.padding_side,
        **{name: getattr(slow_names, name) for name in names if getattr(slow_names, name) is not None},
    )


def read_pieces(path: Path):
    """The SentencePiece model in a file.

    Raises:
        `ValueError`: naming the file, where it is empty or damaged. `ImportError`: naming a package that is missing.
    """
    try:
        import google.protobuf  # noqa: F401  without it transformers takes the file for another format
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"{error.name} is missing, to read {path.name}: pip install 'mqt-llava[convert]'") from error
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
        pieces.encode("a")  # an empty file is read as a model without pieces
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no SentencePiece model, or a damaged one") from error
    return pieces
