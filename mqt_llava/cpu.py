"""bfloat16 weights on CPUs that have no units for bfloat16: products of many tokens are computed in float32."""

import time

import torch
from torch import nn
from torch.nn import functional as F


# Of a weight, as many rows as make so many numbers are in float32 at a time: 16 MB. More than 32 MB would be given back to the
# system after each use, and be cleared by it before the next
BLOCK = 2**22
FEW_TOKENS = 8  # for fewer, reading the weights takes longer than the products


class Float32Linear(nn.Linear):
    """A linear layer that stays in its dtype and multiplies in float32, a block of its weight after the other.

    The result is rounded to the dtype of the input. For few tokens, and where gradients are wanted, it is a plain layer.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        num_tokens = input.numel() // input.shape[-1]
        trains = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if num_tokens < FEW_TOKENS or trains or input.dtype == torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        tokens = input.reshape(num_tokens, -1).float()
        output = input.new_empty(num_tokens, self.out_features)
        num_rows = max(BLOCK // self.in_features, 1)
        block = tokens.new_empty(min(num_rows, self.out_features), self.in_features)
        bias = tokens.new_zeros(self.out_features) if self.bias is None else self.bias.float()
        for weight, part, offset in zip(
            self.weight.split(num_rows), output.split(num_rows, dim=1), bias.split(num_rows)
        ):
            part.copy_(torch.addmm(offset, tokens, block[: len(weight)].copy_(weight).T))
        return output.view(*input.shape[:-1], -1)


def compute_in_float32(model: nn.Module) -> nn.Module:
    """
    Let a bfloat16 or float16 model on a CPU multiply in float32 where there are many tokens: in the vision tower, the query
    transformer and the prefill. The weights stay as and where they are, so it takes no more memory than a block of one of
    them. Decoding reads them as before.

    Args:
        model (`nn.Module`): changed in place. Layers that something else has replaced, as quantization does, stay.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype in (torch.bfloat16, torch.float16):
            layer.__class__ = Float32Linear  # hooks and references stay, as with torch's parametrizations
    return model


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in float32 faster than in `dtype`: measured, in some ten milliseconds."""
    if dtype == torch.float32:
        return False
    input, weight = torch.randn(64, 1024), torch.randn(1024, 1024)
    return _best_time(input.to(dtype), weight.to(dtype)) > 1.5 * _best_time(input, weight)


def _best_time(input, weight) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        F.linear(input, weight)
        times.append(time.perf_counter() - start)
    return min(times)
