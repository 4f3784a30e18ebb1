"""Save, push and load adapters. Their card names the base model, and they are only loaded onto a base model that they fit."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.utils import cached_file, logging

from ..hub import check_base_is_on_hub, write_adapter_card


logger = logging.get_logger(__name__)


def save_adapter(model, output_dir, repo_id=None, state_dict=None):
    """
    Save the adapter with [`~peft.PeftModel.save_pretrained`] and a model card, and upload both if a repository is given.
    ([`~peft.PeftModel.push_to_hub`] uploads another card, which does not name the base model.)

    Args:
        model (`PeftModel`): a model whose active adapter is saved.
        output_dir (`str` or `Path`): the folder. Training checkpoints in it are kept, but not uploaded.
        repo_id (`str`, *optional*): a repository on the Hub, which is created if it doesn't exist.
        state_dict (`dict[str, torch.Tensor]`, *optional*): the model's full state dict, if its parameters are sharded.

    Raises:
        `ValueError`: if `repo_id` is given and the base model is a local folder. Nothing is written then.
    """
    config, name = model.active_peft_config, model.active_adapter
    if repo_id is not None:
        check_base_is_on_hub(config.base_model_name_or_path)
    model.save_pretrained(output_dir, selected_adapters=[name], state_dict=state_dict)
    if name != "default":  # PEFT saves it in a folder of that name
        for file in (Path(output_dir) / name).iterdir():
            file.replace(Path(output_dir) / file.name)
        (Path(output_dir) / name).rmdir()
    write_adapter_card(Path(output_dir), repo_id or Path(output_dir).name, model.config.num_query_tokens)
    if repo_id is not None:
        files = [Path(output_dir) / "README.md", *Path(output_dir).glob("adapter_*")]
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        operations = [CommitOperationAdd(file.name, file) for file in files]
        api.create_commit(repo_id, operations, commit_message="Upload adapter")


def load_adapter(model, adapter, adapter_name="default", **kwargs):
    """
    [`~peft.PeftModel.from_pretrained`], but refuses an adapter that does not fit the layers of the model.

    Args:
        model (`MQTLlavaForConditionalGeneration` or `PeftModel`):
            The base model, or one with adapters, to which this one is added.
        adapter (`str` or `Path`):
            A folder or a Hub repository.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name for [`~peft.PeftModel.set_adapter`].
        kwargs:
            Passed on to [`~peft.PeftModel.from_pretrained`].

    Returns:
        `PeftModel`: the model with the adapter active.

    Raises:
        `ValueError`: for an adapter of a base model with other layers, for a name that is taken, and for an adapter of layers that
            another adapter has replaced (`query_transformer_full`).
    """
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(f"The model already has an adapter {adapter_name!r}: pass another `adapter_name`.")
    where = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
    base_name = PeftConfig.from_pretrained(adapter, **where).base_model_name_or_path
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = base.config._name_or_path
    problem = _find_misfit(base, cached_file(str(adapter), SAFETENSORS_WEIGHTS_NAME, **where))
    if problem:
        raise ValueError(
            f"The adapter {adapter} is for the base model {base_name} and does not fit {name}: {problem}."
        )
    if os.path.basename(base_name or "") != os.path.basename(name):
        logger.warning("The adapter %s was trained on %s, but is loaded onto %s.", adapter, base_name, name)
    if isinstance(model, PeftModel):
        try:
            left_over = model.load_adapter(adapter, adapter_name, **kwargs).unexpected_keys
        except KeyError as error:
            left_over = [str(error)]
        if left_over:
            raise ValueError(
                f"The adapter {adapter} is for layers that another adapter of this model has replaced, such as {left_over[0]}. "
                "Merge that adapter first, or load each one onto its own base model."
            )
        model.set_adapter(adapter_name)
        return model
    return PeftModel.from_pretrained(model, adapter, adapter_name, **kwargs)


def check_resumed(config, checkpoint):
    """
    Raises:
        `ValueError`: if the adapter in a checkpoint has other settings than the `LoraConfig` of the run that resumes it.
    """
    saved = PeftConfig.from_pretrained(checkpoint)
    for name in ("r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora"):
        old, new = getattr(saved, name), getattr(config, name)
        if old != new:
            raise ValueError(f"{checkpoint} was trained with `{name}` = {old!r} and cannot be resumed with {new!r}.")


def _find_misfit(base, weights_file):
    """Describe the first tensor of an adapter that fits no layer of the base model; None if all fit."""
    # names without PEFT's wrappers
    shapes = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        unpacked = getattr(parameter, "quant_state", None) or parameter  # 4-bit weights are packed
        shapes[_without_wrappers(name)] = list(unpacked.shape)
    modules = {_without_wrappers(name) for name, _ in base.named_modules()}
    with safe_open(weights_file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (not a dict)
            if "trainable_tokens" in key:
                continue
            name, _, kind = _without_wrappers(key.removeprefix("base_model.model.")).partition(".lora_")
            name = f"{name}.weight" if kind and not kind.startswith("embedding") else name
            got, expected = weights.get_slice(key).get_shape(), shapes.get(name)
            if expected is None and (name in modules or name.rpartition(".")[0] in modules):
                continue  # a method other than LoRA, whose tensors have other shapes
            if expected is None:
                return f"it has no {name}"
            if kind.startswith("A."):
                got = [expected[0], got[1]]
            elif kind.startswith("B."):
                got = [got[0], expected[1]]
            elif kind:
                continue  # DoRA's magnitudes have the shape of their layer
            if got != expected:
                return f"{name} has the shape {expected} there and {got} in the adapter's base"
    return None


def _without_wrappers(name: str) -> str:
    return re.sub(r"\.(base_layer|original_module)\b", "", name)
