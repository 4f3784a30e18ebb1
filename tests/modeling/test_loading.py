"""Weights: how they are initialised, saved, loaded, placed, cast, quantised, tied and resized, for several backbones."""

import json
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.small_model import NUM_QUERY_TOKENS, SIGLIP, make_config, make_images, make_model, make_processor


NUM_VISUAL_TOKENS = [1, 7, NUM_QUERY_TOKENS]
PARTS = ("model.vision_tower.", "model.query_transformer.", "model.language_model.", "lm_head.")


def prepare(m=7):
    """Two rows, with one image and with two."""
    first, *others = make_images(3)
    return make_processor()(
        images=[[first], others],
        text=["a <image>b", "<image> and <image> a longer text"],
        num_visual_tokens=m,
        padding=True,
        return_tensors="pt",
    )


@torch.no_grad()
def real_logits(model, inputs):
    """The logits where there is no padding, `(tokens, vocab_size)`."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def answers(model, m=None):
    return model.generate(
        **prepare(), num_visual_tokens=m, max_new_tokens=6, min_new_tokens=6, do_sample=False
    ).tolist()


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def files(folder):
    return {path.name for path in folder.iterdir()}


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# Initialisation -------------------------------------------------------------------------------------------------------


def big_enough_config(**overrides):
    """Layers wide enough that the standard deviation of each weight tells its scale, and unlike scales for the parts."""
    config = make_config(num_query_tokens=64, initializer_range=0.07, **overrides)
    config.text_config.initializer_range = 0.3
    return config


def assert_initialised_alike(model, expected, names=None):
    """Every weight has the mean and the spread that it has in `expected`, up to chance."""
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
        assert real_logits(model, prepare()).isfinite().all()
        # Buffers are no weights, but must be as in a new model: what a rotary embedding got here shows in the logits
        other = model_class(config)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(real_logits(other, prepare()), real_logits(model, prepare()))


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
    """The loader passes over modules without tensors of their own, such as CLIP's attention, whose children would get
    another scale than in a new model."""
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


# Key names ------------------------------------------------------------------------------------------------------------


TEXT_SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def backbone(name):
    """Overrides of `make_config` for a backbone. Configs are made anew: models write into them."""
    return {
        "clip, llama": lambda: {},
        "siglip, llama": lambda: {**SIGLIP, "vision_config": SiglipVisionConfig(**SIGLIP["vision_config"].to_dict())},
        "clip, mistral": lambda: {"text_config": MistralConfig(**TEXT_SIZES, head_dim=8, sliding_window=16)},
        "clip, qwen2": lambda: {"text_config": Qwen2Config(**TEXT_SIZES)},
        "clip, qwen2 tied": lambda: {"text_config": Qwen2Config(**TEXT_SIZES, tie_word_embeddings=True)},
        "clip, gemma": lambda: {"text_config": GemmaConfig(**TEXT_SIZES, head_dim=8)},
        "siglip, gemma3": lambda: {
            **backbone("siglip, llama"),
            "text_config": Gemma3TextConfig(**TEXT_SIZES, head_dim=8, sliding_window=16),
        },
    }[name]()


BACKBONES = [
    "clip, llama",
    "siglip, llama",
    "clip, mistral",
    "clip, qwen2",
    "clip, qwen2 tied",
    "clip, gemma",
    "siglip, gemma3",
]


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
    for config in configs:  # as of LLaVA, the type of a new model's parts is not known, that of a loaded one is
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


# Backbones ------------------------------------------------------------------------------------------------------------


@pytest.mark.every_version
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
def test_backbones_save_load_and_generate(name, m, tmp_path):
    model = make_model(**backbone(name))
    expected = answers(model, m)
    features = model.get_image_features(prepare()["pixel_values"], visual_token_counts=m, return_dict=True)
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(m, 32)] * 3
    assert features.last_hidden_state.shape == (3, 36 if "siglip" in name else 37, 32)

    logits = real_logits(model, prepare(m))
    blind = real_logits(model, prepare(m) | {"pixel_values": -prepare()["pixel_values"]})
    assert (logits - blind).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    for auto_class in (MQTLlavaForConditionalGeneration, AutoModelForImageTextToText):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded.model.language_model) is type(model.model.language_model)
        assert type(loaded.model.vision_tower) is type(model.model.vision_tower)
        assert answers(loaded, m) == expected
        torch.testing.assert_close(real_logits(loaded, prepare(m)), logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MQTLlavaModel
    with torch.no_grad():
        hidden_states = base(**prepare(m)).last_hidden_state[prepare(m)["attention_mask"].bool()]
        torch.testing.assert_close(loaded.lm_head(hidden_states).shape, logits.shape)


@pytest.mark.parametrize("name", [name for name in BACKBONES if "tied" not in name])
def test_visual_tokens_enter_the_language_model_as_in_llava(name):
    """The same visual tokens in transformers' own LLaVA, with the same language model, give the same logits. Gemma scales
    its input embeddings: in LLaVA that goes for visual tokens too (PaliGemma divides them beforehand, LLaVA does not)."""
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
    inputs = prepare(counts)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], counts, return_dict=True)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        theirs = llava(**prompt, mm_encoder_outputs={"image": features}).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(real_logits(model, inputs), theirs, atol=1e-5, rtol=0)


def test_wrong_select_strategy_is_named():
    """SigLIP has no class token: dropping a feature leaves no square grid."""
    model = make_model(**{**backbone("siglip, llama"), "vision_feature_select_strategy": "default"})
    with pytest.raises(ValueError, match=r'35 patch features.*"full"'):
        model(**prepare())
    model = make_model(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r'37 patch features.*"default"'):
        model(**prepare())


# Places and precisions ------------------------------------------------------------------------------------------------


def folder_of(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


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
    torch.testing.assert_close(real_logits(model, prepare()), real_logits(make_model(), prepare()))


def test_auto_device_map_keeps_layers_whole(checkpoint, tmp_path):
    """Too little memory for the model: the rest goes to disk, but no layer and no query transformer is torn apart,
    wherever the memory ends."""
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
    exact, inputs = make_model(), prepare()
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
    """In half precision the bicubic weights alone would cost accuracy: resized in float32, cast afterwards."""
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
    inputs = prepare(m)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 3, -100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    exact = make_model()(**inputs, labels=labels).loss
    assert loss.isfinite() and abs(loss - exact) < 0.05 * exact and loss != exact
    gradients = [p.grad for p in model.model.query_transformer.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# Embeddings -----------------------------------------------------------------------------------------------------------


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

    inputs = prepare()
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
    """Said in the text config, as language models have it, or at the top: tied, saved once, loaded tied."""
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


def test_untied_embeddings(tmp_path):
    model = make_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    folder_of(model, tmp_path)
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= keys(tmp_path)
    loaded = MQTLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight


def test_embeddings_stay_untied(tmp_path):
    """As PEFT advises for LoRA on tied embeddings: load them untied, copy, save, and go on from that."""
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
    inputs = prepare(4)
    with torch.no_grad():
        expected = tuned(**inputs).logits
        torch.testing.assert_close(tuned.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_set_input_embeddings():
    model, embeddings = make_model(), nn.Embedding(264, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens is embeddings


# Quantisation ---------------------------------------------------------------------------------------------------------


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
    """Widths that bitsandbytes' blocks of 64 divide."""
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

    inputs = prepare()
    logits, exact = real_logits(model, inputs), real_logits(wide_model(), inputs)
    assert logits.isfinite().all() and not torch.equal(logits, exact)
    # As good as the rounding of the weights allows: a plain model with the rounded weights says the same
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


def test_config_round_trip(tmp_path):
    for name in BACKBONES:
        config = make_config(**backbone(name))
        config.save_pretrained(tmp_path)
        assert MQTLlavaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
