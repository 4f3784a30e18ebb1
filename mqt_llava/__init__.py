"""MQT-LLaVA for HuggingFace: one checkpoint, any number of visual tokens per image.

Importing this package registers the model with transformers' Auto classes.
"""

import sys
from importlib import import_module
from pathlib import Path


TINY_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "mqt-llava-tiny")  # shipped with the package

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

if "mqt_llava_cli" in sys.modules:  # the command line shows its help without waiting for torch

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = ".prefix_cache" if name == "PrefixCache" else ".modeling"
        return getattr(import_module(module, __name__), name)

else:
    from .modeling import (
        MQTLlavaConfig,
        MQTLlavaForConditionalGeneration,
        MQTLlavaImageProcessor,
        MQTLlavaModel,
        MQTLlavaProcessor,
        VisualTokenSchedule,
        __version__,
        rebudget,
    )
    from .prefix_cache import PrefixCache
