"""Convert our checkpoint back to the authors' layout, for their code and code that builds on it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from . import authors, files
from .files import LazyTensor, cast, read_json, read_tensors, write_json
from .layouts import Plan, check_tensors, plan_full
from .names import AUTHORS_VISION_TOWER, EMBEDDINGS, rename, to_authors
from .verify import Check, stream_model, verify_ids, verify_outputs, verify_tensors


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def plan(source: Path, destination: Path) -> "AuthorsPlan":
    """The plan for the checkpoint in `source`, which is in our layout.

    Args:
        destination (`Path`): the folder of the result, needed because config.json has the absolute path of the vision tower.
    """
    config = MQTLlavaConfig.from_pretrained(source)
    check_fits(config)
    # raises if it is missing or damaged
    _, extra_files = authors.load_tokenizer(source, config.text_config.vocab_size)
    for path in extra_files.values():
        authors.check_fits_embeddings(path, authors.read_pieces(path).get_piece_size(), vocab_size(config))
    image_processor = read_json(source / "processor_config.json").get("image_processor", {})
    ours = read_tensors(source)
    check_tensors(config, ours)
    tower = str(destination.absolute() / "vision_tower")
    return AuthorsPlan(
        layout="MQT-LLaVA, to the authors' layout",
        config=config,
        settings=config.text_config.to_dict(),
        sources=ours,
        tensors=to_authors(complete_tower(ours, config), vocab_size(config)),
        # their loader resolves a relative path from the working directory
        vision_source=f"the checkpoint itself, into {tower}; config.json has this path as mm_vision_tower for the authors' "
        "loader: edit it if you move the folder",
        source=source,
        tower=tower,
        scaling={key: image_processor.get(key) for key in ("image_mean", "image_std")},
    )


def check_fits(config: MQTLlavaConfig):
    """Check the sizes that are hard-coded in the authors' code."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    sizes = {
        "the language model": (config.text_config.model_type, tuple(authors.TEXT_MODEL_TYPES.values())),
        "the vision tower": (vision.model_type, ("clip_vision_model",)),
        "the vision tower's width": (vision.hidden_size, (1024,)),
        "the number of patches": (patches, (576,)),
        "num_query_tokens": (config.num_query_tokens, (256,)),
        "query_transformer_layer_norm_eps": (config.query_transformer_layer_norm_eps, (1e-6,)),
        "query_transformer_num_attention_heads": (config.query_transformer_num_attention_heads, (authors.NUM_HEADS,)),
    }
    for name, (value, allowed) in sizes.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value}; the authors' code supports only {' or '.join(map(str, allowed))}")


def complete_tower(tensors: dict[str, LazyTensor], config: MQTLlavaConfig) -> dict[str, LazyTensor]:
    """Our tensors with a vision tower that `CLIPVisionModel` can load. Checkpoints saved by our model have no layers after the
    features: the config leaves out these layers too, and the final layer norm, which is unused, is added with default weights."""
    name, width = "model.vision_tower.post_layernorm.", config.vision_config.hidden_size
    dtype = tensors["model.vision_tower.pre_layrnorm.weight"].dtype
    ones = LazyTensor((width,), dtype, lambda: torch.ones(width, dtype=dtype))
    zeros = LazyTensor((width,), dtype, lambda: torch.zeros(width, dtype=dtype))
    return {name + "weight": ones, name + "bias": zeros, **tensors}


def vocab_size(config: MQTLlavaConfig) -> int:
    """Number of rows of the authors' embeddings: without `<image>`, if it was added at the end of the vocabulary."""
    rows = config.text_config.vocab_size
    is_theirs = original(config).get("vocab_size") == rows or config.image_token_id != rows - 1
    return rows if is_theirs else rows - 1


def original(config: MQTLlavaConfig) -> dict:
    """The authors' config, as kept in ours; empty for a model that was trained from parts."""
    return getattr(config, "authors_config", None) or {}


