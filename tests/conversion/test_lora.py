"""LoRA folders of the authors' trainer: adapters of the language model, the query transformer beside them."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaForCausalLM
from typer.testing import CliRunner

from mqt_llava import cli
from mqt_llava.conversion import convert
from tests.conversion.checkpoints import QUERY_TRANSFORMER, edit_json, read_weights, write_weights


@pytest.fixture(scope="session")
def trained(tmp_path_factory, base, authors, weights):
    """A LoRA folder as the authors' trainer writes it, and the language model that PEFT itself makes of it."""
    folder = tmp_path_factory.mktemp("lora") / "folder"
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    names = list(read_weights(folder))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    query_transformer = {
        "base_model.model." + name: (tensor.float() * 1.25).bfloat16()
        for name, tensor in weights.items()
        if name.startswith(QUERY_TRANSFORMER)
    }
    torch.save(query_transformer, folder / "non_lora_trainables.bin")
    shutil.copyfile(authors / "config.json", folder / "config.json")
    shutil.copytree(authors.parent / "clip", folder.parent / "clip")  # `mm_vision_tower` is relative to the folder
    return folder, model.merge_and_unload()


@pytest.fixture
def lora(trained, tmp_path):
    return shutil.copytree(trained[0].parent, tmp_path / "lora") / "folder"


def assert_is_merged(folder, merged, dtype):
    ours = read_weights(folder)
    for name, tensor in merged.state_dict().items():
        name = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        found = ours[name][:-1] if "embed_tokens" in name or "lm_head" in name else ours[name]
        if dtype == torch.float32:
            torch.testing.assert_close(found, tensor)
        else:  # one rounding of the sum
            torch.testing.assert_close(found, tensor.to(dtype))


@pytest.mark.parametrize("kind", ["language model", "full checkpoint"])
@pytest.mark.parametrize("adapter_file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_merged(lora, trained, base, authors, weights, tmp_path, kind, adapter_file):
    if adapter_file.endswith(".bin"):
        torch.save(load_file(lora / "adapter_model.safetensors"), lora / adapter_file)
        (lora / "adapter_model.safetensors").unlink()
    chosen = base if kind == "language model" else authors
    verify = not adapter_file.endswith(".bin")
    report = convert(str(lora), tmp_path / "out", base_model=str(chosen), verify=verify)
    assert [check.difference is not None for check in report.checks] == [True] * 6 * verify
    assert report.layout == "LoRA folder, merged"
    assert_is_merged(tmp_path / "out", trained[1], torch.bfloat16)
    ours = read_weights(tmp_path / "out")
    for name in ("query", "position_embedding"):
        official = QUERY_TRANSFORMER + {"query": "query", "position_embedding": "pos_embed"}[name]
        expected = (weights[official].float() * 1.25).bfloat16()
        assert torch.equal(ours[f"model.query_transformer.{name}"], expected)


def test_base_comes_from_the_adapter(lora, trained, tmp_path):
    """`base_model_name_or_path`; a float32 result is PEFT's own."""
    convert(str(lora), tmp_path / "out", dtype=torch.float32)
    edit_json(lora / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="--base-model"):
        convert(str(lora), tmp_path / "other")


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(lora, base, tmp_path, rslora):
    edit_json(lora / "adapter_config.json", use_rslora=rslora)
    convert(str(lora), tmp_path / "out", base_model=str(base))
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    assert_is_merged(tmp_path / "out", peft.merge_and_unload(), torch.bfloat16)


def question(model):
    torch.manual_seed(1)
    image_token = model.config.image_token_id
    ids = torch.tensor([[1, 20, *[image_token] * 16, 33, 44, 55]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}


def test_kept_adapter_gives_the_logits_of_the_merged_model(lora, authors, converted, tmp_path):
    report = convert(str(lora), tmp_path / "kept", base_model=str(converted), keep_adapter=True, verify=True)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == set(report.files)
    assert [check.name for check in report.checks] == ["visual tokens"] * 3 + ["logits"]
    base_model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32)
    before = base_model(**question(base_model)).logits
    kept = PeftModel.from_pretrained(base_model, tmp_path / "kept").eval()
    assert list(kept.peft_config["default"].modules_to_save) == ["query_transformer"]

    # merged in float32, from the same bfloat16 weights
    full = shutil.copytree(authors.parent, tmp_path / "base") / "ckpt"
    write_weights(full, {name: tensor.float() for name, tensor in read_weights(full).items()})
    convert(str(lora), tmp_path / "merged", base_model=str(full))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = merged(**question(merged)).logits, kept(**question(merged)).logits
    # but for the row of `<image>`, the mean of the others in either dtype
    torch.testing.assert_close(found[..., :-1], expected[..., :-1], atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 0.1

    loaded = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32),
        tmp_path / "kept",
        is_trainable=True,
    )
    names = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert any("query_transformer.modules_to_save" in name for name in names)
    assert all("lora_" in name or "query_transformer" in name for name in names)


