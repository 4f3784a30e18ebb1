"""Other vision towers and language models: saved, loaded, and fed with visual tokens as in LLaVA."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.modeling.common import BACKBONES, NUM_VISUAL_TOKENS, answers, backbone, real_logits, two_rows
from tests.small_model import make_config, make_model


@pytest.mark.every_version
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
def test_backbones_save_load_and_generate(name, m, tmp_path):
    model = make_model(**backbone(name))
    expected = answers(model, m)
    features = model.get_image_features(two_rows()["pixel_values"], visual_token_counts=m, return_dict=True)
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(m, 32)] * 3
    assert features.last_hidden_state.shape == (3, 36 if "siglip" in name else 37, 32)

    logits = real_logits(model, two_rows(m))
    blind = real_logits(model, two_rows(m) | {"pixel_values": -two_rows()["pixel_values"]})
    assert (logits - blind).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    for auto_class in (MQTLlavaForConditionalGeneration, AutoModelForImageTextToText):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded.model.language_model) is type(model.model.language_model)
        assert type(loaded.model.vision_tower) is type(model.model.vision_tower)
        assert answers(loaded, m) == expected
        torch.testing.assert_close(real_logits(loaded, two_rows(m)), logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MQTLlavaModel
    with torch.no_grad():
        hidden_states = base(**two_rows(m)).last_hidden_state[two_rows(m)["attention_mask"].bool()]
        torch.testing.assert_close(loaded.lm_head(hidden_states).shape, logits.shape)


@pytest.mark.parametrize("name", [name for name in BACKBONES if "tied" not in name])
def test_visual_tokens_enter_the_language_model_as_in_llava(name):
    """The same visual tokens in transformers' own LLaVA, with the same language model, give the same logits. Gemma
    scales its input embeddings. In LLaVA this includes visual tokens (PaliGemma divides them beforehand, LLaVA does not)."""
    model = make_model(**backbone(name))
    llava_config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_id=3,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    llava = LlavaForConditionalGeneration(llava_config).eval()
    llava.model.language_model.load_state_dict(model.model.language_model.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    counts = [5, 16, 1]
    inputs = two_rows(counts)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], counts, return_dict=True)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        theirs = llava(**prompt, mm_encoder_outputs={"image": features}).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(real_logits(model, inputs), theirs, atol=1e-5, rtol=0)


def test_wrong_select_strategy_is_named():
    """SigLIP has no class token: without the first feature the others form no square grid."""
    model = make_model(**{**backbone("siglip, llama"), "vision_feature_select_strategy": "default"})
    with pytest.raises(ValueError, match=r'35 patch features.*"full"'):
        model(**two_rows())
    model = make_model(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r'37 patch features.*"default"'):
        model(**two_rows())


def test_config_round_trip(tmp_path):
    for name in BACKBONES:
        config = make_config(**backbone(name))
        config.save_pretrained(tmp_path)
        assert MQTLlavaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
