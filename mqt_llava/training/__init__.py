"""Train MQT-LLaVA with your own loop, a `Trainer` or TRL. Names are imported lazily."""

from importlib import import_module


MODULES = {
    "DistillationTrainer": "distillation",
    "MQTLlavaDataCollator": "collator",
    "MQTLlavaTrainer": "trainer",
    "VisualTokenSampler": "sampling",
    "load_adapter": "adapters",
    "load_conversations": "data",
    "make_lora_config": "lora",
    "save_adapter": "adapters",
    "with_num_visual_tokens": "data",
}

__all__ = list(MODULES)


def __getattr__(name):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *MODULES})
