"""Plan the conversion of each layout to ours: a [`Plan`] is made before anything is computed or written."""

import math
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoProcessor, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from .. import modeling
from ..modeling.adaptive_mqt_llava import VisualTokenSchedule
from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from ..modeling.modeling_mqt_llava import MQTLlavaForConditionalGeneration
from ..modeling.processing_mqt_llava import MQTLlavaProcessor
from . import authors, files
from .files import LazyTensor, cast, fetch, read_file, read_json, read_tensors
from .names import AUTHORS_QUERY_TRANSFORMER, BUFFERS, add_rows, from_authors, rename, to_authors
from .verify import Check, load_model, verify_ids, verify_outputs, verify_parts, verify_tensors


if TYPE_CHECKING:
    from peft import LoraConfig


STAGE1_FILES = (
    "query_abstractor.bin",
    "mm_query_abstractor.bin",
)  # the second one is in the trainer's checkpoint folders
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
CODE_FILES = [path.name for path in Path(modeling.__file__).parent.glob("*_mqt_llava.py")]
FOLDER_FILES = (  # in addition to weights and code
    *"chat_template.jinja config.json generation_config.json processor_config.json".split(),
    *"tokenizer.json tokenizer_config.json".split(),
)


@dataclass(kw_only=True)
class Plan(ABC):
    """A planned conversion. Subclasses can `write` the result to a folder and `verify` it.

    Args:
        layout (`str`): a description of the source.
        config (`MQTLlavaConfig`): the model's config in our layout.
        settings (`dict`, *optional*): the language model's config in the source. `None` for a new model, which the authors'
            computation doesn't apply to.
        sources (`dict[str, LazyTensor]`): the tensors to read, by their names in the source.
        tensors (`dict[str, LazyTensor]`): the tensors to write, by their names in the result.
        vision_source (`str`): a description of the vision tower's source.
        base_models (`list[str]`): the models that the result is made of, for the model card.
    """

    layout: str
    config: MQTLlavaConfig
    settings: Any
    sources: dict[str, LazyTensor]
    tensors: dict[str, LazyTensor]
    vision_source: str
    base_models: list[str] = field(default_factory=list)

    @abstractmethod
    def file_names(self, max_shard_size: int) -> list[str]: ...

    @abstractmethod
    def write(self, folder: Path, max_shard_size: int): ...

    @abstractmethod
    def verify(self, folder: Path, dtype: torch.dtype | None) -> list[Check]: ...


@dataclass(kw_only=True)
class CheckpointPlan(Plan):
    """A checkpoint in our layout.

    Args:
        processor (`MQTLlavaProcessor`): the processor to save.
        tokenizer_folder (`Path`): the folder of the source's tokenizer.
        extra_files (`dict[str, Path]`): files to copy unchanged.
    """

    processor: MQTLlavaProcessor
    tokenizer_folder: Path
    extra_files: dict[str, Path]

    def file_names(self, max_shard_size: int) -> list[str]:
        return [*files.weight_file_names(self.tensors, max_shard_size), *CODE_FILES, *FOLDER_FILES, *self.extra_files]

    def write(self, folder: Path, max_shard_size: int):
        """Write a complete checkpoint folder; the weights first, which are the most likely to fail."""
        files.write_shards(folder, self.tensors, max_shard_size)
        for name, path in self.extra_files.items():
            shutil.copyfile(path, folder / name)
        model = empty_model(self.config)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = files.main_dtype(self.tensors)
        custom_object_save(model, folder)
        model.config.save_pretrained(folder)
        tokenizer = self.processor.tokenizer
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[self.config.image_token_id],
            visual_token_schedule=VisualTokenSchedule.default(self.config.num_query_tokens).to_dict(),
        ).save_pretrained(folder)
        files.save(self.processor, folder)

    def verify(self, folder: Path, dtype: torch.dtype | None) -> list[Check]:
        """Compare the folder, loaded through the Auto classes, with its source.

        Args:
            dtype (`torch.dtype`, *optional*): the dtype that the weights were cast to.
        """
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        return [
            verify_tensors(self.tensors, read_tensors(folder)),
            verify_ids(processor, self.tokenizer_folder),
            *self.verify_outputs(load_model(folder), processor, dtype),
        ]

    def verify_outputs(self, model, processor, dtype) -> list[Check]:
        return verify_outputs(model, processor, cast(self.sources, dtype), self.settings)


