"""A LoRA folder of the authors' trainer: adapters of the language model, and the query transformer trained beside them."""

import math
import re
from pathlib import Path

import torch

from .files import LazyTensor, fetch, read_file, read_json, read_tensors, write_safetensors
from .full import plan_of_tensors
from .names import AUTHORS_QUERY_TRANSFORMER, from_authors, rename
from .plan import Plan
from .stage1 import combine, language_model, query_transformer


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.(?:default\.)?weight")


def recognise(source: Path) -> bool:
    return (source / "adapter_config.json").exists()


def plan(source: Path, vision_tower: str | None = None, base_model: str | None = None) -> Plan:
    """The plan for a merged checkpoint: `W + scaling * B A` for every adapted weight, in float32."""
    settings = read_json(source / "config.json") if (source / "config.json").exists() else {}
    adapter = read_json(source / "adapter_config.json")
    base_model = base_model or adapter.get("base_model_name_or_path")
    if not base_model:
        raise ValueError("adapter_config.json names no base model; name it with --base-model")
    base = fetch(base_model, near=source)
    base_settings = read_json(base / "config.json")
    tensors = read_tensors(base)
    near = base  # where the config lies that names the vision tower
    if not str(base_settings.get("model_type", "")).startswith("llava_"):
        base_settings, tensors = combine(base_settings, settings, base_model), language_model(tensors)
        near = source
    tensors = merged(tensors, source, base_model)
    return plan_of_tensors("LoRA folder, merged", near, base_settings, tensors, vision_tower, tokenizer_folder=base)


def merged(tensors: dict[str, LazyTensor], source: Path, base_model) -> dict[str, LazyTensor]:
    """A base model's tensors with the LoRA folder `source` in them."""
    pairs, others = adapter_tensors(source)
    scaling = lora_scaling(read_json(source / "adapter_config.json"))
    changed = {}
    for module, (a, b) in pairs.items():
        name = module + ".weight"
        if name not in tensors:
            raise ValueError(f"the adapter is for {module}, which the base model {base_model} does not have")
        changed[name] = merge(name, tensors[name], a, b, scaling)
    return tensors | changed | others


def lora_scaling(adapter: dict) -> float:
    if adapter.get("peft_type", "LORA") != "LORA" or not adapter.get("r") or not adapter.get("lora_alpha"):
        raise ValueError("adapter_config.json is not of a LoRA adapter with its `r` and `lora_alpha`")
    unsupported = [key for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if adapter.get(key)]
    if unsupported:
        raise ValueError(f"adapter_config.json: {', '.join(unsupported)} cannot be converted")
    rank = adapter["r"]
    return adapter["lora_alpha"] / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def adapter_tensors(source: Path):
    """`({module: (A, B)}, {name: tensor trained in full})`, all by the authors' names."""
    file = next((source / name for name in ADAPTER_FILES if (source / name).exists()), None)
    if file is None:
        raise ValueError(f"{source} has none of the files {', '.join(ADAPTER_FILES)}")
    halves, others = {}, {}
    for name, tensor in read_file(file).items():
        name = name.removeprefix("base_model.model.")
        match = LORA_NAME.fullmatch(name)
        if match:
            halves.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" in name:
            raise ValueError(f"unknown tensor {name} in {file}")
        else:
            others[name] = tensor
    alone = [module for module, parts in halves.items() if len(parts) != 2]
    if alone:
        raise ValueError(f"{file} has only one of lora_A and lora_B for {alone[0]}")
    if (source / NON_LORA_FILE).exists():
        for name, tensor in read_file(source / NON_LORA_FILE).items():
            others[name.removeprefix("base_model.model.")] = tensor
    trained = {name: tensor for name, tensor in others.items() if "query_abstractor." in name}
    others = {name: tensor for name, tensor in others.items() if name not in trained}
    trained = query_transformer(trained, source / NON_LORA_FILE)
    return {module: (parts["A"], parts["B"]) for module, parts in halves.items()}, others | trained


def merge(name: str, weight: LazyTensor, a: LazyTensor, b: LazyTensor, scaling: float) -> LazyTensor:
    if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not fit {name} {weight.shape}")

    def add():
        # in place and in float32: the weight is copied once
        values = weight.load()
        return (
            values.to(torch.float32, copy=True)
            .addmm_(b.load().float(), a.load().float(), alpha=scaling)
            .to(values.dtype)
        )

    return LazyTensor(weight.shape, weight.dtype, add)


def write_adapter(source: Path, destination: Path, base_model: str):
    """A PEFT adapter for our model: LoRA on the language model, the query transformer in `modules_to_save`.

    Args:
        base_model (`str`): the MQT-LLaVA checkpoint that the adapter goes on, in our layout.
    """
    from peft import LoraConfig

    adapter = read_json(source / "adapter_config.json")
    lora_scaling(adapter)
    pairs, others = adapter_tensors(source)
    beside = [name for name in others if not name.startswith(AUTHORS_QUERY_TRANSFORMER)]
    if beside:
        raise ValueError(f"{beside[0]} was trained in full beside the adapter; convert without --keep-adapter")
    tensors = {}
    for module, (a, b) in pairs.items():
        ours = rename(module + ".weight").removesuffix(".weight")
        if not ours.startswith("model.language_model."):
            raise ValueError(f"the adapter is for {module}, too; convert without --keep-adapter")
        tensors |= {f"base_model.model.{ours}.lora_{part}.weight": half for part, half in (("A", a), ("B", b))}
    for name, tensor in from_authors(others).items():
        tensors["base_model.model." + name] = tensor
    suffixes = sorted({module.rsplit(".", 1)[1] for module in pairs})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter["r"],
        lora_alpha=adapter["lora_alpha"],
        lora_dropout=adapter.get("lora_dropout", 0.0),
        use_rslora=adapter.get("use_rslora", False),
        target_modules=rf".*\.language_model\..*\.({'|'.join(suffixes)})",  # the vision tower has such names, too
        modules_to_save=["query_transformer"] if others else None,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(destination)
    write_safetensors(destination / "adapter_model.safetensors", tensors)
