"""What a conversion will write, before anything of it is read or written."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..modeling.configuration_mqt_llava import MQTLlavaConfig
from ..modeling.modeling_mqt_llava import MQTLlavaForConditionalGeneration
from ..modeling.processing_mqt_llava import MQTLlavaProcessor
from .files import LazyTensor


@dataclass
class Plan:
    """A converted checkpoint that is not computed yet.

    Args:
        layout (`str`): what the source is, in words.
        config, processor: of the converted model.
        tensors (`dict[str, LazyTensor]`): the converted weights, by our names.
        source_tensors (`dict[str, LazyTensor]`, *optional*): all that they are made of, by the authors' names. `None` for
            a new model.
        num_fresh (`int`): how many of `tensors` are new, and come from no source.
        source_config (`dict`): the authors' config.json.
        vision_source (`str`): which vision tower was used.
        tokenizer_folder (`Path`): where the source has its tokenizer.
        parts (`tuple[Path, Path]`, *optional*): the folders of language model and vision tower that a new model is made of.
        base_models (`list[str]`): the models that this one is made of, for the model card.
        extra_files (`dict[str, Path]`): files to copy as they are.
    """

    layout: str
    config: MQTLlavaConfig
    tensors: dict[str, LazyTensor]
    processor: MQTLlavaProcessor
    source_tensors: dict[str, LazyTensor] | None
    source_config: dict
    vision_source: str
    tokenizer_folder: Path
    parts: tuple[Path, Path] | None = None
    num_fresh: int = 0
    base_models: list[str] = field(default_factory=list)
    extra_files: dict[str, Path] = field(default_factory=dict)

    def empty_model(self) -> MQTLlavaForConditionalGeneration:
        """The model without its weights, on the meta device."""
        return empty_model(self.config)

    def check(self):
        check(self.config, self.tensors)


def empty_model(config: MQTLlavaConfig) -> MQTLlavaForConditionalGeneration:
    with torch.device("meta"):
        return MQTLlavaForConditionalGeneration(config)


def check(config: MQTLlavaConfig, tensors: dict[str, LazyTensor]):
    """The tensors are those of the model, in name and shape. An `lm_head` that is tied is taken out. What the vision tower has
    behind the features may be there, and stays.

    Raises:
        `ValueError`: naming what is missing, unknown or of another shape.
    """
    model = empty_model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = re.compile("|".join(model._keys_to_ignore_on_load_unexpected) or "(?!)")
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("has unknown", sorted(name for name in tensors.keys() - expected.keys() if not unused.search(name))),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"the checkpoint {problem} tensors: {', '.join(names[:5])}{more}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has the shape {tensors[name].shape}; the config makes it {shape}")