@dataclass(kw_only=True)
class NewModelPlan(CheckpointPlan):
    """A new model with a newly initialised query transformer. To verify it, its parts are compared with the originals.

    Args:
        language_model (`dict[str, LazyTensor]`): the language model's tensors, by their names in its own class.
        tower_folder (`Path`): the folder of the vision tower.
    """

    language_model: dict[str, LazyTensor]
    tower_folder: Path

    def verify_outputs(self, model, processor, dtype) -> list[Check]:
        config = authors.read_config(self.tokenizer_folder)
        config = getattr(config, "text_config", config)
        return verify_parts(model, processor, config, cast(self.language_model, dtype), self.tower_folder, dtype)


@dataclass(kw_only=True)
class AdapterPlan(Plan):
    """A PEFT adapter for the checkpoint in the folder `base`, which is in our layout."""

    base: Path
    scaling: float
    peft_config: "LoraConfig"

    def file_names(self, max_shard_size: int) -> list[str]:
        return ["adapter_config.json", "adapter_model.safetensors"]

    def write(self, folder: Path, max_shard_size: int):
        self.peft_config.save_pretrained(str(folder))
        files.write_safetensors(folder / "adapter_model.safetensors", self.tensors)

    def verify(self, folder: Path, dtype: torch.dtype | None) -> list[Check]:
        """Compare the base model with the adapter, as loaded by PEFT, with the authors' LoRA folder merged into that base model."""
        processor = AutoProcessor.from_pretrained(self.base, trust_remote_code=False)
        theirs = cast(to_authors(read_tensors(self.base), self.config.text_config.vocab_size), torch.float32)
        source = merge_lora(theirs, cast(self.sources, dtype), self.scaling, self.base)
        return verify_outputs(load_model(self.base, folder), processor, source, self.settings)


def empty_model(config: MQTLlavaConfig) -> MQTLlavaForConditionalGeneration:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return MQTLlavaForConditionalGeneration(config)


def check_tensors(config: MQTLlavaConfig, tensors: dict[str, LazyTensor]):
    """Check the names and shapes of the tensors against the model's. A tied `lm_head` is removed from them. The vision tower's layers
    after the features are allowed.

    Raises:
        `ValueError`: for tensors that are missing, unknown or of another shape.
    """
    model = empty_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)")
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("has unknown", sorted(name for name in tensors.keys() - expected.keys() if not unused.search(name))),
    ):
        if names:
            raise ValueError(f"the checkpoint {problem} tensors: {files.first(names)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has the shape {tensors[name].shape}; according to the config it should be {shape}"
            )


# --- full checkpoints ---


def plan_full(source: Path, vision_tower: str | None = None) -> CheckpointPlan:
    """The plan for a full checkpoint, `model_type: llava_llama`, with or without the vision tower's tensors."""
    settings, tensors = read_json(source / "config.json"), read_tensors(source)
    return plan_of_tensors("full checkpoint", source, settings, tensors, vision_tower)


def plan_of_tensors(
    layout: str,
    folder: Path,
    settings: dict,
    tensors: dict[str, LazyTensor],
    vision_tower: str | None,
    tokenizer_folder: Path | None = None,
) -> CheckpointPlan:
    """The plan for tensors with the authors' names, as in full checkpoints. Other layouts are converted to these first.

    Args:
        folder (`Path`): the folder that a relative path of the vision tower starts from.
        settings (`dict`): the content of the authors' config.json.
        vision_tower (`str`, *optional*): the value of `--vision-tower`.
        tokenizer_folder (`Path`, *optional*): the folder of the tokenizer. Defaults to `folder`.
    """
    authors.check_supported(settings)
    vocab_size = authors.text_config(settings).vocab_size
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    tensors, inside = authors.split_off_vision(tensors)
    tower, vision_tensors, vision_source = authors.choose_vision_tower(settings, folder, inside, vision_tower)
    tokenizer, extra_files = authors.load_tokenizer(tokenizer_folder or folder, vocab_size)
    tensors |= vision_tensors
    config = authors.from_authors_config(settings, tower, tokenizer, tensors)
    ours = from_authors(tensors, config.text_config.vocab_size - vocab_size)
    check_tensors(config, ours)
    return CheckpointPlan(
        layout=layout,
        config=config,
        processor=authors.make_processor(config, tower, tokenizer, settings.get("image_aspect_ratio", "pad") == "pad"),
        sources=tensors,
        tensors=ours,
        settings=settings,
        vision_source=vision_source,
        tokenizer_folder=tokenizer_folder or folder,
        base_models=[name for name in (settings.get("_name_or_path"), tower.name) if name],
        extra_files=extra_files,
    )


