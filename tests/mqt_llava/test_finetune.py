"""LoRA: which layers train, adapters saved, loaded, merged, switched and pushed; `mqt-llava finetune` and the example."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, LlamaConfig, TrainingArguments
from typer.testing import CliRunner

from mqt_llava import MQTLlavaForConditionalGeneration
from mqt_llava.cli import app, main
from mqt_llava.cli.conversation import Conversation
from mqt_llava.cli.images import load_image
from mqt_llava.training.adapters import load_adapter, save_adapter
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import load_conversations
from mqt_llava.training.lora import load_quantized, make_lora_config, with_exact_weights
from mqt_llava.training.output import prepare_output_dir, remove_checkpoints
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer
from tests.conversion.test_safety import small_disk
from tests.modeling.test_remote_code import LocalHub, fresh_process
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


M = NUM_QUERY_TOKENS
ROOT = Path(__file__).parents[2]
NUM_VISUAL_TOKENS = [1, 5, M]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six conversations with a picture each, as LLaVA's JSON."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i, image in enumerate(make_images(6)):
        image.save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": f"{i}."}]
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def tune(base, data, folder, targets=("language_model",), seed=0, trainer_class=MQTLlavaTrainer, **options):
    """Four steps of LoRA at a learning rate that shows."""
    torch.manual_seed(seed)
    model = get_peft_model(base, make_lora_config(base, targets, r=4, lora_dropout=0, **options))
    trainer = trainer_class(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            remove_unused_columns=False,
        ),
        data_collator=MQTLlavaDataCollator(make_processor(), VisualTokenSampler("uniform", M)),
        train_dataset=load_conversations(data),
    )
    trainer.train()
    save_adapter(model, folder)
    return model.eval()


def load_base(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(checkpoint, data, tmp_path_factory):
    """Two adapters of the checkpoint."""
    folder = tmp_path_factory.mktemp("adapters")
    tune(load_base(checkpoint), data, folder / "one")
    tune(load_base(checkpoint), data, folder / "two", ["language_model", "query_transformer"], seed=1)
    return folder


def make_inputs(**settings):
    return make_processor()(images=make_images(2), text=["<image>What?"] * 2, return_tensors="pt", **settings)


def answers(model):
    settings = {"do_sample": False, "max_new_tokens": 6}
    return [model.generate(**make_inputs(), num_visual_tokens=m, **settings).tolist() for m in NUM_VISUAL_TOKENS]


@torch.no_grad()
def all_logits(model):
    return [model(**make_inputs(), num_visual_tokens=m).logits for m in NUM_VISUAL_TOKENS]


VARIANTS = {
    "language_model": {},
    "query_transformer_full": {"targets": "query_transformer_full"},
    "all": {"targets": ["language_model", "query_transformer", "vision_tower"]},
    "all, full": {"targets": ["language_model", "query_transformer_full", "vision_tower"]},
    "new words": {"trainable_token_indices": [20, 21, 22]},
    "rslora": {"use_rslora": True},
    "dora": {"targets": ["language_model", "query_transformer"], "use_dora": True},
}


@pytest.mark.every_version
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_adapters_of_every_kind(options, checkpoint, data, tmp_path):
    """Trained, saved, loaded and merged: the same logits at every m, and others than the base model's."""
    tuned = tune(load_base(checkpoint), data, tmp_path, **options)
    expected, base = all_logits(tuned), all_logits(load_base(checkpoint))
    assert all((new - old).abs().max() > 0.01 for new, old in zip(expected, base))
    loaded = load_adapter(load_base(checkpoint), tmp_path)
    merged = load_adapter(load_base(checkpoint), tmp_path).merge_and_unload()
    assert type(merged) is MQTLlavaForConditionalGeneration
    for model in (loaded, merged):
        for logits, wanted in zip(all_logits(model), expected):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert answers(loaded) == answers(merged) == answers(tuned)
    # nothing that trains is without a gradient: DistributedDataParallel would wait for it
    tuned.train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    tuned(**make_inputs(), labels=make_inputs()["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_parts_are_named_and_others_refused(model, capsys):
    parts = {
        "language_model": "model.language_model.",
        "query_transformer": "model.query_transformer.",
        "vision_tower": "model.vision_tower.",
    }
    for target, part in parts.items():
        tuned = get_peft_model(make_model(), make_lora_config(make_model(), target))
        assert tuned.targeted_module_names and all(name.startswith(part) for name in tuned.targeted_module_names)
        tuned.print_trainable_parameters()
        assert "trainable params: " in capsys.readouterr().out
    for bad in ("language", ["language_model", "lm_head"], [], ["query_transformer", "query_transformer_full"]):
        with pytest.raises(ValueError, match="query_transformer"):
            make_lora_config(model, bad)


def test_adapters_are_switched(checkpoint, adapters):
    expected = {
        name: answers(PeftModel.from_pretrained(load_base(checkpoint), adapters / name)) for name in ("one", "two")
    }
    assert expected["one"] != expected["two"]
    model = load_adapter(load_base(checkpoint), adapters / "one", "one")
    model = load_adapter(model, adapters / "two", "two")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        assert answers(model) == expected[name]
    with model.disable_adapter():
        assert answers(model) == answers(load_base(checkpoint))


LOAD_ADAPTER = """
from peft import PeftModel

processor = AutoProcessor.from_pretrained(task["base"], trust_remote_code=True)
base = AutoModelForImageTextToText.from_pretrained(task["base"], trust_remote_code=True, dtype=torch.float32)
assert type(base).__module__.startswith("transformers_modules.")
inputs = processor(images=images, text=["<image>What?"] * 2, return_tensors="pt")
settings = {"do_sample": False, "max_new_tokens": 6}
model = PeftModel.from_pretrained(base, task["adapters"] + "/one", "one")
model.load_adapter(task["adapters"] + "/two", "two")
for name in ("one", "two"):
    model.set_adapter(name)
    answers = (model.generate(**inputs, num_visual_tokens=m, **settings) for m in task["num_visual_tokens"])
    result[name] = [answer.tolist() for answer in answers]
model.merge_and_unload().save_pretrained(task["merged"])
"""


def test_adapters_that_would_mix_are_refused(checkpoint, data, adapters, tmp_path):
    tune(load_base(checkpoint), data, tmp_path / "full", "query_transformer_full")
    model = load_adapter(load_base(checkpoint), adapters / "one")
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_adapter(model, adapters / "two")
    model = load_adapter(load_base(checkpoint), tmp_path / "full")
    with pytest.raises(ValueError, match="another adapter of this model has replaced"):
        load_adapter(model, adapters / "two", "two")


def test_other_methods_of_peft(checkpoint, tmp_path):
    for method in (
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=["v_proj"], init_weights=False),
        LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    ):
        tuned = get_peft_model(load_base(checkpoint), method)
        folder = tmp_path / type(method).__name__
        save_adapter(tuned.eval(), folder)
        for logits, wanted in zip(all_logits(load_adapter(load_base(checkpoint), folder)), all_logits(tuned)):
            torch.testing.assert_close(logits, wanted)
        assert method.peft_type.value in (folder / "README.md").read_text()


def test_the_active_adapter_is_saved_whatever_its_name(checkpoint, adapters, tmp_path):
    model = load_adapter(load_adapter(load_base(checkpoint), adapters / "one"), adapters / "two", "cats")
    expected = all_logits(model)
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "query_transformer" in (tmp_path / "README.md").read_text()
    for logits, wanted in zip(all_logits(load_adapter(load_base(checkpoint), tmp_path)), expected):
        torch.testing.assert_close(logits, wanted)


def test_what_trains_is_in_float32(checkpoint):
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    targets = ["language_model", "query_transformer_full"]
    model = with_exact_weights(get_peft_model(base, make_lora_config(base, targets)))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_where_the_package_is_not_installed(checkpoint, adapters, tmp_path):
    """Adapters go onto a base that came through `trust_remote_code`; the merged model is one of ours."""
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(images, make_images(2)):
        image.save(path)
    task = {
        "base": str(checkpoint),
        "images": images,
        "num_visual_tokens": NUM_VISUAL_TOKENS,
        "merged": str(tmp_path / "merged"),
    }
    result = fresh_process(LOAD_ADAPTER, task | {"adapters": str(adapters)}, tmp_path)
    for name in ("one", "two"):
        assert result[name] == answers(load_adapter(load_base(checkpoint), adapters / name))
    assert answers(load_base(tmp_path / "merged")) == result["two"]


def test_adapters_of_another_base_are_refused(checkpoint, adapters, tmp_path):
    config = make_model().config
    wide, short = (config.text_config.__class__(**config.text_config.to_dict()) for _ in range(2))
    wide.hidden_size, wide.num_attention_heads, short.num_hidden_layers = 64, 8, 1
    for name, text_config in (("wide", wide), ("short", short)):
        make_model(text_config=text_config).save_pretrained(tmp_path / name)
        for adapter in ("one", "two"):
            with pytest.raises(ValueError, match="does not fit") as error:
                load_adapter(load_base(tmp_path / name), adapters / adapter)
            assert str(checkpoint) in str(error.value) and str(tmp_path / name) in str(error.value)


def test_adapters_are_pushed_with_a_card(checkpoint, adapters, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="needs a base model on the Hub"):
        save_adapter(load_adapter(load_base(checkpoint), adapters / "two"), tmp_path / "saved", "someone/adapter")
    assert not hub.commits and not (tmp_path / "saved").exists()

    base = load_base(checkpoint)
    base.name_or_path = base.config._name_or_path = "someone/base"  # as if loaded from there
    model = get_peft_model(base, make_lora_config(base, ["language_model", "query_transformer"])).eval()
    (tmp_path / "saved" / "checkpoint-5").mkdir(parents=True)
    save_adapter(model, tmp_path / "saved", "someone/adapter")
    model.push_to_hub("someone/by-peft")
    assert hub.commits == [{"README.md", "adapter_config.json", "adapter_model.safetensors"}] * 2
    for repo_id in ("someone/adapter", "someone/by-peft"):
        assert answers(PeftModel.from_pretrained(load_base(checkpoint), tmp_path / repo_id)) == answers(model)
    card = ModelCard.load(tmp_path / "someone/adapter/README.md")
    assert card.data.base_model == "someone/base" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-text-to-text" and "language_model and query_transformer" in card.text


def test_output_folders_are_not_mixed(tmp_path):
    folder = tmp_path / "run"
    assert prepare_output_dir(folder) is None
    for number in (5, 10, 20):
        (folder / f"checkpoint-{number}").mkdir(parents=True)
        if number < 20:  # the last one was killed while it was written
            (folder / f"checkpoint-{number}" / "trainer_state.json").touch()
    (folder / "adapter_config.json").touch()
    (folder / "checkpoint-notes.txt").touch()
    (folder / "checkpoints-best").mkdir()
    with pytest.raises(ValueError, match=r"not empty, it holds adapter_config\.json, checkpoint-10"):
        prepare_output_dir(folder)
    assert prepare_output_dir(folder, resume=True) == str(folder / "checkpoint-10")
    assert prepare_output_dir(folder, overwrite=True) is None
    assert (folder / "checkpoint-5").exists()  # until all is ready
    remove_checkpoints(folder)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "checkpoint-notes.txt",
        "checkpoints-best",
    }
    with pytest.raises(ValueError, match="no checkpoint"):
        prepare_output_dir(folder, resume=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        prepare_output_dir(tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="mutually exclusive"):
        prepare_output_dir(folder, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        prepare_output_dir(folder / "adapter_config.json")


def test_a_loss_that_is_not_finite_stops_with_the_samples(checkpoint, data, tmp_path):
    base = load_base(checkpoint)
    with torch.no_grad():
        base.get_input_embeddings().weight[make_processor().tokenizer.convert_tokens_to_ids("3")] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan in step \d.*rows\.json\[3\] \(id 3\)"):
        tune(base, data, tmp_path)


# The command line ---------------------------------------------------------------------------------------------------------


def finetune(*arguments, monkeypatch, data=None):
    monkeypatch.setattr(
        sys, "argv", ["mqt-llava", "finetune", *map(str, [data] if data else []), *map(str, arguments)]
    )
    with pytest.raises(SystemExit) as status:
        main()
    return status.value.code


def test_command_tunes_resumes_and_overwrites(checkpoint, data, tmp_path, monkeypatch, capfd):
    adapter = tmp_path / "adapter"
    options = ["--model", checkpoint, "--output-dir", adapter, "--batch-size", 2, "--use-cpu", "--save-steps", 1]
    run = {"monkeypatch": monkeypatch, "data": data}
    evaluation = ["--eval-data", data, "--eval-num-visual-tokens", "1,16", "--num-visual-tokens", "1,16"]
    evaluation += ["--logging-steps", 1, "--distill-weight", 0.5]
    assert not finetune(*options, *evaluation, "--epochs", 1, **run)
    output = capfd.readouterr().out
    assert "trainable params: " in output and "eval_m1_loss" in output and "eval_m16_loss" in output
    assert "num_visual_tokens" in output and "divergence" in output and "adapter is in" in output
    assert answers(load_adapter(load_base(checkpoint), adapter))
    assert finetune(*options, **run) == 2
    assert "continue that run (--resume), replace it (--overwrite), or" in capfd.readouterr().err
    for other, message in ((["-r", 4], "--rank = 16"), (["--targets", "vision_tower"], "--targets = ")):
        assert finetune(*options, *other, "--epochs", 2, "--resume", **run) == 2
        assert message in capfd.readouterr().err
    assert not finetune(*options, "--epochs", 2, "--resume", **run)
    assert (adapter / "checkpoint-6").exists()
    assert not finetune(*options, "--max-steps", 1, "--overwrite", **run)
    assert {path.name for path in adapter.glob("checkpoint-*")} == {"checkpoint-1"}


def test_ask_with_an_adapter(checkpoint, adapters, data, tmp_path):
    picture = str(data.parent / "0.png")

    def ask(*options):
        return CliRunner().invoke(
            app, ["ask", picture, "What?", "--json", "--max-new-tokens", "6", *map(str, options)]
        )

    without = json.loads(ask("--model", checkpoint).stdout)
    for adapter in (adapters / "one", adapters / "two"):  # the adapter says what its base is
        result = ask("--adapter", adapter, "--num-visual-tokens", 5)
        assert result.exit_code == 0, result.output
        tuned = json.loads(result.stdout)
        assert tuned["adapter"] == str(adapter) and tuned["model"] == str(checkpoint)
        model = load_adapter(load_base(checkpoint), adapter).merge_and_unload()
        conversation = Conversation(make_processor(), model, [load_image(picture)], 5, 6)
        assert conversation.ask("What?")["answer"] == tuned["answer"] != without["answer"]
    text_config = make_model().config.text_config
    text_config.num_hidden_layers = 1
    make_model(text_config=text_config).save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    for options, message in (
        (["--adapter", adapters / "one", "--model", tmp_path / "other"], "does not fit"),
        (["--adapter", "nowhere"], "cannot load the adapter nowhere"),
    ):
        result = ask(*options)
        assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


MISTAKES = {
    "no data": (["nowhere.json"], "no data file nowhere.json"),
    "image folder": (["--image-folder", "nowhere"], "no image folder nowhere"),
    "target": (["--targets", "lm_head"], "LoRA targets must be among language_model"),
    "distribution": (["--num-visual-tokens", "evn"], "--num-visual-tokens must be one of even"),
    "num_visual_tokens": (["--num-visual-tokens", "1,17"], "from 1 to 16"),
    "eval_num_visual_tokens": (["--eval-num-visual-tokens", "0", "--eval-data", "DATA"], "from 1 to 16"),
    "eval distribution": (
        ["--eval-num-visual-tokens", "evn", "--eval-data", "DATA"],
        "--eval-num-visual-tokens must be",
    ),
    "eval_num_visual_tokens alone": (["--eval-num-visual-tokens", "1"], "needs --eval-data"),
    "resume and overwrite": (["--resume", "--overwrite"], "--resume and --overwrite are mutually exclusive"),
    "too long": (
        ["--max-length", "3"],
        "and --max-length is 3: raise --max-length, lower --num-visual-tokens or shorten the",
    ),
    "too long to cut": (["--max-length", "3", "--truncate"], "which leaves no room for an answer"),
    "too long, in a worker": (["--max-length", "3", "--num-workers", "1"], "Sample rows.json["),
    "no epochs": (["--epochs", "0"], "--num-train-epochs must be above 0; got 0"),
    "dropout": (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
    "unknown option": (["--image-foldr", "x"], "no argument --image-foldr; the closest one is --image-folder"),
    "no steps": (["--max-steps", "0"], "--max-steps must be above 0; got 0"),
    "name on the Hub": (["--push-to-hub", "a b/c"], "a b/c"),
    "model": (["--model", "nowhere"], "cannot load the model nowhere"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(arguments, message, checkpoint, data, tmp_path, monkeypatch, capfd):
    arguments = [data if argument == "DATA" else argument for argument in arguments]
    options = ["--model", checkpoint, "--output-dir", tmp_path / "adapter", "--use-cpu"]
    given = None if arguments[0] == "nowhere.json" else data
    assert finetune(*options, *arguments, monkeypatch=monkeypatch, data=given) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: "))
    assert message in line


def test_missing_libraries_are_named(checkpoint, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = ["--model", checkpoint, "--output-dir", tmp_path / "adapter", "--use-cpu"]
    monkeypatch.delitem(sys.modules, "mqt_llava.training.lora")
    assert finetune(*options, monkeypatch=monkeypatch, data=data) == 2
    assert "peft is missing: pip install 'mqt-llava[train]'" in capfd.readouterr().err


def test_no_warnings_of_libraries_about_each_other(checkpoint, data, tmp_path, monkeypatch, capfd):
    options = ["--model", checkpoint, "--output-dir", tmp_path / "adapter", "--use-cpu", "--max-steps", 1]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert not finetune(*options, "--gradient-checkpointing", monkeypatch=monkeypatch, data=data)
    assert "FutureWarning" not in capfd.readouterr().err


@pytest.mark.parametrize("saved", [False, True])
def test_interrupted_run_says_how_to_go_on(checkpoint, data, tmp_path, monkeypatch, capfd, saved):
    train = MQTLlavaTrainer.train

    def interrupted(self, **kwargs):
        if saved:
            train(self, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(MQTLlavaTrainer, "train", interrupted)
    options = ["--model", checkpoint, "--output-dir", tmp_path / "adapter", "--use-cpu", "--max-steps", 1]
    assert finetune(*options, monkeypatch=monkeypatch, data=data) == 130
    error = capfd.readouterr().err
    assert ("with --resume continues" in error) == saved and "Interrupted" in error and "Traceback" not in error


@pytest.mark.parametrize("saving", ["the adapter", "a checkpoint"])
def test_full_disk(checkpoint, data, tmp_path, monkeypatch, capfd, saving):
    """safetensors and torch have errors of their own for it."""
    with small_disk(tmp_path / "disk", "100k") as disk:
        options = ["--model", checkpoint, "--output-dir", disk / "adapter", "--use-cpu", "--max-steps", 2, "-r", 64]
        options += ["--save-steps", 1 if saving == "a checkpoint" else 100]
        assert finetune(*options, monkeypatch=monkeypatch, data=data) in (1, 2)
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("Error: "))
    assert re.search("[Nn]o space left", line) and "Traceback" not in error


@pytest.mark.slow
def test_the_example_runs(data, tmp_path):
    command = [
        sys.executable,
        ROOT / "examples/finetune_lora.py",
        "--data",
        data,
        "--output_dir",
        tmp_path / "adapter",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--max_steps", "2"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable params: 417,792" in done.stdout and (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_qlora(data, tmp_path):
    """4-bit layers of the language model alone; the adapter goes back onto a base in 4 bits and in float32."""
    pytest.importorskip("bitsandbytes")
    # bitsandbytes cannot multiply by layers narrower than its blocks of 64 on a CPU
    text_config = LlamaConfig(**make_model().config.text_config.to_dict() | {"hidden_size": 64, "head_dim": 16})
    checkpoint = tmp_path / "base"
    make_model(text_config=text_config).save_pretrained(checkpoint)
    base = prepare_model_for_kbit_training(
        load_quantized(checkpoint, torch.float32), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    quantized = {name for name, module in base.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantized) == 14 and all(name.startswith("model.language_model.") for name in quantized)
    tuned = tune(base, data, tmp_path / "adapter", ["language_model", "query_transformer"])
    loaded = load_adapter(load_quantized(checkpoint, torch.float32), tmp_path / "adapter")
    for logits, wanted in zip(all_logits(loaded), all_logits(tuned)):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert answers(load_adapter(load_base(checkpoint), tmp_path / "adapter"))


@pytest.mark.slow
def test_sft_trainer_of_trl(checkpoint, data, tmp_path):
    """TRL's trainer with the same collator; its `max_length` cuts nothing, and m is that of the step."""
    trl = pytest.importorskip("trl")
    base, sampler, seen = load_base(checkpoint), VisualTokenSampler("uniform", M), []
    base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["visual_token_counts"].tolist()), with_kwargs=True
    )
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(
            output_dir=tmp_path,
            max_steps=5,
            max_length=8,
            logging_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
        ),
        data_collator=MQTLlavaDataCollator(make_processor(), sampler),
        train_dataset=load_conversations(data),
        processing_class=make_processor(),
        peft_config=make_lora_config(base),
        callbacks=[sampler],
    )
    trainer.train()
    assert seen == [[sampler.sample(step)] * 2 for step in range(5)]
    assert [entry["num_visual_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(tmp_path / "adapter")
    assert answers(load_adapter(load_base(checkpoint), tmp_path / "adapter"))
