"""Stage-1 weights, the query transformer alone, with a language model and a vision tower."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from mqt_llava.conversion import convert
from tests.conversion.checkpoints import PIECES, QUERY_TRANSFORMER, edit_json, read_weights


@pytest.fixture
def stage1(authors, weights, tmp_path):
    """The folder that stage 1 leaves: weights and, beside them, the config."""
    folder = tmp_path / "stage1"
    folder.mkdir()
    shutil.copyfile(authors / "config.json", folder / "config.json")
    edit_json(folder / "config.json", mm_vision_tower=str(authors.parent / "clip"))
    trained = {name: tensor for name, tensor in weights.items() if name.startswith(QUERY_TRANSFORMER)}
    torch.save(trained, folder / "query_abstractor.bin")
    return folder


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model."])
@pytest.mark.parametrize("filename", ["query_abstractor.bin", "mm_query_abstractor.bin"])
def test_same_as_the_full_checkpoint(stage1, base, converted, tmp_path, filename, wrapper):
    weights = torch.load(stage1 / "query_abstractor.bin")
    (stage1 / "query_abstractor.bin").unlink()
    torch.save({wrapper + name: tensor for name, tensor in weights.items()}, stage1 / filename)
    report = convert(str(stage1), tmp_path / "out", base_model=str(base), verify=not wrapper)
    ours, expected = read_weights(tmp_path / "out"), read_weights(converted)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert report.layout == "stage-1 weights" and report.base_models[0] == str(base)
    assert wrapper or [check.difference is not None for check in report.checks] == [True] * 6


def test_file_alone(stage1, base, converted, authors, tmp_path):
    """Without a config beside it: the tower comes by flag, the rest is as the paper has it."""
    file = tmp_path / "anything.bin"
    weights = torch.load(stage1 / "query_abstractor.bin")
    torch.save({name.removeprefix("model."): tensor for name, tensor in weights.items()}, file)
    tower = str(authors.parent / "clip")
    with pytest.raises(ValueError, match="--vision-tower"):
        convert(str(file), tmp_path / "out", base_model=str(base))
    with pytest.raises(ValueError, match="--base-model"):
        convert(str(file), tmp_path / "out", vision_tower=tower)
    convert(str(file), tmp_path / "out", base_model=str(base), vision_tower=tower, verify=True)
    ours, expected = read_weights(tmp_path / "out"), read_weights(converted)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_base_as_transformers_saves_it_today(stage1, base, tmp_path):
    """Tied embeddings, and rope settings under their new name."""
    config = LlamaConfig(
        vocab_size=PIECES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    report = convert(str(stage1), tmp_path / "out", base_model=str(folder), dtype=torch.float32, verify=True)
    assert [check.difference is not None for check in report.checks] == [True] * 6
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    ids = torch.tensor([[1, 7, 20, 33]])
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids).logits[..., :-1], expected)


def test_base_that_does_not_fit(stage1, base, authors, converted, tmp_path):
    for wrong, words in ((authors, "llava_llama"), (converted, "mqt_llava"), (authors.parent / "clip", "clip")):
        with pytest.raises(ValueError, match=words):
            convert(str(stage1), tmp_path / "out", base_model=str(wrong))
    weights = torch.load(stage1 / "query_abstractor.bin")
    torch.save(weights | {"model.mm_projector.weight": torch.zeros(3)}, stage1 / "query_abstractor.bin")
    with pytest.raises(ValueError, match="mm_projector"):
        convert(str(stage1), tmp_path / "out", base_model=str(base))
    weights[QUERY_TRANSFORMER + "proj"] = torch.zeros(1024, 64)
    torch.save(weights, stage1 / "query_abstractor.bin")
    with pytest.raises(ValueError, match="text_proj"):
        convert(str(stage1), tmp_path / "out", base_model=str(base))
    assert not (tmp_path / "out").exists()
