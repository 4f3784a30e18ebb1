"""Full checkpoints of the authors, however they are stored. Parity with the authors' code is in tests/modeling/test_parity."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
)

from mqt_llava import VisualTokenSchedule
from mqt_llava.conversion import convert
from tests.conversion.checkpoints import PIECES, VISION_TOWER, edit_json, read_weights, write_authors, write_weights
from tests.reference import official_layout
from tests.small_model import make_images


FILES = {
    "adaptive_mqt_llava.py",
    "budget_mqt_llava.py",
    "chat_template.jinja",
    "config.json",
    "configuration_mqt_llava.py",
    "generation_config.json",
    "image_processing_mqt_llava.py",
    "model.safetensors",
    "modeling_mqt_llava.py",
    "processing_mqt_llava.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_folder_has_all_that_a_checkpoint_has(converted):
    assert {path.name for path in converted.iterdir()} == FILES
    model, report = AutoModelForImageTextToText.from_pretrained(converted, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    config = model.config
    assert config.image_token_id == PIECES and config.text_config.vocab_size == PIECES + 1
    assert (config.num_query_tokens, config.vision_feature_layer) == (256, -2)
    assert config.text_config.num_key_value_heads == 2 and config.text_config.rms_norm_eps == 1e-5
    assert config.vision_config.hidden_act == "quick_gelu"
    generation_config = GenerationConfig.from_pretrained(converted)
    assert (generation_config.bos_token_id, generation_config.eos_token_id) == (1, 2)
    assert generation_config.suppress_tokens == [PIECES]
    num_query_tokens = AutoConfig.from_pretrained(converted).num_query_tokens
    schedule = VisualTokenSchedule(**generation_config.visual_token_schedule)
    assert schedule == VisualTokenSchedule.default(num_query_tokens)  # and said to be calibrated on nothing
    processor = AutoProcessor.from_pretrained(converted)
    assert (processor.num_query_tokens, processor.image_processor.side, processor.image_token_id) == (256, 336, PIECES)
    assert processor.tokenizer.model_max_length == 2048


def test_new_row_is_the_mean_of_the_others(converted, weights):
    ours = read_weights(converted)
    for name, official in (
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert torch.equal(ours[name][:-1], weights[official])
        assert torch.equal(ours[name][-1], weights[official].float().mean(0).bfloat16())


@pytest.mark.parametrize("inside", [True, False], ids=["tower-inside", "tower-beside"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_way_of_storing_gives_the_same_tensors(source, weights, converted, tmp_path, suffix, shards, inside):
    stored = {name: tensor for name, tensor in weights.items() if inside or not name.startswith(VISION_TOWER)}
    write_weights(source, stored, suffix, shards)
    report = convert(str(source), tmp_path / "out", max_shard_size="6MB")
    assert_same(read_weights(tmp_path / "out"), read_weights(converted))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert ("checkpoint itself" in report.vision_source) == inside
    assert "clip" in report.vision_source


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_stay_as_they_are_or_become_what_is_asked(source, weights, converted, tmp_path, dtype):
    write_weights(source, {name: tensor.to(dtype) for name, tensor in weights.items()})
    report = convert(str(source), tmp_path / "kept")
    assert report.dtypes == [str(dtype).removeprefix("torch.")]
    assert {tensor.dtype for tensor in read_weights(tmp_path / "kept").values()} == {dtype}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "kept", dtype="auto").dtype == dtype
    report = convert(str(source), tmp_path / "cast", dtype=torch.bfloat16, verify=True)
    assert report.dtypes == ["bfloat16"]
    found, expected = read_weights(tmp_path / "cast"), read_weights(converted)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-2, rtol=1e-2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "cast", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_report(authors, weights, tmp_path):
    seen = []
    report = convert(str(authors), tmp_path / "out", progress=lambda *told: seen.append(told))
    ours = read_weights(tmp_path / "out")
    packed = [name for name in weights if ".in_proj_" in name]
    assert (report.tensors_in, report.tensors_out, report.split) == (len(weights), len(ours), len(packed))
    renamed = [name for name in weights if name not in packed and name not in ours]
    assert report.renamed == len(renamed)
    assert report.nbytes == sum(tensor.nbytes for tensor in ours.values())
    assert report.dtypes == ["bfloat16"] and report.layout == "full checkpoint"
    assert set(report.files) == FILES
    assert report.base_models == ["lmsys/vicuna-7b-v1.5", "clip"]
    assert report.seconds > 0 and report.checks == []
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and len(seen) == len(ours)
    assert seen[-1] == ("converting", report.nbytes, report.nbytes)


def test_dry_run_says_the_same_and_writes_nothing(authors, tmp_path):
    told = []
    dry = convert(str(authors), tmp_path / "a" / "out", dry_run=True, progress=lambda *bytes: told.append(bytes))
    assert list(tmp_path.iterdir()) == [] and told == []
    real = convert(str(authors), tmp_path / "out")
    for name in vars(real).keys() - {"seconds"}:
        assert getattr(dry, name) == getattr(real, name), name


# --- the vision tower ---


def test_flag_decides_which_tower(source, authors, weights, tmp_path):
    """A tower given by flag goes before the tensors inside."""
    other = official_layout.clip_tensors(2, 16, 336, 14)
    torch.manual_seed(0)
    tower = {name: torch.randn(shape).bfloat16() for name, (shape, *_) in other.items()}
    write_weights(source.parent / "clip", tower)
    inside = convert(str(source), tmp_path / "inside")
    flag = convert(str(source), tmp_path / "flag", vision_tower=str(source.parent / "clip"), verify=True)
    name = "embeddings.class_embedding"
    ours = {kind: read_weights(tmp_path / kind)[f"model.vision_tower.{name}"] for kind in ("inside", "flag")}
    assert torch.equal(ours["inside"], weights[f"{VISION_TOWER}vision_model.{name}"])
    assert torch.equal(ours["flag"], tower[f"vision_model.{name}"])
    assert "the checkpoint itself" in inside.vision_source and "separate clip" in inside.vision_source
    assert f"{len(tower)} vision tensors in the checkpoint are ignored" in flag.vision_source
    assert flag.tensors_in == inside.tensors_in


def test_tower_of_the_checkpoint_alone(source, weights, converted, tmp_path):
    """`mm_vision_tower` may name a CLIP of the Hub that cannot be reached."""
    edit_json(source / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    report = convert(str(source), tmp_path / "out", verify=True)
    assert_same(read_weights(tmp_path / "out"), read_weights(converted))
    assert report.base_models[1] == "openai/clip-vit-large-patch14-336"
    ours, expected = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", converted))
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ):
        assert ours["vision_config"][key] == expected["vision_config"][key], key
    assert ours["vision_config"]["hidden_act"] == expected["vision_config"]["hidden_act"]
    processing = [(folder / "processor_config.json").read_text() for folder in (tmp_path / "out", converted)]
    assert processing[0] == processing[1]


def test_tower_that_is_nowhere(source, weights, tmp_path):
    write_weights(source, {name: tensor for name, tensor in weights.items() if not name.startswith(VISION_TOWER)})
    edit_json(source / "config.json", mm_vision_tower="nowhere")
    with pytest.raises(ValueError, match=r"'nowhere'.*--vision-tower"):
        convert(str(source), tmp_path / "out")
    edit_json(source / "config.json", mm_vision_tower=None)
    with pytest.raises(ValueError, match="--vision-tower"):
        convert(str(source), tmp_path / "out")
    write_weights(source, weights)
    edit_json(source / "config.json", mm_vision_tower="someone/other-tower")
    with pytest.raises(ValueError, match=r"someone/other-tower.*--vision-tower"):
        convert(str(source), tmp_path / "out")
    edit_json(source / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    lacking = f"{VISION_TOWER}vision_model.embeddings.patch_embedding.weight"
    write_weights(source, {name: tensor for name, tensor in weights.items() if name != lacking})
    with pytest.raises(ValueError, match="patch_embedding"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_clip_as_tower(source, weights, tmp_path):
    """The Hub's CLIP repositories hold the text model too."""
    vision = json.loads((source.parent / "clip" / "config.json").read_text())
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**vision), projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    report = convert(str(source), tmp_path / "out", vision_tower=str(tmp_path / "clip"), verify=True)
    assert all(check.passed for check in report.checks)
    ours = read_weights(tmp_path / "out")
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(ours["model.vision_tower." + name], tensor), name