# --- stage-1 weights ---


def find_stage1(source: Path) -> Path | None:
    """The file that stage 1 saves, which has only the query transformer."""
    if source.is_file():
        if source.suffix != ".bin":
            raise ValueError(f"{source} is a file; pass its folder, or a {STAGE1_FILES[0]}")
        return source
    return next((source / name for name in STAGE1_FILES if (source / name).exists()), None)


def plan_stage1(source: Path, vision_tower: str | None = None, base_model: str | None = None) -> CheckpointPlan:
    """The plan for a stage-1 query transformer on the language model `base_model`."""
    file = find_stage1(source)
    if file is None:
        raise ValueError(f"{source} has none of the files {', '.join(STAGE1_FILES)}")
    if base_model is None:
        raise ValueError("stage-1 weights are only the query transformer; pass the language model with --base-model")
    base = fetch(base_model)
    config_file = file.parent / "config.json"
    settings = read_json(config_file) if config_file.exists() else {}
    settings = combine(read_json(base / "config.json"), settings, base_model)
    trained = unwrapped(read_file(file))
    if unknown := [name for name in trained if not name.startswith(AUTHORS_QUERY_TRANSFORMER)]:
        raise ValueError(f"{file} contains more than a query transformer: {files.first(unknown)}")
    return plan_of_tensors("stage-1 weights", file.parent, settings, read_tensors(base) | trained, vision_tower, base)


def combine(base: dict, settings: dict, base_model: str) -> dict:
    """The config of a full checkpoint: the language model's, with the settings about images from the trained folder's."""
    known = {model_type: name for name, model_type in authors.TEXT_MODEL_TYPES.items()}
    if base.get("model_type") not in known:
        raise ValueError(f"{base_model} is a {base.get('model_type')!r} model; supported are {', '.join(known)}")
    images = {key: value for key, value in settings.items() if key.startswith(("mm_", "image_", "query_"))}
    names = {"model_type": known[base["model_type"]], "_name_or_path": base_model}
    return {"mm_vision_select_layer": -2, **base, **images, **names}


