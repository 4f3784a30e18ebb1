"""The code that is saved with every checkpoint. Importing this package registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .adaptive_mqt_llava import VisualTokenSchedule
from .budget_mqt_llava import rebudget
from .configuration_mqt_llava import MQTLlavaConfig, __version__
from .image_processing_mqt_llava import MQTLlavaImageProcessor
from .modeling_mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaModel
from .processing_mqt_llava import MQTLlavaProcessor


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
    "VisualTokenSchedule",
    "rebudget",
]