# --- what configs say ---


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "llava_mistral", "sliding_window": 4096},
        {"mm_vision_select_layer": -1},
        {"rms_norm_eps": 1e-2},
        {"torch_dtype": None, "_name_or_path": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_language_model_are_kept(source, tmp_path, changes):
    edit_json(source / "config.json", **changes)
    report = convert(str(source), tmp_path / "out", verify=True)
    assert all(check.passed for check in report.checks)
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config
    text = config.text_config
    assert text.rope_parameters["rope_theta"] == changes.get("rope_theta", 10000.0)
    assert text.rope_parameters["rope_type"] == changes.get("rope_scaling", {}).get("type", "default")
    assert text.rope_parameters.get("factor") == changes.get("rope_scaling", {}).get("factor")
    assert text.model_type == ("mistral" if "model_type" in changes else "llama")
    assert text.rms_norm_eps == changes.get("rms_norm_eps", 1e-5)
    assert config.vision_feature_layer == changes.get("mm_vision_select_layer", -2)


@pytest.mark.parametrize(
    "changes",
    [
        {"query_abstractor_type": "resampler"},
        {"mm_vision_select_feature": "cls_patch"},
        {"image_aspect_ratio": "anyres"},
        {"mm_patch_merge_type": "spatial"},
        {"mm_use_im_start_end": True},
        {"model_type": "llava_mpt"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_our_model_is_not_is_refused(source, tmp_path, changes):
    edit_json(source / "config.json", **changes)
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{key} is {value!r}"):
        convert(str(source), tmp_path / "out")


def test_tensors_of_older_transformers(source, weights, converted, tmp_path):
    older = {
        f"{VISION_TOWER}vision_model.embeddings.position_ids": torch.arange(577)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    write_weights(source, weights | older, ".bin")
    convert(str(source), tmp_path / "out")
    assert_same(read_weights(tmp_path / "out"), read_weights(converted))


def test_padded_vocabulary(tokenizer_model, tmp_path):
    """`<image>` takes the first row that no token has; the rows stay as they are."""
    source = write_authors(tmp_path, tokenizer_model, vocab=PIECES + 20)
    convert(str(source), tmp_path / "out", verify=True)
    ours = read_weights(tmp_path / "out")
    assert torch.equal(ours["lm_head.weight"], read_weights(source)["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_id"] == PIECES and config["text_config"]["vocab_size"] == PIECES + 20


def test_tokens_added_by_hand(tokenizer_model, tmp_path):
    """A `<pad>` of its own stands after the pieces, `<image>` after that."""
    source = write_authors(tmp_path, tokenizer_model, vocab=PIECES + 1)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"][str(PIECES)] = {"content": "<pad>", **special}
    edit_json(source / "tokenizer_config.json", **settings | {"pad_token": "<pad>"})
    convert(str(source), tmp_path / "out", verify=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<pad>") == processor.tokenizer.pad_token_id == PIECES
    assert processor.image_token_id == PIECES + 1
    assert read_weights(tmp_path / "out")["lm_head.weight"].shape[0] == PIECES + 2


def test_images_may_be_cropped(source, tmp_path):
    """Without `pad` the authors take CLIP's own processor: shortest side to 336, then the middle."""
    edit_json(source / "config.json", image_aspect_ratio="square")
    convert(str(source), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = make_images(1)[0].resize((90, 50))
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    expected = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    assert torch.equal(pixels, expected(image, return_tensors="pt")["pixel_values"])
