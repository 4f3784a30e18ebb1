"""Saving and loading: key names, shards, with and without the head, on the devices of a device map."""

import json

import pytest
import torch

from mqt_llava import MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.modeling.common import BACKBONES, answers, assert_same_weights, backbone, keys, real_logits, two_rows
from tests.small_model import make_model


PARTS = ("model.vision_tower.", "model.query_transformer.", "model.language_model.", "lm_head.")


def files(folder):
    return {path.name for path in folder.iterdir()}


# Key names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_key_names_survive_a_round_trip(name, tmp_path):
    model = make_model(**backbone(name))
    model.save_pretrained(tmp_path)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert keys(tmp_path) == model.state_dict().keys() - tied
    for part in PARTS:
        assert (part == "lm_head." and tied) or any(key.startswith(part) for key in keys(tmp_path))
    assert all(key.startswith(PARTS) for key in keys(tmp_path))

    loaded, info = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    for config in configs:  # as in LLaVA, only a loaded model's sub-configs have a dtype
        config["text_config"].pop("dtype", None), config["vision_config"].pop("dtype", None)
    assert configs[0] == configs[1]


def test_shards(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert_same_weights(MQTLlavaForConditionalGeneration.from_pretrained(tmp_path), model)


def test_base_model_and_head_model_load_each_others_folders(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "head")
    base, info = MQTLlavaModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert_same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert keys(tmp_path / "base") == base.state_dict().keys()
    head, info = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]
    assert_same_weights(head.model, model.model)


# Device maps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {
            "model.vision_tower": "cpu",
            "model.query_transformer": "cpu",
            "model.language_model": "cpu",
            "lm_head": "cpu",
        },
    ],
    ids=["cpu", "auto", "everything", "parts"],
)
def test_device_maps(device_map, checkpoint):
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert answers(model, 4) == answers(make_model(), 4)


@pytest.mark.parametrize("on_disk", ["model.vision_tower", "model.query_transformer", "model.language_model", "all"])
def test_offload_to_disk(on_disk, checkpoint, tmp_path):
    parts = ["model.vision_tower", "model.query_transformer", "model.language_model", "lm_head"]
    device_map = {part: "disk" if on_disk in (part, "all") else "cpu" for part in parts}
    model = MQTLlavaForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    assert model.hf_device_map == device_map
    offloaded = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert offloaded == {n for n in make_model().state_dict() if on_disk == "all" or n.startswith(on_disk + ".")}
    assert answers(model, 4) == answers(make_model(), 4)
    torch.testing.assert_close(real_logits(model, two_rows()), real_logits(make_model(), two_rows()))


def test_auto_device_map_keeps_layers_whole(checkpoint, tmp_path):
    """With too little memory the rest of the model goes to disk. Wherever the memory ends, neither a layer nor the query
    transformer is split."""
    size = sum(parameter.numel() * 4 for parameter in make_model().parameters())
    wholes = ["model.query_transformer"]
    wholes += [f"model.vision_tower.encoder.layers.{i}" for i in range(3)]
    wholes += [f"model.language_model.layers.{i}" for i in range(2)]
    last_places = set()
    for memory in range(size // 3, size, 6000):
        model = MQTLlavaForConditionalGeneration.from_pretrained(
            checkpoint, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path
        )
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        last_places.add([name for name, place in model.hf_device_map.items() if place == "cpu"][-1])
        for whole in wholes:
            assert not any(place.startswith(whole + ".") for place in model.hf_device_map), model.hf_device_map
    assert len(last_places) > 3
    assert answers(model, 4) == answers(make_model(), 4)
