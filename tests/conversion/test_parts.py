"""A new model of a vision tower, a language model and a fresh query transformer."""

import shutil
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from mqt_llava.conversion import VerificationError, convert, layouts
from mqt_llava.modeling.modeling_mqt_llava import sinusoidal_grid_positions
from tests.conversion.checkpoints import PIECES, read_weights
from tests.small_model import make_images, make_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 30, "patch_size": 5, **SIZES | {"hidden_size": 64}}
BYTES = 259  # tokens of the byte-level tokenizer without `<image>`


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A CLIP tower alone, and a whole SigLIP."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "clip")
    text = SiglipTextConfig(vocab_size=64, **SIZES)
    siglip = SiglipModel(
        SiglipConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**VISION).to_dict())
    )
    siglip.save_pretrained(folder / "siglip")
    (folder / "siglip" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


def byte_tokenizer(folder, image=False):
    tokenizer = make_tokenizer()
    if not image:
        vocab = tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<unused>"')
        tokenizer = type(tokenizer)(
            tokenizer_object=type(tokenizer.backend_tokenizer).from_str(vocab), eos_token="</s>", pad_token="<pad>"
        )
    tokenizer.save_pretrained(folder)


def language_model(folder, config, tokenizer_model=None, authors=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if authors is None:
        byte_tokenizer(folder)
    else:
        for path in authors.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
    return model.eval()


LANGUAGE_MODELS = {
    "llama": LlamaConfig(vocab_size=PIECES, num_key_value_heads=2, **SIZES),
    "llama-tied": LlamaConfig(vocab_size=PIECES, tie_word_embeddings=True, **SIZES),
    "llama-padded": LlamaConfig(vocab_size=PIECES + 20, **SIZES),
    "mistral": MistralConfig(vocab_size=PIECES, num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(vocab_size=BYTES + 1, num_key_value_heads=2, **SIZES),
    "qwen2-padded": Qwen2Config(vocab_size=BYTES + 29, num_key_value_heads=2, **SIZES),
    "gemma": GemmaConfig(vocab_size=BYTES + 1, head_dim=8, num_key_value_heads=1, **SIZES),
    "gpt2": GPT2Config(
        vocab_size=BYTES + 1, n_embd=32, n_layer=2, n_head=4, n_positions=512, tie_word_embeddings=False
    ),
}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_ready_for_stage_1(towers, authors, tmp_path, name, tower):
    config = LANGUAGE_MODELS[name]
    has_pieces = name.startswith(("llama", "mistral"))
    text_model = language_model(tmp_path / "llm", config, authors=authors if has_pieces else None)
    report = convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / tower), verify=True)
    folder = tmp_path / "out"
    assert (folder / "tokenizer.model").exists() == has_pieces
    assert report.base_models == [str(tmp_path / "llm"), str(towers / tower)]
    checks = ["tensors that differ", "prompts with other ids", "vision features", "logits"]
    assert [check.name for check in report.checks if check.passed] == checks
    ours = read_weights(folder)
    fresh = [tensor for tensor in ours if ".query_transformer." in tensor]
    assert (report.tensors_out, report.tensors_in) == (len(ours), len(ours) - len(fresh))
    assert report.renamed == report.tensors_in - ("lm_head.weight" in ours) and report.split == 0
    assert ("lm_head.weight" in ours) != config.tie_word_embeddings

    model, loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    image_token = model.config.image_token_id
    assert processor.image_token_id == image_token
    assert model.get_input_embeddings().weight.shape[0] == max(config.vocab_size, image_token + 1)

    # the language model is the one it was
    ids = torch.tensor([[5, 20, 33, 44]])
    with torch.no_grad():
        expected = text_model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., : expected.shape[-1]], expected)
    positions = sinusoidal_grid_positions(16, 64)
    torch.testing.assert_close(model.model.query_transformer.position_embedding.data, positions)

    # a step of stage 1
    image = make_images(1)[0]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    prompt = processor.apply_chat_template(messages)
    assert "None" not in prompt
    inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
    assert (inputs["input_ids"] == image_token).sum() == 256
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == image_token, -100)
    model.requires_grad_(False)
    model.model.query_transformer.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.query_transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.model.query_transformer.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    output = model.generate(**inputs, num_visual_tokens=4, max_new_tokens=3, do_sample=False)
    assert output.shape[0] == 1 and image_token not in output[0, inputs["input_ids"].shape[1] :]