def test_kept_adapter_needs_our_base(lora, authors, base, converted, tmp_path):
    for wrong in (None, str(authors), str(base)):
        with pytest.raises(ValueError, match="the converted MQT-LLaVA checkpoint"):
            convert(str(lora), tmp_path / "out", base_model=wrong, keep_adapter=True)
    with pytest.raises(ValueError, match="--keep-adapter is for LoRA folders"):
        convert(str(authors), tmp_path / "out", keep_adapter=True)
    with pytest.raises(ValueError, match="--vision-tower"):
        convert(str(lora), tmp_path / "out", base_model=str(converted), vision_tower="x", keep_adapter=True)
    dry = convert(str(lora), tmp_path / "out", base_model=str(converted), keep_adapter=True, dry_run=True)
    assert dry.files == ["adapter_config.json", "adapter_model.safetensors"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "LoRA"),
        ({"r": None}, "`r`"),
    ],
)
@pytest.mark.parametrize("keep_adapter", [False, True])
def test_adapters_of_other_kinds(lora, base, converted, tmp_path, changes, words, keep_adapter):
    edit_json(lora / "adapter_config.json", **changes)
    chosen = str(converted if keep_adapter else base)
    with pytest.raises(ValueError, match=words):
        convert(str(lora), tmp_path / "out", base_model=chosen, keep_adapter=keep_adapter)
    assert not (tmp_path / "out").exists()


def test_adapter_that_does_not_fit(lora, base, tmp_path):
    path = lora / "adapter_model.safetensors"
    stored = load_file(path)
    a, b = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
    cases = {
        "only one of lora_A and lora_B": {name: tensor for name, tensor in stored.items() if name != b},
        r"do not fit.*q_proj": stored | {a: torch.zeros(4, 31)},
        "layers.9": stored | {a.replace(".0.", ".9."): stored[a] + 0, b.replace(".0.", ".9."): stored[b] + 0},
        "lora_embedding_A": stored | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)},
    }
    for words, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=words):
            convert(str(lora), tmp_path / "out", base_model=str(base))
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        convert(str(lora), tmp_path / "out", base_model=str(base))
    assert not (tmp_path / "out").exists()
    assert json.loads((lora / "adapter_config.json").read_text())["r"] == 4


def test_kept_adapter_has_a_card(lora, converted, tmp_path):
    command = ["convert", lora, tmp_path / "kept", "--keep-adapter", "--base-model", converted, "--license", "llama2"]
    command = list(map(str, command))
    refused = CliRunner().invoke(cli.app, [*command, "--push-to-hub", "someone/adapter"])
    assert refused.exit_code == 2 and "needs a base model on the Hub" in refused.stderr
    assert not (tmp_path / "kept").exists()

    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0 and "README.md" in done.stdout
    card = ModelCard.load(tmp_path / "kept" / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "llama2"
    assert card.data.base_model == str(converted) and card.data.pipeline_tag == "image-text-to-text"
    assert "on language_model, all weights of query_transformer" in card.text and "folder" in card.text
