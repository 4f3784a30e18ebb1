"""Token embeddings: resized, tied to the head or not, replaced."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.modeling.common import answers, assert_same_weights, keys, two_rows
from tests.small_model import TEXT_SIZES, make_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [300, 260])
def test_resize_token_embeddings(tied, size, tmp_path):
    text_config = LlamaConfig(**TEXT_SIZES, tie_word_embeddings=tied)
    model = make_model(text_config=text_config)
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    embeddings = model.resize_token_embeddings(size)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape == (size, 32)
    assert model.lm_head.weight.shape == (size, 32) and model.lm_head.out_features == size
    assert model.config.text_config.vocab_size == model.config.get_text_config().vocab_size == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    kept = min(size, 264)
    assert torch.equal(
        model.get_input_embeddings().weight[:kept], old["model.language_model.embed_tokens.weight"][:kept]
    )
    assert torch.equal(model.lm_head.weight[:kept], old["lm_head.weight"][:kept])

    inputs = two_rows()
    labels = inputs["input_ids"].clamp(max=size - 1)
    if size > 264:
        labels[:, -1] = size - 1  # a new token
    outputs = model(**inputs, labels=labels)
    assert outputs.logits.shape[-1] == size and outputs.loss.isfinite()
    outputs.loss.backward()
    if size > 264:
        assert model.lm_head.weight.grad[size - 1].abs().sum() > 0

    expected = answers(model, 4)
    model.save_pretrained(tmp_path)
    loaded, info = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.text_config.vocab_size == size
    assert answers(loaded, 4) == expected


@pytest.mark.parametrize("where", ["text_config", "config", "both"])
def test_tied_embeddings(where, tmp_path):
    """Set in the text config, as in language models, or at the top level: tied, saved once, loaded tied."""
    overrides = {"text_config": LlamaConfig(**TEXT_SIZES, tie_word_embeddings=where != "config")}
    if where != "text_config":
        overrides["tie_word_embeddings"] = True
    model = make_model(**overrides)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in keys(tmp_path)
    assert "model.language_model.embed_tokens.weight" in keys(tmp_path)

    loaded, info = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.tie_word_embeddings is True
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, model)
    assert answers(loaded, 4) == answers(model, 4)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(2)
    assert torch.equal(loaded.lm_head.weight, 2 * model.lm_head.weight)


def folder_of(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def test_untied_embeddings(tmp_path):
    model = make_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    folder_of(model, tmp_path)
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= keys(tmp_path)
    loaded = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight


def test_embeddings_stay_untied(tmp_path):
    """PEFT's advice for LoRA on tied embeddings: load them untied, copy, save, and continue from there."""
    make_model(text_config=LlamaConfig(**TEXT_SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    model = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    model.save_pretrained(tmp_path / "untied")
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= keys(tmp_path / "untied")
    loaded = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path / "untied").eval()
    # vLLM reads it from the text config
    assert loaded.config.tie_word_embeddings is False and loaded.config.text_config.tie_word_embeddings is False
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight

    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    tuned = get_peft_model(loaded, config)
    inputs = two_rows(4)
    with torch.no_grad():
        expected = tuned(**inputs).logits
        torch.testing.assert_close(tuned.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_set_input_embeddings():
    model, embeddings = make_model(), nn.Embedding(264, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens is embeddings
