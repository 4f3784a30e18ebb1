"""MQT-LLaVA for HuggingFace: one checkpoint, any number of visual tokens per image.

Importing this package registers the model with transformers' Auto classes.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .modeling.adaptive_mqt_llava import VisualTokenSchedule
from .modeling.budget_mqt_llava import rebudget
from .modeling.configuration_mqt_llava import MQTLlavaConfig, __version__
from .modeling.image_processing_mqt_llava import MQTLlavaImageProcessor
from .modeling.modeling_mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaModel
from .modeling.processing_mqt_llava import MQTLlavaProcessor
from .prefix_cache import PrefixCache


TINY_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "mqt-llava-tiny")  # the one that the package ships

AutoConfig.register("mqt_llava", MQTLlavaConfig)
AutoModel.register(MQTLlavaConfig, MQTLlavaModel)
AutoModelForImageTextToText.register(MQTLlavaConfig, MQTLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(MQTLlavaConfig, MQTLlavaForConditionalGeneration)
AutoModelForCausalLM.register(MQTLlavaConfig, MQTLlavaForConditionalGeneration)
AutoImageProcessor.register(MQTLlavaConfig, image_processor_classes={"pil": MQTLlavaImageProcessor})
AutoProcessor.register(MQTLlavaConfig, MQTLlavaProcessor)

__all__ = [
    "__version__",
    "MQTLlavaConfig",
    "MQTLlavaForConditionalGeneration",
    "MQTLlavaImageProcessor",
    "MQTLlavaModel",
    "MQTLlavaProcessor",
    "PrefixCache",
    "TINY_CHECKPOINT",
    "VisualTokenSchedule",
    "rebudget",
]
