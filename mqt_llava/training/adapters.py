"""Adapters: saved and pushed with a card that names the base model, loaded onto no other."""

import os
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)

MODEL_CARD = """---
pipeline_tag: image-text-to-text
---

# {name}

An adapter for the [MQT-LLaVA](https://arxiv.org/abs/2405.19315) model `{base}`, trained with {method}. It answers with any
number of visual tokens per image from 1 to {num_query_tokens}.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)
base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{name}")
output = model.generate(**inputs, num_visual_tokens=16)
```
"""


def save_adapter(model, output_dir, repo_id=None):
    """
    Write adapter and model card with [`~peft.PeftModel.save_pretrained`], and upload both where a repository is given.
    ([`~peft.PeftModel.push_to_hub`] uploads another card, which names no base model.)

    Args:
        model (`PeftModel`): with the adapter active.
        output_dir (`str` or `Path`): checkpoints of the training in it stay, and are not uploaded.
        repo_id (`str`, *optional*): a repository of the Hub. It is created if there is none.

    Raises:
        `ValueError`: when the adapter shall be uploaded and its base model is a folder, before anything is written.
    """
    config = model.active_peft_config
    if repo_id is not None:
        check_base_is_on_hub(config.base_model_name_or_path)
    parts = [part for part in ("language_model", "query_transformer", "vision_tower") if part in config.target_modules]
    methods = [f"LoRA of rank {config.r} on {' and '.join(parts)}"] if parts else []
    methods += [f"all weights of {part}" for part in config.modules_to_save or []]
    card = MODEL_CARD.format(
        name=repo_id or Path(output_dir).name,
        base=config.base_model_name_or_path,
        method=", ".join(methods),
        num_query_tokens=model.config.num_query_tokens,
    )
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / "README.md").write_text(card, encoding="utf-8")  # PEFT adds to it
    model.save_pretrained(output_dir)
    if repo_id is not None:
        files = [Path(output_dir) / "README.md", *Path(output_dir).glob("adapter_*")]
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        operations = [CommitOperationAdd(file.name, file) for file in files]
        api.create_commit(repo_id, operations, commit_message="Upload adapter")


def check_base_is_on_hub(base: str):
    """Raise a `ValueError` for a folder: the card of an adapter on the Hub names its base, which others must find."""
    if os.path.isdir(base):
        raise ValueError(
            f"An adapter on the Hub needs a base model there, and this one's is the folder {base}: push it first."
        )


def load_adapter(model, adapter, adapter_name="default", **kwargs):
    """
    [`~peft.PeftModel.from_pretrained`], which refuses an adapter whose layers are not those of the model.

    Args:
        model (`MQTLlavaForConditionalGeneration` or `PeftModel`):
            The base model, or one that has adapters already: then this one is added to them.
        adapter (`str` or `Path`):
            A folder or a Hub repository.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            What [`~peft.PeftModel.set_adapter`] calls it.

    Returns:
        `PeftModel` with the adapter active.

    Raises:
        `ValueError`: for an adapter of another base model, with both names.
    """
    base_name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = base.config._name_or_path
    problem = _find_misfit(base, cached_file(str(adapter), SAFETENSORS_WEIGHTS_NAME))
    if problem:
        raise ValueError(
            f"The adapter {adapter} is for the base model {base_name} and does not fit {name}: {problem}."
        )
    if os.path.basename(base_name or "") != os.path.basename(name):
        logger.warning("The adapter %s was trained on %s; it is put on %s.", adapter, base_name, name)
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name, **kwargs)
        model.set_adapter(adapter_name)
        return model
    return PeftModel.from_pretrained(model, adapter, adapter_name, **kwargs)


def _find_misfit(base, weights_file):
    """The first tensor of an adapter that fits no layer of the base model, in words; None where all fit."""
    # by the names that they have without adapters
    shapes = {}
    for name, parameter in base.named_parameters():
        unpacked = getattr(parameter, "quant_state", None) or parameter  # 4-bit weights lie packed
        shapes[re.sub(r"\.(base_layer|original_module)\b", "", name)] = list(unpacked.shape)
    with safe_open(weights_file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (not a dict)
            if "trainable_tokens" in key:
                continue
            name, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
            name = f"{name}.weight" if kind else name
            got, expected = weights.get_slice(key).get_shape(), shapes.get(name)
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
