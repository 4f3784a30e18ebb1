"""Weights of a new model, and those that are missing from a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.modeling.common import real_logits, two_rows
from tests.small_model import SIGLIP, make_config


def big_enough_config(**overrides):
    """Layers wide enough to measure the standard deviation of each weight, and a different scale for each part."""
    config = make_config(num_query_tokens=64, initializer_range=0.07, **overrides)
    config.text_config.initializer_range = 0.3
    return config


def assert_initialised_alike(model, expected, names=None):
    """Every weight has the mean and the standard deviation that it has in `expected`, within sampling error."""
    weights, others = model.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    compared = 0
    for name in weights if names is None else names:
        weight, other = weights[name].float(), others[name].float()
        assert weight.isfinite().all(), name
        if other.std() < 1e-6 or ("position" in name and "query_transformer" in name):  # constants and tables
            torch.testing.assert_close(weight, other, msg=lambda m, n=name: f"{n}: {m}")
        else:
            chance = 5 / weight.numel() ** 0.5
            assert abs(weight.std() / other.std() - 1) < chance, (name, weight.std(), other.std())
            assert abs(weight.mean() - other.mean()) < chance * other.std() * 2, name
        compared += 1
    assert compared


def test_fresh_weights():
    model = MQTLlavaForConditionalGeneration(big_enough_config()).requires_grad_(False)
    query_transformer = model.model.query_transformer
    assert query_transformer.query.std() == pytest.approx(0.07 * 0.995, rel=0.1)  # cut off at two, in units of 1
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj", "text_proj"):
        assert getattr(query_transformer, projection).weight.std() == pytest.approx(0.07, rel=0.15)
    assert query_transformer.out_proj.bias.eq(0).all()
    for norm in (query_transformer.query_norm, query_transformer.key_norm, query_transformer.value_norm):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.std() == pytest.approx(0.3, rel=0.1)

    # Two-dimensional sine-cosine positions in raster order, spelt out one by one
    width, side = 32, 8
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (4 * i / width) for i in range(width // 4)]
                expected += [torch.tensor(angles).sin(), torch.tensor(angles).cos()]
            position = query_transformer.position_embedding[row * side + column]
            torch.testing.assert_close(position, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_class", [MQTLlavaForConditionalGeneration, MQTLlavaModel])
def test_initialisation_after_the_meta_device(model_class):
    config = big_enough_config()
    with torch.device("meta"):
        model = model_class(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)  # empty memory may hold anything
    model.init_weights()
    assert_initialised_alike(model, model_class(config))
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    if model_class is MQTLlavaForConditionalGeneration:
        assert real_logits(model, two_rows()).isfinite().all()
        # Buffers must be as in a new model, too: a wrong rotary embedding shows in the logits
        other = model_class(config)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(real_logits(other, two_rows()), real_logits(model, two_rows()))


@pytest.mark.every_version
@pytest.mark.parametrize(
    "missing",
    [
        "model.vision_tower.",
        "model.query_transformer.",
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.encoder.layers.1.self_attn.",
        "model.query_transformer.position_embedding",
        "model.query_transformer.query",
    ],
)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_missing_weights_are_initialised_as_in_a_new_model(missing, vision, tmp_path):
    """`from_pretrained` skips modules without tensors of their own, such as CLIP's attention. Their children must
    get the scale of a new model all the same."""
    config = big_enough_config(**(SIGLIP if vision == "siglip" else {}))
    saved, new = MQTLlavaForConditionalGeneration(config), MQTLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.fill_(0.123)
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if not name.startswith(missing)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    model, info = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    gone = {name for name in weights if name.startswith(missing)}
    assert gone and set(info["missing_keys"]) == gone
    assert_initialised_alike(model, new, gone)
    assert all(weight.eq(0.123).all() for name, weight in model.state_dict().items() if name not in gone)
