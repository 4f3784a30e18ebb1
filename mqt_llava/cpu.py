"""bfloat16 weights on CPUs without bfloat16 instructions: matrix products of many tokens are computed in float32."""

import time

import torch
from torch import nn
from torch.nn import functional as F


# Elements of a weight that are cast to float32 at a time, 16 MB. The allocator returns blocks above 32 MB to the system after each
# use, which clears them again for the next
BLOCK = 2**22
FEW_TOKENS = 8  # with fewer, reading the weights takes longer than the product


class Float32Linear(nn.Linear):
    """A linear layer that keeps its dtype, but multiplies in float32, one block of its weight at a time.

    The output has the dtype of the input. With few tokens, or if gradients are needed, it is a plain `nn.Linear`.
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
    Make the linear layers of a bfloat16 or float16 model on a CPU multiply in float32 if they process many tokens, as in the
    vision tower, the query transformer and the prefill. Weights keep their dtype and are cast block by block, so that memory
    grows by 16 MB only. Decoding is not affected.

    Args:
        model (`nn.Module`): modified in place. Only layers of type `nn.Linear` are changed, so quantized layers are not.

    Returns:
        `nn.Module`: the same model.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype in (torch.bfloat16, torch.float16):
            layer.__class__ = Float32Linear  # keeps hooks and references, as torch's parametrizations do
    return model


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices faster in float32 than in `dtype`. Measures it, in a few tens of milliseconds.

    Args:
        dtype (`torch.dtype`): such as `torch.bfloat16`.

    Returns:
        `bool`: whether [`compute_in_float32`] helps.
    """
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
