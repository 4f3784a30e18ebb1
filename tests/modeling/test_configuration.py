"""The config: refused values, sub-configs, round trips."""

import pytest

from mqt_llava import MQTLlavaConfig
from tests.small_model import make_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_query_tokens": 10}, "square number .*got 10"),
        ({"num_query_tokens": 0}, "square number .*got 0"),
        ({"query_transformer_num_attention_heads": 5}, "divide the vision tower's width 32; got 5"),
        ({"query_transformer_num_attention_heads": 0}, "divide"),
        ({"vision_feature_select_strategy": "patch"}, "default.*full.*got 'patch'"),
    ],
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_config(**overrides)


def test_defaults_are_those_of_mqt_llava_7b():
    config = MQTLlavaConfig()
    assert (config.num_query_tokens, config.query_transformer_num_attention_heads) == (256, 16)
    assert (config.vision_config.hidden_size, config.vision_config.image_size, config.vision_config.patch_size) == (
        1024,
        336,
        14,
    )
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert config.image_token_id < config.text_config.vocab_size and config.get_text_config() is config.text_config


def test_round_trip(tmp_path):
    config = make_config(num_query_tokens=9, vision_feature_layer=-1)
    config.save_pretrained(tmp_path)
    again = MQTLlavaConfig.from_pretrained(tmp_path)
    assert (again.num_query_tokens, again.vision_feature_layer) == (9, -1)
    assert again.text_config.to_dict() == config.text_config.to_dict()
    assert again.image_token_index == again.image_token_id == 3
