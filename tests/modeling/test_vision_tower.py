"""The vision tower runs the layers whose output is used, and no others."""

import gc

import pytest
import torch

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.small_model import SIGLIP, make_config, make_images, make_model, make_processor


@pytest.fixture(params=[{}, SIGLIP], ids=["clip", "siglip"])
def model(request):
    return make_model(**request.param)


@pytest.fixture
def pixel_values():
    return make_processor()(images=make_images(2), text="<image><image>", return_tensors="pt")["pixel_values"]


def layers_run(model):
    """A list that grows by the index of every layer of the tower that runs."""
    calls = []
    for i, layer in enumerate(model.model.vision_tower.encoder.layers._modules.values()):
        layer.register_forward_hook(lambda *args, i=i: calls.append(i))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-1, -2, -3, 1, 2])
def test_only_the_layers_before_the_features_run(model, pixel_values, feature_layer):
    calls = layers_run(model)
    model.config.vision_feature_layer = feature_layer
    features = model.get_image_features(pixel_values, 4)
    depth = feature_layer if feature_layer >= 0 else 4 + feature_layer
    assert calls == list(range(depth))
    whole = model.get_image_features(pixel_values, 4, output_hidden_states=True)
    assert calls[depth:] == [0, 1, 2] and len(whole.hidden_states) == 4
    torch.testing.assert_close(features.last_hidden_state, whole.hidden_states[feature_layer], atol=0, rtol=0)
    torch.testing.assert_close(features.pooler_output, whole.pooler_output, atol=0, rtol=0)
    again = model.get_image_features(pixel_values, 4)  # the whole run leaves no trace
    assert calls[depth + 3 :] == list(range(depth))
    torch.testing.assert_close(features.pooler_output, again.pooler_output, atol=0, rtol=0)


@torch.no_grad()
def test_another_layer_for_one_call(model, pixel_values):
    calls = layers_run(model)
    for feature_layer in (-1, 1, -2):
        tokens = model.get_image_features(pixel_values, vision_feature_layer=feature_layer).pooler_output
        hidden_states = model.get_image_features(pixel_values, output_hidden_states=True).hidden_states
        patches = hidden_states[feature_layer]
        if model.config.vision_feature_select_strategy == "default":
            patches = patches[:, 1:]
        torch.testing.assert_close(torch.stack(tokens), model.model.query_transformer(patches, 16))
    assert calls == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 1, 2]


@torch.no_grad()
def test_siglip_pooling_head_never_runs(pixel_values, tmp_path):
    """vLLM swaps the Linear inside its `nn.MultiheadAttention`. Its weights stay in the checkpoint."""
    model = make_model(**SIGLIP)
    model.model.vision_tower.head.register_forward_hook(lambda *args: pytest.fail("the head ran"))
    model.get_image_features(pixel_values, output_hidden_states=True)
    model.save_pretrained(tmp_path)
    loaded = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.vision_tower.head.probe, model.model.vision_tower.head.probe)


def test_the_layers_that_do_not_run_stay_in_the_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert any("layers.2." in name for name in model.state_dict() if "vision_tower" in name)
    assert make_config().vision_config.num_hidden_layers == 3


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