@dataclass(kw_only=True)
class AuthorsPlan(Plan):
    """A checkpoint in the authors' layout, with the vision tower in a separate folder.

    Args:
        source (`Path`): our checkpoint.
        tower (`str`): the path of the vision tower in the result.
        scaling (`dict`): mean and standard deviation for normalizing images.
    """

    source: Path
    tower: str
    scaling: dict

    def file_names(self, max_shard_size: int) -> list[str]:
        pieces = (self.source / "tokenizer.model").exists()
        tokenizer = ["tokenizer.model", "special_tokens_map.json"] if pieces else ["tokenizer.json"]
        weights = files.weight_file_names(authors.split_off_vision(self.tensors)[0], max_shard_size)
        return [*weights, "config.json", "tokenizer_config.json", "vision_tower", *tokenizer]

    def write(self, folder: Path, max_shard_size: int):
        language, vision = authors.split_off_vision(self.tensors)
        files.write_shards(folder, language, max_shard_size)
        tower = folder / "vision_tower"
        tower.mkdir()
        vision = {name.removeprefix(AUTHORS_VISION_TOWER): tensor for name, tensor in vision.items()}
        files.write_shards(tower, vision, max_shard_size)
        dtype = str(files.main_dtype(language)).removeprefix("torch.")
        num_layers = authors.num_vision_layers(vision)
        write_json(folder / "config.json", self.authors_config(num_layers, dtype))
        vision_config = self.config.vision_config.to_dict() | {"num_hidden_layers": num_layers, "torch_dtype": dtype}
        vision_config.pop("dtype", None)
        write_json(tower / "config.json", vision_config | {"architectures": ["CLIPVisionModel"]})
        side = vision_config["image_size"]
        preprocessing = {"crop_size": side, "size": side, "resample": 3, **self.scaling}
        preprocessing |= dict.fromkeys(("do_center_crop", "do_normalize", "do_resize"), True)
        kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
        write_json(tower / "preprocessor_config.json", preprocessing | kind)
        write_tokenizer(self.source, folder)

    def authors_config(self, num_vision_layers: int, dtype: str) -> dict:
        text = self.config.text_config.to_dict()
        rope = text.pop("rope_parameters", None) or {}
        text.pop("dtype", None)
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        return {
            "image_aspect_ratio": "pad",
            "mm_hidden_size": self.config.vision_config.hidden_size,
            "mm_patch_merge_type": "flat",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "num_visual_tokens": "second_stage",
            "query_abstractor_type": "matry_query",
            "use_mm_proj": True,
            **text,
            **original(self.config),
            "architectures": [f"Llava{text['model_type'].capitalize()}ForCausalLM"],
            "mm_vision_select_layer": self.config.vision_feature_depth - num_vision_layers - 1,
            "mm_vision_tower": self.tower,
            "model_type": f"llava_{text['model_type']}",
            "rope_scaling": {"type": rope["rope_type"], **scaling} if scaling else None,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "torch_dtype": dtype,
            "vocab_size": vocab_size(self.config),
        }

    def verify(self, folder: Path, dtype: torch.dtype | None) -> list[Check]:
        """Convert the folder to our layout again, and compare it with the source.

        Args:
            dtype (`torch.dtype`, *optional*): the dtype that the weights were cast to.
        """
        again = plan_full(folder, str(folder / "vision_tower"))
        ours = cast(complete_tower(self.sources, self.config), dtype)
        expected, found = (self.without_image_row(tensors) for tensors in (ours, again.tensors))
        processor = AutoProcessor.from_pretrained(self.source, trust_remote_code=False)
        if self.config.tie_word_embeddings:
            ours["lm_head.weight"] = ours["model.language_model.embed_tokens.weight"]
        model = stream_model(AutoModelForImageTextToText, self.config, ours)
        return [
            verify_tensors(expected, found),
            verify_ids(processor, folder),
            *verify_outputs(model, processor, again.sources, again.settings),
        ]

    def without_image_row(self, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our tensors without the embeddings of `<image>`, which the authors' layout doesn't have."""
        rows = vocab_size(self.config)
        embeddings = {rename(name) for name in EMBEDDINGS}
        return {
            name: tensor.map(lambda values: values[:rows]) if name in embeddings else tensor
            for name, tensor in tensors.items()
        }


def write_tokenizer(source: Path, folder: Path):
    """Write the SentencePiece model and its settings for the authors' pinned version of transformers."""
    if not (source / "tokenizer.model").exists():
        files.save(AutoTokenizer.from_pretrained(source, trust_remote_code=False), folder)
        return
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    settings = read_json(source / "tokenizer_config.json")
    special = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
    write_json(folder / "special_tokens_map.json", special)
    kept = {"legacy": settings.get("legacy", True), "model_max_length": settings.get("model_max_length")}
    fixed = {"add_bos_token": True, "add_eos_token": False, "padding_side": "right"}
    names = {"tokenizer_class": "LlamaTokenizer", **special}
    write_json(folder / "tokenizer_config.json", kept | fixed | names)