def test_pictures_are_prepared_as_the_tower_wants(towers, authors, tmp_path):
    language_model(tmp_path / "llm", LANGUAGE_MODELS["llama"], authors=authors)
    convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / "siglip"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(images=make_images(2), text="<image><image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 30, 30) and pixels.abs().max() <= 1


def test_tokenizer_that_has_the_image_token(towers, tmp_path):
    """Then its row in the embeddings is taken, wherever it stands."""
    language_model(tmp_path / "llm", LANGUAGE_MODELS["qwen2"])
    byte_tokenizer(tmp_path / "llm", image=True)
    convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / "clip"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (3, BYTES + 1)


def test_fresh_weights_are_the_same_every_time(towers, authors, tmp_path):
    language_model(tmp_path / "llm", LANGUAGE_MODELS["llama"], authors=authors)
    for name in ("a", "b"):
        convert(str(tmp_path / "llm"), tmp_path / name, vision_tower=str(towers / "clip"), dtype=torch.bfloat16)
    a, b = read_weights(tmp_path / "a"), read_weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.bfloat16 for name in a)


def test_tied_embeddings_of_another_name(towers, tmp_path):
    config = GPT2Config(vocab_size=BYTES, n_embd=32, n_layer=1, n_head=4)
    language_model(tmp_path / "llm", config)
    with pytest.raises(ValueError, match=r"wte\.weight"):
        convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / "clip"))


@pytest.mark.parametrize(
    ("name", "failed"),
    [("model.norm.weight", "logits"), ("post_layernorm.bias", None), ("layers.0.layer_norm1.bias", "vision features")],
)
def test_verification_runs_the_parts(towers, authors, tmp_path, monkeypatch, name, failed):
    """A part of another value than its own class has is found, where anything reads it."""
    language_model(tmp_path / "llm", LANGUAGE_MODELS["llama"], authors=authors)
    plan = layouts.plan_parts

    def tampered(*args):
        planned = plan(*args)
        (wrong,) = (key for key in planned.tensors if key.replace("language_model.", "").endswith(name))
        planned.tensors[wrong] = planned.tensors[wrong].map(lambda values: values + 1)
        return planned

    monkeypatch.setattr(layouts, "plan_parts", tampered)
    run = partial(convert, str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / "clip"), verify=True)
    if failed is None:
        return run()
    with pytest.raises(VerificationError) as error:
        run()
    assert [check.name for check in error.value.checks if not check.passed] == [failed]


@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_other_models_are_no_language_models(towers, tmp_path, kind):
    source = towers / "clip"
    if kind == "llava":
        source = tmp_path / "llava"
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "llava"}')
    for options in ({}, {"vision_tower": str(towers / "clip")}):
        with pytest.raises(ValueError, match=f"is a '{kind}.*' model; a checkpoint of the authors' code"):
            convert(str(source), tmp_path / "out", **options)


def test_tower_that_does_not_say_how_images_are_scaled(towers, authors, tmp_path):
    language_model(tmp_path / "llm", LANGUAGE_MODELS["llama"], authors=authors)
    shutil.copytree(towers / "siglip", tmp_path / "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"siglip has no preprocessor_config\.json"):
        convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(tmp_path / "siglip"))


def test_what_is_missing_is_named(towers, authors, tmp_path):
    language_model(tmp_path / "llm", LANGUAGE_MODELS["llama"], authors=authors)
    with pytest.raises(ValueError, match="--vision-tower"):
        convert(str(tmp_path / "llm"), tmp_path / "out")
    with pytest.raises(ValueError, match="--base-model"):
        convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(towers / "clip"), base_model="x")
    with pytest.raises(ValueError, match=r"not a vision tower.*llama"):
        convert(str(tmp_path / "llm"), tmp_path / "out", vision_tower=str(tmp_path / "llm"))
    assert not (tmp_path / "out").exists()
