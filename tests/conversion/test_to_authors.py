"""Our checkpoints in the authors' layout again."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPVisionModel

from mqt_llava.conversion import VerificationError, convert, names
from mqt_llava.conversion.files import LazyTensor
from mqt_llava.conversion.names import from_authors, to_authors
from tests.conversion.checkpoints import (
    PIECES,
    SMALL,
    VISION_TOWER,
    edit_json,
    read_weights,
    write_authors,
    write_weights,
)
from tests.small_model import make_model, make_processor


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def authors_weights(folder):
    """All tensors of a folder in the authors' layout, those of the tower under their full names."""
    tower = {VISION_TOWER + name: tensor for name, tensor in read_weights(folder / "vision_tower").items()}
    return read_weights(folder) | tower


def test_their_files_come_back(authors, weights, converted, tmp_path):
    report = convert(str(converted), tmp_path / "back", verify=True)
    assert_same(authors_weights(tmp_path / "back"), weights)
    assert report.tensors_in == len(read_weights(converted)) and report.tensors_out == len(weights)
    assert report.split == 2 and set(report.files) == {path.name for path in (tmp_path / "back").iterdir()}
    names = [check.name for check in report.checks if check.passed]
    assert names == ["tensors that differ", "prompts with other ids", *["visual tokens"] * 3, "logits"]
    assert str(tmp_path / "back" / "vision_tower") in report.vision_source
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", authors))
    assert ours["mm_vision_tower"] == str(tmp_path / "back" / "vision_tower")
    changed = {"mm_vision_tower", "_name_or_path", "transformers_version", "use_cache"}
    trained = {
        "freeze_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
        "tune_mm_query_abstractor",
    }  # a trainer's, not a model's
    for key in theirs.keys() - changed - trained:
        assert ours[key] == theirs[key], key
    clip = json.loads((tmp_path / "back" / "vision_tower" / "config.json").read_text())
    for key, value in json.loads((authors.parent / "clip" / "config.json").read_text()).items():
        assert key in ("transformers_version",) or clip[key] == value, key
    processing = [
        json.loads((folder / "preprocessor_config.json").read_text())
        for folder in (tmp_path / "back" / "vision_tower", authors.parent / "clip")
    ]
    assert processing[0] == processing[1]
    _, loaded = CLIPVisionModel.from_pretrained(tmp_path / "back" / "vision_tower", output_loading_info=True)
    assert not loaded["missing_keys"]


