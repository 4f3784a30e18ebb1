"""Measure the speed of a device: of layers with few and many tokens, and of reading memory."""

import statistics
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig

from .cpu import FEW_TOKENS, compute_in_float32, is_slow


TOKEN_COUNTS = (1, FEW_TOKENS - 1, FEW_TOKENS, 32, 96, 288)
SECONDS = 0.2  # per token count
# Two layers of each kind with the sizes of a 7B model with CLIP ViT-L/14, which together exceed a CPU's caches
LANGUAGE_MODEL = LlamaConfig(num_hidden_layers=2, vocab_size=8)
IMAGE_SIZE, PATCH_SIZE = 336, 14
VISION_TOWER = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=2,
    num_attention_heads=16,
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
)


@dataclass(frozen=True)
class DeviceSpeed:
    """How fast a device multiplies matrices and reads memory; see [`measure_device`].

    Args:
        flops_per_second (`float`): FLOPs per second of a language model with many tokens.
        bytes_per_second (`float`): memory bandwidth for reading, in bytes per second.
        token_rates (`tuple[tuple[int, float], ...]`, *optional*): pairs of a number of tokens and the FLOPs per second of a language
            model that processes them at once. Few tokens have a lower rate, since all weights must be read for them too.
        image_rate (`float`, *optional*): FLOPs per second of a vision tower.
    """

    flops_per_second: float
    bytes_per_second: float
    token_rates: tuple[tuple[int, float], ...] = ()
    image_rate: float | None = None

    def seconds(self, flops: float, num_bytes: float, num_tokens: int | None = None) -> float:
        """
        Seconds for a number of FLOPs that read a number of bytes. Computing and reading overlap, so the slower one counts.

        Args:
            flops (`float`): floating-point operations.
            num_bytes (`float`): bytes that are read.
            num_tokens (`int`, *optional*): number of tokens that the layers process at once. Without it, the result is a lower bound.
        """
        rate = self.flops_per_second
        if num_tokens is not None and self.token_rates:
            counts = [count for count, _ in self.token_rates]
            above = min(bisect_left(counts, num_tokens), len(counts) - 1)
            (low, low_rate), (high, high_rate) = self.token_rates[max(above - 1, 0)], self.token_rates[above]
            rate = high_rate
            if low < num_tokens < high:  # a layer's time is nearly linear in between
                share = (num_tokens - low) / (high - low)
                rate = num_tokens / ((1 - share) * low / low_rate + share * high / high_rate)
        return max(flops / rate, num_bytes / self.bytes_per_second)


@torch.no_grad()
def measure_device(device="cpu", dtype: torch.dtype | str = torch.bfloat16) -> DeviceSpeed:
    """Measure the speed of a device: of two layers of a 7B language model with few and many tokens, of two layers of a vision tower
    with an image, and of copying memory. Takes a few seconds and up to 2 GB. Much smaller layers reach fewer FLOPs per second than
    these. On a CPU that is slow in `dtype`, many tokens are multiplied in float32, see [`compute_in_float32`].

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): the device.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.bfloat16`): of weights and activations.

    Returns:
        [`DeviceSpeed`]: for the times of a [`Cost`].

    Raises:
        `ValueError`: for a dtype that is not a floating-point type.
    """
    device, dtype = torch.device(device), resolve_dtype(dtype)
    language, vision = (random_model(config, device, dtype) for config in (LANGUAGE_MODEL, VISION_TOWER))
    num_weights = count_linear(language)
    rates = []
    for count in TOKEN_COUNTS if device.type == "cpu" else (*TOKEN_COUNTS, 2048):
        embeds = torch.randn(1, count, LANGUAGE_MODEL.hidden_size, device=device, dtype=dtype)
        seconds = mean_time(lambda embeds=embeds: language(inputs_embeds=embeds, use_cache=False), device)
        rates.append((count, 2 * count * num_weights / seconds))
    num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    patches = torch.randn(1, num_patches, VISION_TOWER.hidden_size, device=device, dtype=dtype)
    encoder = vision.get_submodule("encoder")
    seconds = mean_time(lambda: encoder(inputs_embeds=patches), device)
    image_rate = 2 * num_patches * count_linear(vision) / seconds
    first, second = (list(layer.parameters()) for layer in language.get_submodule("layers").children())
    num_bytes = 2 * sum(weight.nbytes for weight in first)
    copied = num_bytes / mean_time(lambda: [a.copy_(b) for a, b in zip(first, second)], device)
    read = rates[0][1] * dtype.itemsize / 2  # each weight is two FLOPs
    return DeviceSpeed(max(rate for _, rate in rates), max(read, copied), tuple(rates), image_rate)


def random_model(config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model whose weights repeat a block of random numbers: drawing all of them would take longer than timing the model."""
    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=dtype).eval()
    numbers = 0.02 * torch.randn(2**20)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype)
        for part in values.flatten().split(len(numbers)):
            part.copy_(numbers[: len(part)])
        set_module_tensor_to_device(model, name, device, value=values)
    model.to(device)
    return compute_in_float32(model) if device.type == "cpu" and is_slow(dtype) else model


def count_linear(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def mean_time(function, device: torch.device) -> float:
    """Mean seconds per call over the faster half of the calls, after a warm-up. On a GPU, ten calls are timed at once."""
    calls = 1 if device.type == "cpu" else 10
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() < start + SECONDS:
        before = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append((time.perf_counter() - before) / calls)
    times = sorted(times[1:])
    return statistics.mean(times[: (len(times) + 1) // 2])


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type such as bfloat16 or float32; got {dtype!r}.")
    return resolved
