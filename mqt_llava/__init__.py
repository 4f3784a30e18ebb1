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

# As `mqt-llava` or as `python -m mqt_llava.cli`: while Python looks for a module to run, `sys.argv[0]` is "-m"
RUN_AS_PROGRAM = "mqt_llava_cli" in sys.modules or (sys.argv[:1] == ["-m"] and "mqt_llava.cli" in sys.orig_argv)

if RUN_AS_PROGRAM:  # help and version do not wait for torch

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
