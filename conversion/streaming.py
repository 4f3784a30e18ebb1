"""Models whose weights are read from their files layer by layer as they run, and dropped again: accelerate's offloading."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from .files import LazyTensor


# The parts of ours that are small are read once
DEVICE_MAP = {
    "model.vision_tower": "cpu",
    "model.query_transformer": "cpu",
    "model.language_model": "disk",
    "lm_head": "disk",
}


class Rounded(ModelHook):
    """Weights as they are in `dtype`, in float32."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def pre_forward(self, module, *args, **kwargs):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(self.dtype).float()
        return args, kwargs


def round_weights(model, dtype: torch.dtype):
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, Rounded(dtype), append=True)


class Weights(Mapping):
    """Tensors in float32, by the names of a causal language model's class, read each time they are asked for.

    Args:
        tensors (`dict[str, LazyTensor]`): by those names, with the prefix of the base model or without it.

    Raises:
        `ValueError`: where a weight of the model is not among them.
    """

    def __init__(self, tensors: dict[str, LazyTensor], model):
        prefix, head = model.base_model_prefix + ".", model.get_output_embeddings()
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        self.tensors = {}
        for name in model.state_dict():
            names = [name, name.removeprefix(prefix)]
            if model.get_submodule(name.rpartition(".")[0]) is head:  # it may be tied
                names += [f"{embeddings}.weight", f"{embeddings}.weight".removeprefix(prefix)]
            stored = next((one for one in names if one in tensors), None)
            if stored is None:
                raise ValueError(f"--verify finds no tensor {name}; convert without it, and compare answers yourself")
            self.tensors[name] = tensors[stored]

    def __getitem__(self, name):
        return self.tensors[name].load().float()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def load_model(folder: Path, dtype: torch.dtype | None = None, adapter: Path | None = None):
    """Our model from its folder, through the Auto class and in float32.

    Args:
        dtype (`torch.dtype`, *optional*): to which the weights are rounded before.
        adapter (`Path`, *optional*): a PEFT adapter to put on it.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, device_map=DEVICE_MAP, trust_remote_code=False
    )
    if dtype is not None:
        round_weights(model, dtype)
    if adapter is None:
        return model.eval()
    from peft import PeftModel, load_peft_weights

    del model.hf_device_map  # else PEFT would move the layers into memory
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True, torch_device="cpu")
    # PEFT puts LoRA where the layer's weights are, which is nowhere now
    weights = load_peft_weights(str(adapter), device="cpu").items()
    pattern = re.compile(r"\.(lora_[AB])\.")
    weights = {pattern.sub(r".\1.default.", name): tensor for name, tensor in weights if pattern.search(name)}
    if unknown := model.load_state_dict(weights, strict=False, assign=True).unexpected_keys:
        raise ValueError(f"{adapter} has weights for what the model has not: {', '.join(unknown[:3])}")
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.float()  # they were taken as they are stored
    return model.get_base_model().eval()


def load_language_model(folder: Path, tensors: dict[str, LazyTensor], dtype: torch.dtype | None = None):
    """A causal language model of another library's folder, by its own class and in float32.

    Args:
        tensors (`dict[str, LazyTensor]`): all of the folder. Those of `.bin` files are read by us: transformers would write them
            anew, to read a layer at a time.
        dtype (`torch.dtype`, *optional*): to which the weights are rounded before.

    Raises:
        `ValueError`: for `.bin` files whose tensors are not called as the class calls them.
    """
    if any(folder.glob("*.safetensors")):
        options = {"dtype": torch.float32, "device_map": {"": "disk"}, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model = cpu_offload(model, "cpu", state_dict=Weights(tensors, model))
    if dtype is not None:
        round_weights(model, dtype)
    return model


def count_layers(model, tick):
    """Let `tick` know of the weights that a run of the model reads, a layer at a time."""
    for module in model.modules():
        count = sum(parameter.is_meta for parameter in module.parameters(recurse=False))
        if count:
            module.register_forward_hook(lambda *_, count=count: tick(count))
