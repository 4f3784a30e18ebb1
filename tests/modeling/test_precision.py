"""Half precision, mixed precision, and weights that bitsandbytes quantizes."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.modeling.common import NUM_VISUAL_TOKENS, answers, real_logits, two_rows
from tests.small_model import NUM_QUERY_TOKENS, TEXT_SIZES, make_model


# Half and mixed precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["from_pretrained", "auto", "to"])
def test_half_precision(dtype, how, checkpoint, tmp_path):
    if how == "from_pretrained":
        model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    elif how == "auto":  # the type that a folder was saved in
        make_model().to(dtype).save_pretrained(tmp_path)
        model = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    else:
        model = make_model().to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact, inputs = make_model(), two_rows()
    logits = real_logits(model, inputs)  # float32 pixels
    assert logits.dtype == dtype and logits.isfinite().all()
    expected = real_logits(exact, inputs)
    error = (logits.float() - expected).abs().mean() / expected.std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    torch.testing.assert_close(real_logits(model, inputs.to(dtype)), logits)  # half-precision pixels
    for m in NUM_VISUAL_TOKENS:
        assert torch.tensor(answers(model, m)).shape == torch.tensor(answers(exact, m)).shape
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert {tokens.dtype for tokens in features.pooler_output} == {dtype}


def test_patch_positions_are_resized_in_float32():
    """Resized in float32 and cast afterwards: bicubic weights in half precision would cost accuracy."""
    exact = make_model().model.query_transformer
    half = make_model().to(torch.bfloat16).model.query_transformer
    with torch.no_grad():
        exact.position_embedding.copy_(half.position_embedding)
        positions = half.patch_positions(36)
        assert positions.dtype == torch.bfloat16
        assert torch.equal(positions, exact.patch_positions(36).to(torch.bfloat16))


@pytest.mark.parametrize("m", [1, NUM_QUERY_TOKENS])
def test_autocast_training_step(m):
    """Mixed precision as `Trainer(bf16=True)` does it: float32 weights, bfloat16 matrix products."""
    model = make_model().train()
    inputs = two_rows(m)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 3, -100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    exact = make_model()(**inputs, labels=labels).loss
    assert loss.isfinite() and abs(loss - exact) < 0.05 * exact and loss != exact
    gradients = [p.grad for p in model.model.query_transformer.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# Quantized weights ----------------------------------------------------------------------------------------------------


needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QUANTISED = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4bit, double, bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
}


def wide_model():
    """Widths that are multiples of bitsandbytes' block size, 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision_config = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=30, patch_size=5, initializer_range=0.2)
    return make_model(
        vision_config=vision_config,
        text_config=LlamaConfig(**(TEXT_SIZES | sizes | {"num_key_value_heads": 4, "initializer_range": 0.1})),
    )


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_loading(kind, tmp_path):
    import bitsandbytes as bnb

    wide_model().save_pretrained(tmp_path)
    quantization_config = BitsAndBytesConfig(**QUANTISED[kind])
    load = {"quantization_config": quantization_config, "device_map": "cpu"}
    model = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, **load)
    model.save_pretrained(tmp_path / "quantised")

    quantised_class = bnb.nn.Linear8bitLt if kind == "8bit" else bnb.nn.Linear4bit
    linears = {name for name, module in wide_model().named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in model.named_modules() if isinstance(module, quantised_class)}
    assert quantised == linears - {"lm_head"}
    assert {f"model.query_transformer.{n}_proj" for n in ("q", "k", "v", "out", "text")} < quantised
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.is_floating_point()
    assert model.model.query_transformer.query.is_floating_point()
    assert model.model.vision_tower.dtype.is_floating_point

    inputs = two_rows()
    logits, exact = real_logits(model, inputs), real_logits(wide_model(), inputs)
    assert logits.isfinite().all() and not torch.equal(logits, exact)
    # As good as the rounding of the weights allows: a plain model with the rounded weights gives the same logits
    rounded = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, **load).dequantize()
    assert {type(rounded.get_submodule(name)) for name in linears} == {nn.Linear}
    expected = real_logits(rounded.float(), inputs)
    assert (logits - expected).abs().mean() < 0.02 * expected.std()
    for m in NUM_VISUAL_TOKENS:
        answer = torch.tensor(answers(model, m))
        assert answer.shape == (2, inputs["input_ids"].shape[1] + 6)
        assert answer[:, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"].tolist()

    again = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert isinstance(again.model.query_transformer.v_proj, quantised_class)
    torch.testing.assert_close(real_logits(again, inputs), logits, atol=1e-4, rtol=1e-3)
