"""The verifier passes what is right, and nothing else."""

import json
import shutil

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, integers, sampled_from
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from mqt_llava import cli
from mqt_llava.conversion import VerificationError, convert, files, layouts, names
from mqt_llava.conversion.files import read_tensors
from mqt_llava.conversion.verify import Check, load_model, verify_tensors
from tests.conversion.checkpoints import edit_json, write_authors, write_weights


CHECKS = ["tensors that differ", "prompts with other ids", *["visual tokens"] * 3, "logits"]


@pytest.mark.parametrize("legacy", [None, True, False])
def test_good_conversion(tokenizer_model, tmp_path, legacy):
    source = write_authors(tmp_path, tokenizer_model, legacy=legacy)
    report = convert(str(source), tmp_path / "out", verify=True)
    assert [check.name for check in report.checks] == CHECKS
    assert all(check.passed for check in report.checks)
    assert [check.difference for check in report.checks[:2]] == [0, 0]
    assert all(0 < check.difference < 1e-5 for check in report.checks[2:])


def failing(source, folder):
    return {check.name for check in layouts.plan_full(source).verify(folder, None) if not check.passed}


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("model.query_transformer.position_embedding", {"visual tokens", "logits"}),
        ("model.query_transformer.out_proj.bias", {"visual tokens", "logits"}),
        ("model.vision_tower.encoder.layers.0.layer_norm2.weight", {"visual tokens", "logits"}),
        ("model.language_model.layers.1.mlp.down_proj.weight", {"logits"}),
        ("lm_head.weight", {"logits"}),
        # the tower's last layer and norm are not used: only the tensors themselves tell
        ("model.vision_tower.post_layernorm.weight", set()),
    ],
)
def test_tampered_tensor(authors, converted, tmp_path, name, failed):
    weights = load_file(converted / "model.safetensors")
    for path in converted.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model.safetensors").unlink()
    weights[name] = weights[name] * 1.1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert failing(authors, tmp_path) == failed | {"tensors that differ"}


@given(data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_value_in_any_tensor(authors, converted, tmp_path, choice):
    """Whatever the value becomes, and wherever it is."""
    changed = tmp_path / "model.safetensors"
    if not changed.exists():
        shutil.copy(converted / changed.name, changed)
    tensors = read_tensors(tmp_path)
    name = choice.draw(sampled_from(sorted(tensors)), label="name")
    with open(changed, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        position = 8 + length + choice.draw(integers(begin, end - 1), label="byte")
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << choice.draw(integers(0, 7), label="bit")]))
        file.flush()
        assert verify_tensors(layouts.plan_full(authors).tensors, read_tensors(tmp_path)).difference == 1
        file.seek(position)
        file.write(bytes([byte]))


def test_one_layer_in_memory_at_a_time(converted):
    """What `--verify` needs does not grow with the number of layers."""
    model = load_model(converted)
    streamed = [*model.model.language_model.modules(), model.lm_head]
    streamed = [module for module in streamed if next(module.parameters(recurse=False), None) is not None]
    present = []

    class Present(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            loaded = [other for other in streamed if not next(other.parameters(recurse=False)).is_meta]
            present.append(loaded == [module])
            return args, kwargs

    for module in streamed:
        add_hook_to_module(module, Present(), append=True)
    logits = model(input_ids=torch.arange(9)[None]).logits
    assert present == [True] * (2 * 9 + 3)  # of two layers, and embeddings, norm and head
    whole = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    assert torch.equal(logits, whole(input_ids=torch.arange(9)[None]).logits)


def test_tokenizer_with_other_ids(authors, tmp_path):
    convert(str(authors), tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[":"], vocab["?"] = vocab["?"], vocab[":"]
    path.write_text(json.dumps(tokenizer))
    assert failing(authors, tmp_path / "out") == {"prompts with other ids"}


def swapped(monkeypatch):
    """A converter that takes queries for keys."""
    monkeypatch.setattr(names, "PACKED", ("k_proj", "q_proj", "v_proj"))


def transposed(monkeypatch):
    monkeypatch.setattr(torch, "t", lambda proj: proj.reshape(proj.shape[::-1]))


def renamed(monkeypatch):
    """Norms of queries and keys change places."""
    prefixes = {"model.query_abstractor.ln_q.": "key", "model.query_abstractor.ln_k.": "query"}
    for official, kind in prefixes.items():
        monkeypatch.setitem(names.PREFIXES, official, f"model.query_transformer.{kind}_norm.")


def tampered(monkeypatch):
    """A disk that does not keep what was written to it."""

    def write_shards(folder, tensors, *args, write=files.write_shards):
        write(folder, tensors, *args)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][5, 5] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(files, "write_shards", write_shards)


@pytest.mark.parametrize("wrong", [swapped, transposed, renamed, tampered])
def test_wrong_conversion_leaves_nothing(authors, tmp_path, monkeypatch, wrong):
    wrong(monkeypatch)
    with pytest.raises(
        VerificationError, match="tensors that differ" if wrong is tampered else "visual tokens"
    ) as error:
        convert(str(authors), tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []
    assert any(not check.passed for check in error.value.checks)
    assert [check.name for check in error.value.checks] == CHECKS


def test_overflow_of_a_smaller_dtype(source, tmp_path, weights):
    name = "model.layers.0.mlp.up_proj.weight"
    write_weights(source, {key: tensor.float() * (1e8 if key == name else 1) for key, tensor in weights.items()})
    with pytest.raises(VerificationError, match="logits"):
        convert(str(source), tmp_path / "out", dtype=torch.float16, verify=True)
    assert not (tmp_path / "out").exists()


def test_positions_that_are_scaled_by_a_factor(source, tmp_path):
    edit_json(source / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    report = convert(str(source), tmp_path / "out", verify=True)
    assert [check.name for check in report.checks] == CHECKS and all(check.passed for check in report.checks)


def test_what_cannot_be_compared_is_refused(source, tmp_path):
    """A comparison that is not made is none that passed."""
    for file, words, changes in (
        ("ckpt/config.json", "dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("clip/config.json", "clip_vision_model with relu", {"hidden_act": "relu"}),
    ):
        edit_json(source.parent / file, **changes)
        with pytest.raises(ValueError, match=f"--verify does not support .*{words}"):
            convert(str(source), tmp_path / "out", verify=True)
        edit_json(source / "config.json", rope_scaling=None)
    convert(str(source), tmp_path / "out")


@pytest.mark.parametrize("shape", [None, "lm_head"])
def test_broken_values_are_warned_of_without_verify(source, tmp_path, weights, shape):
    """As far as a look at three rows of each tensor shows them."""
    name = "model.norm.weight" if shape is None else "lm_head.weight"
    write_weights(source, weights | {name: torch.full_like(weights[name], float("nan"))})
    result = CliRunner().invoke(cli.app, ["convert", str(source), str(tmp_path / "out")])
    ours = "model.language_model.norm.weight" if shape is None else name
    assert result.exit_code == 0 and f"Warning: NaN or infinity in {ours}, as in the source" in result.stderr
    assert (tmp_path / "out").exists()


def test_nan_is_never_near_enough():
    assert not Check("logits", "", float("nan"), 1.0).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_source_with_broken_values(source, tmp_path, weights, value):
    """They are named as the source names them."""
    name = "model.query_abstractor.attn.in_proj_bias"
    broken = weights[name].clone()
    broken[7] = value
    write_weights(source, weights | {name: broken})
    with pytest.raises(VerificationError, match=f"source itself is broken: it has NaN or infinity in {name}$"):
        convert(str(source), tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
