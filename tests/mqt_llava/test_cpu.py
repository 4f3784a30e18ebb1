"""bfloat16 weights on CPUs without units for it."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from typer.testing import CliRunner

from mqt_llava import cli, cpu
from mqt_llava.cli import models
from mqt_llava.cpu import FEW_TOKENS, Float32Linear, compute_in_float32
from tests.small_model import make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 490)  # ten rows of 48: none of the sizes is a multiple of it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(FEW_TOKENS, 48), (3, 7, 48), (1, 2, 9, 48)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_product_is_that_of_float32(blocks, dtype, shape, bias):
    layer = nn.Linear(48, 37, bias=bias, dtype=dtype)
    model = compute_in_float32(nn.Sequential(layer))
    assert type(model[0]) is Float32Linear and model[0].weight is layer.weight
    x = torch.randn(shape, dtype=dtype)
    exact = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(model(x).float(), exact, rtol=2 * spacing, atol=2 * spacing)
    assert model(x).dtype == dtype and model(x).shape == (*shape[:-1], 37)
    few = x.reshape(-1, 48)[: FEW_TOKENS - 1]
    assert torch.equal(model(few), layer(few))


def test_what_stays_as_it_is(blocks):
    """float32 layers, what another library has put in a layer's place, and gradients."""

    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Other(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.bfloat16))
    names = list(model.state_dict())
    compute_in_float32(model)
    assert [type(layer) for layer in model] == [nn.Linear, Other, Float32Linear]
    assert list(model.state_dict()) == names
    x = torch.randn(20, 8, dtype=torch.bfloat16)
    model[2](x).sum().backward()
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("m", [1, 16])
def test_answers_are_the_same(m):
    """Greedy tokens of a model in bfloat16, whose logits move by no more than its rounding."""
    processor, images = make_processor(), make_images(2)
    inputs = processor(
        images=images, text="<image><image>\nWhat is this, and why?", num_visual_tokens=m, return_tensors="pt"
    )
    plain, changed = make_model().bfloat16(), compute_in_float32(make_model().bfloat16())
    with torch.no_grad():
        expected, logits = plain(**inputs).logits, changed(**inputs).logits
        exact = make_model().bfloat16().float()(**inputs).logits
    assert (logits - exact).abs().max() < 2 * (expected - exact).abs().max()
    assert sum(isinstance(module, Float32Linear) for module in changed.modules()) > 20
    chosen = logits[0, -1].argmax()  # greedy, as far as rounding lets it be
    assert exact[0, -1].max() - exact[0, -1, chosen] <= 2 * (logits - exact).abs().max()


def test_hooks_and_offloaded_layers_stay_as_they_are():
    """As of a model that is divided between a GPU and the CPU."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.bfloat16))
    seen, x = [], torch.randn(20, 8, dtype=torch.bfloat16)
    model[0].register_forward_hook(lambda *_: seen.append(True))
    with torch.no_grad():
        expected = model(x)
        model = compute_in_float32(cpu_offload(model, "cpu"))
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert seen == [True, True]


def test_nothing_is_slow_in_float32():
    assert not cpu.is_slow(torch.float32)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("option", ["auto", "float32", "bfloat16"])
def test_ask_computes_as_it_is_told(checkpoint, tmp_path, monkeypatch, slow, option):
    """Or as the machine is faster."""
    loaded = []
    monkeypatch.setattr(cpu, "is_slow", lambda dtype: slow)
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    make_images(1)[0].save(tmp_path / "0.png")
    arguments = [
        "ask",
        tmp_path / "0.png",
        "What?",
        "--model",
        checkpoint,
        "--max-new-tokens",
        2,
        "--dtype",
        "bfloat16",
    ]
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--compute-dtype", option])
    assert result.exit_code == 0, result.output
    changed = any(isinstance(module, Float32Linear) for module in loaded[0][1].modules())
    assert changed == (slow if option == "auto" else option == "float32")
