"""The vision tower ends at the layer whose output is used: nothing behind it is built, loaded or run."""

import gc
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, Dinov2Config, SiglipVisionModel
from transformers.utils import logging

from mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.small_model import SIGLIP, make_config, make_images, make_model, make_processor


pytestmark = pytest.mark.every_version


TOWERS = {"clip": ({}, CLIPVisionModel), "siglip": (SIGLIP, SiglipVisionModel)}


@pytest.fixture(params=TOWERS)
def tower(request):
    """What to make the config with, and transformers' class of the whole tower."""
    return TOWERS[request.param]


@pytest.fixture
def pixel_values():
    return make_processor()(images=make_images(2), text="<image><image>", return_tensors="pt")["pixel_values"]


def whole_tower(model, tower_class):
    """A tower of all layers, with the model's weights where it has any."""
    torch.manual_seed(1)
    whole = tower_class(model.config.vision_config).eval()
    missing, unexpected = whole.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not unexpected
    return whole, missing


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-1, -2, -3, 1, 2, 3])
def test_features_are_those_of_the_whole_tower(tower, pixel_values, feature_layer):
    settings, tower_class = tower
    model = make_model(**settings, vision_feature_layer=feature_layer)
    whole, missing = whole_tower(model, tower_class)
    depth = feature_layer if feature_layer >= 0 else 4 + feature_layer
    assert len(model.model.vision_tower.encoder.layers) == depth == model.config.vision_feature_depth
    behind = tuple(f"encoder.layers.{i}." for i in range(depth, 3)) + ("post_layernorm.", "head.")
    assert missing and all(name.startswith(behind) for name in missing)
    features = model.get_image_features(pixel_values, 4)
    expected = whole(pixel_values, output_hidden_states=True).hidden_states[feature_layer]
    torch.testing.assert_close(features.last_hidden_state, expected, atol=1e-6, rtol=0)
    assert features.hidden_states is None
    states = model.get_image_features(pixel_values, 4, output_hidden_states=True).hidden_states
    assert len(states) == depth + 1
    torch.testing.assert_close(states[-1], features.last_hidden_state, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-2, -1, 1])
def test_towers_of_other_libraries_stay_whole(pixel_values, feature_layer):
    """What their last hidden state would be is not known: the hidden state is asked for by its index."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 30, "patch_size": 5}
    model = make_model(vision_config=Dinov2Config(**shape), vision_feature_layer=feature_layer)
    assert len(model.model.vision_tower.encoder.layer) == 3
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True)
    features = model.get_image_features(pixel_values, 4)
    torch.testing.assert_close(features.last_hidden_state, outputs.hidden_states[feature_layer])
    assert features.hidden_states is None


@pytest.mark.parametrize("model_class", [MQTLlavaForConditionalGeneration, MQTLlavaModel])
def test_checkpoints_of_the_whole_tower_load_without_a_warning(tower, tmp_path, caplog, model_class):
    """Older versions saved it, and the converter copies it."""
    settings, tower_class = tower
    model = make_model(**settings)
    expected = model if model_class is MQTLlavaForConditionalGeneration else model.model
    expected.save_pretrained(tmp_path)
    whole, missing = whole_tower(model, tower_class)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "vision_tower." if expected is model.model else "model.vision_tower."
    more = {prefix + name: whole.state_dict()[name].clone() for name in missing}
    assert not more.keys() & tensors.keys()
    save_file(tensors | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    logging.disable_propagation()
    assert not report["missing_keys"] and not [record for record in caplog.records if record.levelname == "WARNING"]
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_tensors_that_belong_nowhere_are_still_reported(tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stray = "model.vision_tower.encoder.layers.0.stray"
    save_file(tensors | {stray: torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {stray}


@pytest.mark.parametrize("feature_layer", [-5, 4, -99])
def test_a_layer_that_the_tower_has_not_is_refused(feature_layer):
    with pytest.raises(ValueError, match=rf"from -4 to 3 for a vision tower with 3 layers; got {feature_layer}"):
        make_config(vision_feature_layer=feature_layer)


@torch.no_grad()
def test_hidden_states_that_are_not_used_are_not_kept(pixel_values):
    """However deep the tower is, no more than two of its hidden states live at a time beyond the one at work."""
    alive = []
    for depth in (4, 12):
        config = make_config()
        config.vision_config.num_hidden_layers = depth
        model = MQTLlavaForConditionalGeneration(config).eval()
        shape = (2, 37, 32)
        most = 0

        def count(*args):
            nonlocal most
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and tuple(x.shape) == shape]
            most = max(most, len({x.data_ptr() for x in tensors}))

        model.model.vision_tower.encoder.layers[depth - 2].register_forward_hook(count)
        model.get_image_features(pixel_values)
        alive.append(most)
    assert alive[0] == alive[1] <= 5