@pytest.mark.parametrize("legacy", [None, True, False])
def test_tokenizer_comes_back(tokenizer_model, tmp_path, legacy):
    source = write_authors(tmp_path, tokenizer_model, legacy=legacy)
    convert(str(source), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "again" / name).read_text(), name
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    back, theirs = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (tmp_path / "back", source)
    )
    for key in (
        "add_bos_token",
        "add_eos_token",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "model_max_length",
    ):
        assert back[key] == theirs[key], key
    assert back["legacy"] == (legacy is not False) and back["tokenizer_class"] == "LlamaTokenizer"
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["legacy"] == (legacy is not False)
    if legacy is not None:  # today a missing key no longer means `True`
        text = "USER: a  cat. What?</s>USER: the dog"
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", source)]
        assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    hidden=st.sampled_from([16, 32, 48]),
    heads=st.sampled_from([2, 4]),
    grouped=st.booleans(),
    layers=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 20]),
    inside=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    legacy=st.sampled_from([None, True, False]),
    shards=st.integers(2, 4),
    shard_size=st.sampled_from(["3MB", "5GB"]),
)
def test_round_trip(
    tokenizer_model, hidden, heads, grouped, layers, padding, inside, dtype, legacy, shards, shard_size
):
    """Theirs -> ours -> theirs -> ours, tensor for tensor and setting for setting."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = write_authors(
            folder,
            tokenizer_model,
            hidden=hidden,
            heads=heads,
            kv_heads=heads // 2 if grouped else heads,
            layers=layers,
            vocab=PIECES + padding,
            clip_layers=1,
            include_vision_tower=inside,
            dtype=dtype,
            legacy=legacy,
            num_shards=shards,
        )
        convert(str(source), folder / "ours", max_shard_size=shard_size)
        convert(str(folder / "ours"), folder / "back", max_shard_size=shard_size)
        tower = {VISION_TOWER + name: tensor for name, tensor in read_weights(folder / "clip").items()}
        assert_same(authors_weights(folder / "back"), read_weights(source) | tower)
        convert(str(folder / "back"), folder / "again", max_shard_size=shard_size)
        assert_same(read_weights(folder / "again"), read_weights(folder / "ours"))
        for path in set((folder / "ours").glob("*.json")) - set((folder / "ours").glob("*.index.json")):
            ours, again = (
                json.loads((parent / path.name).read_text()) for parent in (folder / "ours", folder / "again")
            )
            if path.name == "config.json":
                for config in (ours, again):
                    del config["authors_config"]["mm_vision_tower"]
            assert again == ours, path.name


@given(width=st.sampled_from([4, 8, 12]), text=st.integers(1, 5), queries=st.integers(1, 3), data=st.data())
def test_names_round_trip(width, text, queries, data):
    """Packed and transposed tensors of any sizes, with more rows for the vocabulary or without."""
    new_rows = data.draw(st.integers(0, 2))
    query = "model.query_abstractor."
    shapes = {
        query + "query": (queries**2, width),
        query + "attn.in_proj_weight": (3 * width, width),
        query + "attn.in_proj_bias": (3 * width,),
        query + "attn.out_proj.bias": (width,),
        query + "proj": (width, text),
        query + "ln_k.weight": (width,),
        "model.embed_tokens.weight": (7, text),
        "lm_head.weight": (7, text),
        "model.layers.11.mlp.up_proj.weight": (3, text),
    }
    tensors = {name: torch.arange(math.prod(shape)).reshape(shape).float() for name, shape in shapes.items()}
    lazy = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }
    back = to_authors(from_authors(lazy, new_rows), 7)
    assert {name: tensor.shape for name, tensor in back.items()} == shapes
    assert_same({name: tensor.load() for name, tensor in back.items()}, tensors)


def test_trained_row_of_the_image_token(converted, tmp_path):
    """The authors have no such row; it is no reason to refuse."""
    ours = {name: tensor.clone() for name, tensor in read_weights(converted).items()}
    ours["lm_head.weight"][-1] += 1
    folder = tmp_path / "tuned"
    folder.mkdir()
    for path in converted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(ours, folder / "model.safetensors", metadata={"format": "pt"})
    report = convert(str(folder), tmp_path / "back", verify=True)
    assert report.checks[0].passed
    assert torch.equal(read_weights(tmp_path / "back")["lm_head.weight"], ours["lm_head.weight"][:-1])


def test_saved_again_by_transformers(converted, weights, tmp_path):
    """After training, `save_pretrained` writes the folder; its dtype may have changed, and the shards. The model has nothing
    behind the layer of the vision tower whose output is used: the way back writes a tower that ends there."""
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="10MB")
    AutoProcessor.from_pretrained(converted).save_pretrained(tmp_path / "tuned")
    convert(str(tmp_path / "tuned"), tmp_path / "back", verify=True)
    norm = "model.vision_tower.vision_tower.vision_model.post_layernorm."
    weights = {name: tensor for name, tensor in weights.items() if "vision_model.encoder.layers.1." not in name}
    weights |= {norm + "weight": torch.ones(1024, dtype=torch.bfloat16), norm + "bias": torch.zeros(1024).bfloat16()}
    assert_same(authors_weights(tmp_path / "back"), {name: tensor.float() for name, tensor in weights.items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["torch_dtype"], config["mm_vision_select_layer"]) == ("float32", -1)
    tower = json.loads((tmp_path / "back" / "vision_tower" / "config.json").read_text())
    assert tower["num_hidden_layers"] == 1
    convert(str(tmp_path / "tuned"), tmp_path / "half", dtype=torch.bfloat16, verify=True)
    assert_same(authors_weights(tmp_path / "half"), weights)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rope_comes_back(source, tmp_path, scaling):
    edit_json(source / "config.json", rope_theta=500000.0, rope_scaling=scaling)
    convert(str(source), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, scaling)


def test_tied_head_comes_back(source, weights, tmp_path):
    tied = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    write_weights(source, tied)
    edit_json(source / "config.json", tie_word_embeddings=True)
    convert(str(source), tmp_path / "ours", verify=True)
    convert(str(tmp_path / "ours"), tmp_path / "back", verify=True)
    assert_same(authors_weights(tmp_path / "back"), tied)


def changed(monkeypatch):
    """One tensor differs."""

    def to_wrong(tensors, rows):
        theirs = to_authors(tensors, rows)
        theirs["model.norm.weight"] = theirs["model.norm.weight"].map(lambda values: values + 1)
        return theirs

    monkeypatch.setattr("mqt_llava.conversion.to_authors.to_authors", to_wrong)


def swapped(monkeypatch):
    """Queries for keys, in both directions: only what is computed with them tells."""
    monkeypatch.setattr(names, "PACKED", ("k_proj", "q_proj", "v_proj"))


@pytest.mark.parametrize(("wrong", "words"), [(changed, "tensors that differ"), (swapped, "visual tokens")])
def test_wrong_way_back_leaves_nothing(converted, tmp_path, monkeypatch, wrong, words):
    wrong(monkeypatch)
    with pytest.raises(VerificationError, match=words):
        convert(str(converted), tmp_path / "back", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_their_code_does_not_have(tmp_path):
    make_model().save_pretrained(tmp_path / "small")
    make_processor().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="the vision tower's width is 32; the authors' code supports only 1024"):
        convert(str(tmp_path / "small"), tmp_path / "back")
    for option in ("vision_tower", "base_model"):
        with pytest.raises(ValueError, match=option.replace("_", "-")):
            convert(str(tmp_path / "small"), tmp_path / "back", **{option: "x"})
    assert not (tmp_path / "back").exists() and SMALL


def test_dry_run_and_damage(converted, tmp_path):
    dry = convert(str(converted), tmp_path / "back", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    real = convert(str(converted), tmp_path / "back")
    for name in vars(real).keys() - {"seconds"}:
        assert getattr(dry, name) == getattr(real, name), name
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in converted.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    for name in ("model.query_transformer.k_proj.weight", "model.norm.weight", "model.language_model.norm.weight"):
        changed = {key: value for key, value in weights.items() if key != name}
        if len(changed) == len(weights):
            changed[name] = torch.zeros(3)
        save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert(str(broken), tmp_path / "other")
    assert not (tmp_path / "other").exists()