def unwrapped(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by the authors' names, without the prefixes of a trainer's wrappers."""

    def full_name(name: str) -> str:
        name = re.sub(r".*query_abstractor\.", AUTHORS_QUERY_TRANSFORMER, name)
        return name.removeprefix("base_model.model.").replace(".default.", ".")

    return {full_name(name): tensor for name, tensor in tensors.items()}


# --- LoRA folders ---


def plan_lora(source: Path, vision_tower: str | None = None, base_model: str | None = None) -> CheckpointPlan:
    """The plan for a LoRA folder of the authors' trainer, merged into its base model: a language model or a full checkpoint."""
    adapter, trained = read_lora(source)
    base_model = base_model or adapter.get("base_model_name_or_path")
    if not base_model:
        raise ValueError("adapter_config.json has no base model; pass it with --base-model")
    base = fetch(base_model, near=source)
    settings, near = read_json(base / "config.json"), base
    if not str(settings.get("model_type", "")).startswith("llava_"):
        of_images = read_json(source / "config.json") if (source / "config.json").exists() else {}
        settings, near = combine(settings, of_images, base_model), source
    tensors = merge_lora(read_tensors(base), trained, lora_scaling(adapter), base_model)
    return plan_of_tensors("LoRA folder, merged", near, settings, tensors, vision_tower, base)


def read_lora(folder: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The adapter_config.json of a LoRA folder, and its tensors by the authors' names: `lora_A` and `lora_B` of the adapted modules,
    and the weights that were trained in full."""
    adapter = read_json(folder / "adapter_config.json")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if file is None:
        raise ValueError(f"{folder} has none of the files {', '.join(ADAPTER_FILES)}")
    tensors = unwrapped(read_file(file))
    if (folder / NON_LORA_FILE).exists():
        tensors |= unwrapped(read_file(folder / NON_LORA_FILE))
    return adapter, tensors


def split_lora(tensors: dict[str, LazyTensor]):
    """`({module: (A, B)}, {name: tensor trained in full})` of a LoRA folder's tensors."""
    pairs, others = {}, dict(tensors)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        pairs[module] = others.pop(name), others.pop(f"{module}.lora_B.weight", None)
        if pairs[module][1] is None:
            raise ValueError(f"the adapter has only one of lora_A and lora_B for {module}")
    if unknown := [name for name in others if "lora_" in name]:
        raise ValueError(f"the adapter has the unknown tensor {unknown[0]}")
    return pairs, others


def merge_lora(tensors: dict[str, LazyTensor], trained: dict[str, LazyTensor], scaling: float, base_model):
    """A base model's tensors with `W + scaling * B A` for every adapted weight, computed in float32."""
    pairs, others = split_lora(trained)
    changed = {}
    for module, (a, b) in pairs.items():
        name = module + ".weight"
        if name not in tensors:
            raise ValueError(f"the adapter is for {module}, which is not in the base model {base_model}")
        weight = tensors[name]
        if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not fit {name} {weight.shape}")

        def merged(weight=weight, a=a, b=b):
            # in place, so that the weight is copied only once
            values = weight.load().to(torch.float32, copy=True)
            return values.addmm_(b.load().float(), a.load().float(), alpha=scaling).to(weight.dtype)

        changed[name] = LazyTensor(weight.shape, weight.dtype, merged)
    return tensors | changed | others


def lora_scaling(adapter: dict) -> float:
    if adapter.get("peft_type", "LORA") != "LORA" or not adapter.get("r") or not adapter.get("lora_alpha"):
        raise ValueError("adapter_config.json must be that of a LoRA adapter, with `r` and `lora_alpha`")
    unsupported = [key for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if adapter.get(key)]
    if unsupported:
        raise ValueError(f"adapter_config.json: {', '.join(unsupported)} is not supported")
    rank = adapter["r"]
    return adapter["lora_alpha"] / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def plan_adapter(source: Path, base_model: str | None) -> AdapterPlan:
    """The plan for a PEFT adapter: LoRA on the language model, the query transformer in `modules_to_save`.

    Args:
        base_model (`str`): the MQT-LLaVA checkpoint in our layout that the adapter is for.
    """
    from peft import LoraConfig

    base = None if base_model is None else fetch(base_model)
    if base_model is None or base is None or read_json(base / "config.json").get("model_type") != "mqt_llava":
        raise ValueError(
            "--keep-adapter needs --base-model: the converted MQT-LLaVA checkpoint that the adapter is for"
        )
    adapter, trained = read_lora(source)
    pairs, others = split_lora(trained)
    beside = [name for name in others if not name.startswith(AUTHORS_QUERY_TRANSFORMER)]
    if beside:
        raise ValueError(f"{beside[0]} was trained in full, besides the adapter; convert without --keep-adapter")
    tensors = from_authors(others)
    for module, (a, b) in pairs.items():
        ours = rename(module + ".weight").removesuffix(".weight")
        if not ours.startswith("model.language_model."):
            raise ValueError(f"the adapter is also for {module}; convert without --keep-adapter")
        tensors |= {ours + ".lora_A.weight": a, ours + ".lora_B.weight": b}
    config = MQTLlavaConfig.from_pretrained(base)
    suffixes = sorted({module.rsplit(".", 1)[1] for module in pairs})
    return AdapterPlan(
        layout="LoRA folder, kept as a PEFT adapter",
        config=config,
        settings=config.text_config.to_dict(),
        sources=trained,
        tensors={"base_model.model." + name: tensor for name, tensor in tensors.items()},
        vision_source=base_model,
        base_models=[base_model],
        base=base,
        scaling=lora_scaling(adapter),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter["r"],
            lora_alpha=adapter["lora_alpha"],
            lora_dropout=adapter.get("lora_dropout", 0.0),
            use_rslora=adapter.get("use_rslora", False),
            target_modules=rf".*\.language_model\..*\.({'|'.join(suffixes)})",  # the vision tower has such names too
            modules_to_save=["query_transformer"] if others else None,
            base_model_name_or_path=base_model,
            inference_mode=True,
        ),
    )


# --- new models ---


def plan_parts(language_model: str, vision_tower: str | None) -> NewModelPlan:
    """The plan for a new model, to be trained in stage 1, from a language model, a vision tower and a new query transformer.

    Args:
        language_model (`str`), vision_tower (`str`): folders or Hub repositories of a causal language model and of a CLIP or
            SigLIP model.
    """
    folder = fetch(language_model)
    text = authors.read_config(folder)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{language_model} is a {text.model_type!r} model; a checkpoint of the authors' code (model_type 'llava_llama') or "
            "one of ours can be converted, and a causal language model can start a new model"
        )
    text = getattr(text, "text_config", text)
    if vision_tower is None:
        raise ValueError(
            f"{language_model} is a {text.model_type!r} model without vision; to start a new model from it, pass a vision "
            "tower with --vision-tower"
        )
    tower = authors.read_vision_tower(vision_tower)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    prefix, embeddings = model.base_model_prefix + ".", model.get_input_embeddings().weight
    embeddings_name = next(name for name, weight in model.base_model.named_parameters() if weight is embeddings)
    tied = getattr(text, "tie_word_embeddings", False)
    if tied and embeddings_name != "embed_tokens.weight":
        raise ValueError(f"{language_model} ties its head to {embeddings_name}; only embed_tokens.weight is supported")
    tokenizer, extra_files = authors.load_tokenizer(folder, text.vocab_size)
    config = authors.make_config(
        text,
        tower,
        tokenizer,
        num_query_tokens=256,
        query_transformer_num_attention_heads=max(tower.config.hidden_size // 64, 1),
        # CLIP has a class token, SigLIP has none
        vision_feature_select_strategy="default" if "clip" in tower.config.model_type else "full",
    )
    stored, vision = read_tensors(folder), tower.tensors()
    base = authors.without_prefix(stored, list(model.base_model.state_dict()), language_model)
    head = base[embeddings_name] if tied else stored.get("lm_head.weight")
    heads = {} if head is None else {"lm_head.weight": head}
    tensors = {"model.language_model." + name: tensor for name, tensor in base.items()} | heads
    for name in (f"model.language_model.{embeddings_name}", *heads):
        tensors[name] = add_rows(tensors[name], config.text_config.vocab_size - text.vocab_size)
    tensors |= {"model.vision_tower." + name: tensor for name, tensor in vision.items()}
    tensors |= fresh_query_transformer(config)
    check_tensors(config, tensors)
    return NewModelPlan(
        layout="parts, with a fresh query transformer",
        config=config,
        settings=None,
        sources={"language_model." + name: tensor for name, tensor in base.items()}
        | {"vision_tower." + name: tensor for name, tensor in vision.items()}
        | (heads if not tied else {}),
        tensors=tensors,
        vision_source=vision_tower,
        base_models=[language_model, vision_tower],
        processor=authors.make_processor(config, tower, tokenizer),
        tokenizer_folder=folder,
        extra_files=extra_files,
        language_model={prefix + name: tensor for name, tensor in base.items()} | heads,
        tower_folder=tower.folder,  # type: ignore[arg-type]  # a tower that was read has one
    )


def fresh_query_transformer(config: MQTLlavaConfig) -> dict[str, LazyTensor]:
    """The weights of a newly initialised query transformer, with a fixed seed."""
    model = empty_model(config)
    query_transformer = model.model.query_transformer.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        query_transformer.apply(model._init_weights)
    return {
        "model.query_transformer." + name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in query_transformer.state_dict().items()
    }
