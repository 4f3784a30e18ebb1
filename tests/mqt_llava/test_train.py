"""`mqt-llava train`: the paper's values, YAML files, both stages, grouping by length, mistakes, and a run that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from mqt_llava import VisualTokenSchedule
from mqt_llava.cli import main
from mqt_llava.training.arguments import LoraArguments, accumulation_steps, parse_arguments
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import load_conversations
from mqt_llava.training.distillation import DistillationTrainer
from mqt_llava.training.lengths import SeededLengthGroupedSampler, with_lengths
from mqt_llava.training.lora import make_lora_config
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer
from tests.mqt_llava.stage_data import write_conversations
from tests.mqt_llava.stage_run import run
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


M = NUM_QUERY_TOKENS
ROOT = Path(__file__).parents[2]
NEEDED = ["--model", "start", "--data_path", "data.json", "--use_cpu"]
SMALL = (
    "--use_cpu --bf16 false --per_device_train_batch_size 2 --global_batch_size 4 --logging_steps 1 --disable_tqdm true "
    "--dataloader_num_workers 0 --learning_rate 1e-3"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data"))


# What it is told ------------------------------------------------------------------------------------------------------------

PAPER = {  # arXiv 2405.19315, section 3
    1: {"learning_rate": 1e-3, "num_train_epochs": 1, "num_visual_tokens": ["fixed"], "global_batch_size": 256},
    2: {"learning_rate": 2e-5, "num_train_epochs": 2, "num_visual_tokens": ["even"], "global_batch_size": 128},
}


@pytest.mark.parametrize("stage", [1, 2])
def test_defaults_are_the_papers(stage, monkeypatch):
    arguments, training = parse_arguments(["--stage", str(stage), *NEEDED])
    paper = PAPER[stage]
    assert arguments.stage == stage and arguments.num_visual_tokens == paper["num_visual_tokens"]
    assert training.learning_rate == paper["learning_rate"] and training.num_train_epochs == paper["num_train_epochs"]
    assert training.lr_scheduler_type == "cosine" and training.warmup_steps == 0.03 and training.weight_decay == 0
    assert training.bf16 and training.gradient_checkpointing
    batch, size = training.per_device_train_batch_size, arguments.global_batch_size
    assert size == paper["global_batch_size"] == batch * training.gradient_accumulation_steps
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert accumulation_steps(size, batch) * batch * 8 == size


def test_the_command_line_goes_before_the_file_and_that_before_the_paper(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "stage: 2\nlearning_rate: 1e-4\nwarmup_steps: 7\nnum_visual_tokens: [1, 4]\ndata_path: data.json\nbf16: false\n"
        "lr_scheduler_kwargs: {num_cycles: 0.4}\nmax_length:\nuse_cpu: true\nmodel: file\n"
    )
    arguments, training = parse_arguments(["--config", str(config), "--warmup-steps=9", "--model", "line"])
    assert arguments.model == "line" and training.warmup_steps == 9
    assert training.learning_rate == 1e-4 and arguments.num_visual_tokens == ["1", "4"] and not training.bf16
    assert arguments.data_path == ["data.json"] and training.lr_scheduler_kwargs == {"num_cycles": 0.4}
    assert arguments.stage == 2 and arguments.max_length == 2048 and training.num_train_epochs == 2
    assert parse_arguments(["--config", str(config), "--stage", "1"])[0].stage == 1
    more = ["--gradient_accumulation_steps", "3", "--eval_data_path", "eval.json"]
    training = parse_arguments(["--config", str(config), *more])[1]
    assert training.gradient_accumulation_steps == 3 and training.eval_strategy == "epoch"


def test_finetune_takes_short_names_and_data_anywhere(tmp_path):
    """Each option takes one word, and flags take none."""
    words = "--output-dir out --bf16 a.json --targets language_model,query_transformer b.json -r 4 --use_cpu true --lr 1e-3"
    words += " --num-visual-tokens 1,4 c.json --eval-data e.json --push-to-hub me/adapter --batch-size=3 --truncate --disable-tqdm false d.json"
    arguments, training = parse_arguments(words.split(), LoraArguments)
    assert arguments.data_path == ["a.json", "b.json", "c.json", "d.json"] and arguments.eval_data_path == ["e.json"]
    assert arguments.targets == ["language_model", "query_transformer"] and arguments.num_visual_tokens == ["1,4"]
    assert (
        arguments.rank == 4 and arguments.truncate and not training.disable_tqdm and training.bf16 and training.use_cpu
    )
    assert training.per_device_train_batch_size == 3 == training.per_device_eval_batch_size
    assert training.learning_rate == 1e-3 and training.output_dir == "out" and training.eval_strategy == "epoch"
    assert training.hub_model_id == "me/adapter" and not training.push_to_hub
    assert training.lr_scheduler_type == "cosine" and training.seed == 0 and not training.gradient_checkpointing
    config = tmp_path / "config.yaml"
    config.write_text("data_path: [a.json, b.json]\ntargets: [vision_tower, query_transformer]\nepochs: 3\nalpha: 8\n")
    arguments, training = parse_arguments(["--config", str(config), "--alpha", "9"], LoraArguments)
    assert arguments.targets == ["vision_tower", "query_transformer"] and arguments.alpha == 9
    assert arguments.data_path == ["a.json", "b.json"] and training.num_train_epochs == 3


MISTAKES = {
    "unknown key": (
        "lerning_rate: 1",
        [],
        r"config\.yaml: there is no argument lerning_rate; the closest one is learning_rate",
    ),
    "unknown option": (
        "",
        ["--eval-num-visual", "1"],
        "--eval-num-visual; the closest one is --eval-num-visual-tokens",
    ),
    "unknown option like none": ("", ["--foo", "1"], r"there is no argument --foo\.$"),
    "eval_num_visual_tokens alone": (
        "eval_num_visual_tokens: 1",
        [],
        "--eval-num-visual-tokens needs --eval-data-path",
    ),
    "unknown option before missing ones": ("", ["--stag", "1"], "the closest one is --stage"),
    "number": ("max_steps: 2.5", [], "--max-steps: invalid int value: '2.5'"),
    "choice": ("train_sampling_strategy: lengthwise", [], "invalid choice: 'lengthwise'"),
    "stage": ("stage: 3", [], "--stage: invalid choice: 3"),
    "no YAML": ("a: [", [], r"config\.yaml is not valid YAML"),
    "a list": ("- 1", [], "must hold keys and values; got list"),
    "batch": ("global_batch_size: 100", [], "multiple of .*16 x 1; got 100"),
    "small batch": ("global_batch_size: 8", [], "16 x 1; got 8"),
    "stray words": ("", ["--seed", "1", "2"], "belong to no argument: 2"),
    "num_visual_tokens": ("num_visual_tokens: [1, 17]", [], "from 1 to 16"),
    "eval_num_visual_tokens": ("eval_num_visual_tokens: 0", ["--eval_data_path", "data.json"], "from 1 to 16"),
    "distribution": ("num_visual_tokens: evn", [], "must be one of even"),
    "no data": ("data_path: nowhere.json", [], "no data file nowhere.json"),
    "no model": ("model: nowhere", [], "cannot load the model nowhere"),
    "distillation": ("distill_weight: -1", [], "Distillation needs a weight"),
}


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["mqt-llava", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        main()
    return status.value.code or 0


@pytest.mark.parametrize(("config", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_before_any_work(
    config, options, message, checkpoint, data, tmp_path, monkeypatch, capfd
):
    (tmp_path / "config.yaml").write_text(config)
    given = {"stage": 2, "model": checkpoint, "data_path": data}
    needed = [word for key, value in given.items() if key not in config for word in (f"--{key}", value)]
    output = ["--output_dir", tmp_path / "out", "--use_cpu", "--config", tmp_path / "config.yaml"]
    assert command(monkeypatch, *needed, *output, *options) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: "))
    assert re.search(message, line)
    assert not list((tmp_path / "out").glob("*"))


def test_what_is_missing_is_named(monkeypatch, capfd):
    assert command(monkeypatch) == 2
    assert "required: --model, --data-path, --stage" in capfd.readouterr().err


def test_help_has_our_options_and_says_how_to_see_all(monkeypatch, capfd):
    for option in ("-h", "--help"):
        assert command(monkeypatch, "--stage", 1, option) == 0
        help_text = capfd.readouterr().out
        assert "--distill-weight" in help_text and "--gradient-accumulation-steps" not in help_text
        assert "--help-all" in help_text and len(help_text.splitlines()) < 80
    assert command(monkeypatch, "--help-all") == 0
    assert "--gradient-accumulation-steps" in capfd.readouterr().out


# What it does ---------------------------------------------------------------------------------------------------------------


def changed_parts(folder, start):
    after, before = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (folder, start))
    return {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}


def test_both_stages_one_after_the_other(checkpoint, data, tmp_path, monkeypatch, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluation = ["--eval_data_path", data, "--eval_num_visual_tokens", "1,4,16", "--report_to", "tensorboard"]
    stage1 = ["--stage", 1, "--model", checkpoint, "--data_path", data, "--output_dir", one, *SMALL]
    assert command(monkeypatch, *stage1, *evaluation) == 0
    output = capfd.readouterr().out
    assert all(f"eval_m{m}_loss" in output for m in (1, 4, 16)) and "'num_visual_tokens': 16" in output
    assert len(list(one.glob("runs/*/events.out.tfevents.*"))) == 1
    assert changed_parts(one, checkpoint) == {"query_transformer"}
    assert command(monkeypatch, *stage1) == 2
    assert "is not empty" in capfd.readouterr().err

    settings = json.loads((one / "generation_config.json").read_text())
    schedule = {"num_visual_tokens": [2, 16], "thresholds": [0.9]}
    settings["visual_token_schedule"] = schedule | {"calibration": {"tolerance": 0.01}}
    (one / "generation_config.json").write_text(json.dumps(settings))
    stage2 = ["--stage", 2, "--model", one, "--data_path", data, "--output_dir", two, *SMALL, "--max_steps", 2]
    assert command(monkeypatch, *stage2, "--distill_weight", 0.5) == 0
    assert "divergence" in capfd.readouterr().out
    assert changed_parts(two, one) == {"query_transformer", "language_model", "weight"}  # the last is lm_head.weight
    model = AutoModelForImageTextToText.from_pretrained(two)
    assert model.config.text_config.use_cache and model.generation_config.use_cache
    kept = VisualTokenSchedule(**model.generation_config.visual_token_schedule)
    assert kept == VisualTokenSchedule(**schedule)  # calibrated were other weights
    for folder in (two, two / "checkpoint-2"):
        assert AutoProcessor.from_pretrained(folder).num_query_tokens == M
    assert command(monkeypatch, *stage2[:-1], 3, "--resume") == 0
    assert (two / "checkpoint-3").exists()


def test_checkpointing_and_accumulation_change_no_loss(checkpoint, data, tmp_path):
    common = ["--stage", 2, "--model", checkpoint, "--data_path", data, *SMALL, "--max_steps", 3]
    common += ["--train_sampling_strategy", "random", "--save_strategy", "no"]
    plain = run(*common, "--output_dir", tmp_path / "1", "--gradient_checkpointing", "false")
    checkpointing = run(*common, "--output_dir", tmp_path / "2")
    whole = run(*common, "--output_dir", tmp_path / "3", "--per_device_train_batch_size", 4)
    assert checkpointing.losses == pytest.approx(plain.losses, abs=1e-5) == whole.losses
    assert len(plain.batches) == 2 * len(whole.batches)
    bfloat16 = run(*common, "--output_dir", tmp_path / "4", "--bf16", "true")
    assert bfloat16.losses != plain.losses and bfloat16.losses == pytest.approx(plain.losses, abs=0.05)


def test_a_batch_of_text_gets_a_blank_image():
    """It changes neither loss nor gradients; those of the query transformer are zero, not missing."""
    rows = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}], "images": []}
        for answer in ("A cat.", "It is a dog.")
    ]
    results = []
    for always_image in (False, True):
        model = make_model().train()
        batch = MQTLlavaDataCollator(make_processor(), always_image=always_image)(rows)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert batch["visual_token_counts"].tolist() == [1] and batch["labels"].max() > 0
    (plain, gradients), (loss, with_blank) = results
    torch.testing.assert_close(loss, plain)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(with_blank[name], gradient)
        elif "query_transformer" in name:
            assert with_blank[name] is not None and not with_blank[name].any()


# Batches of samples about as long ---------------------------------------------------------------------------------------------


def test_lengths_count_visual_tokens_without_opening_images(data, tmp_path):
    processor = make_processor()
    (tmp_path / "rows.json").write_text(data.read_text())  # where no picture is
    rows = with_lengths(load_conversations(tmp_path / "rows.json"), processor, M)
    collator = MQTLlavaDataCollator(processor, M)
    exact = [collator([row])["input_ids"].shape[1] for row in load_conversations(data)]
    overhead = [length - counted for length, counted in zip(exact, rows["length"])]
    assert max(overhead) - min(overhead) <= 2  # the chat template
    text = [length for length, images in zip(rows["length"], rows["images"]) if not images]
    assert len(text) == 6 and max(text) < max(rows["length"]) - M / 2


def test_the_order_depends_on_seed_and_epoch():
    class Order:
        generator = None

        def __len__(self):
            return 20

        def __iter__(self):
            return iter(torch.randperm(20, generator=self.generator).tolist())

    def order(seed, epoch):
        return list(SeededLengthGroupedSampler(Order(), 4, seed, lambda: epoch))

    assert order(1, 2) == order(1, 2) != order(1, 3)
    assert order(2, 2) != order(1, 2)


@given(
    number=st.integers(1, 200), batch_size=st.integers(1, 9), num_processes=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_batches_of_like_length_come_in_any_order_but_for_the_first_and_the_last(
    number, batch_size, num_processes, seed
):
    lengths = [(7 * i) % 50 for i in range(number)]
    grouped = LengthGroupedSampler(batch_size, lengths=lengths)
    step = batch_size * num_processes
    order = list(SeededLengthGroupedSampler(grouped, step, seed, lambda: 0))
    grouped.generator = torch.Generator().manual_seed(seed)
    by_length = list(grouped)
    batches, sorted_batches = ([rows[i : i + step] for i in range(0, number, step)] for rows in (order, by_length))
    assert sorted(batches) == sorted(sorted_batches)
    assert batches[0] == sorted_batches[0] and batches[-1] == sorted_batches[-1]
    if len(batches) > 20:
        assert batches != sorted_batches


# A run that is killed ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from mqt_llava.training.arguments import accumulation_steps, parse_arguments
from mqt_llava.training.train import train

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

train(*parse_arguments(sys.argv[1:]), callbacks=[Kill()])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--stage", 2],
        ["--stage", 2, "--train_sampling_strategy", "random", "--dataloader_num_workers", 2],
        ["--stage", 2, "--distill_weight", 1, "--dataloader_num_workers", 2, "--bf16", "true"],
    ],
    ids=["lengths", "random, workers", "distillation, workers, bfloat16"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(options, checkpoint, data, tmp_path):
    """Three steps an epoch with accumulation; killed in the third one, resumed from the middle of the second."""
    arguments = ["--model", checkpoint, "--data_path", data, *SMALL, "--max_steps", 10, "--save_steps", 5, *options]
    whole = run(*arguments, "--output_dir", tmp_path / "whole")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", KILLED, *map(str, arguments), "--output_dir", tmp_path / "broken"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    rest = run(*arguments, "--output_dir", tmp_path / "broken", "--resume")
    assert rest.losses == whole.losses and len(whole.losses) == 10
    whole, broken = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken")
    )
    assert all(torch.equal(broken[name], weight) for name, weight in whole.items())


# Fields of `TrainingArguments` that a causal model with images may get wrong ---------------------------------------------------


def rows():
    """Two rows with an image and one without, whose answers differ in length."""
    images = make_images(2)
    for number, answer in ((1, "Two."), (1, "It is one."), (0, "None at all.")):
        question = {"role": "user", "content": "<image>" * number + "How many?"}
        yield {"messages": [question, {"role": "assistant", "content": answer}], "images": images[:number]}


def make_trainer(folder, cls=MQTLlavaTrainer, model=None, m=5, trainer_settings=None, **settings):
    settings = {"max_steps": 1, "learning_rate": 1e-3, "remove_unused_columns": False} | settings
    return cls(
        model or make_model(),
        TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **settings),
        data_collator=MQTLlavaDataCollator(make_processor(), m),
        train_dataset=list(rows()),
        eval_dataset=list(rows()),
        **(trainer_settings or {}),
    )


@pytest.mark.parametrize("cls", [Trainer, MQTLlavaTrainer, DistillationTrainer])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("num_items", [None, 7])
def test_labels_are_shifted_for_label_smoothing(cls, adapter, num_items, tmp_path):
    model = make_model()
    if adapter:
        model = get_peft_model(model, make_lora_config(model))
    trainer = make_trainer(tmp_path, cls, model, label_smoothing_factor=0.2)
    trainer.model.eval()
    batch = trainer.data_collator(list(rows()))
    num_items = num_items if num_items is None else torch.tensor(num_items)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    logits, labels = trainer.model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    reduction = "mean" if num_items is None else "sum"
    expected = cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.2) / (num_items or 1)
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_knows_the_model_by_the_name_that_fsdp_gives_it(tmp_path):
    model = make_model()
    model.__class__ = type("FSDPMQTLlava", (type(model),), {})
    trainer = make_trainer(tmp_path, model=model, label_smoothing_factor=1e-9)
    batch = trainer.data_collator(list(rows()))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


def test_distillation_smooths_labels_too(tmp_path):
    trainer = make_trainer(tmp_path, DistillationTrainer, m=9, label_smoothing_factor=1e-9)
    plain = make_trainer(tmp_path, DistillationTrainer, m=9)
    batch = plain.data_collator(list(rows()))
    losses = [run.compute_loss(run.model.train(), dict(batch)) for run in (trainer, plain)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size.*fits in memory at m = 8"),
        ({"dataloader_in_order": False, "dataloader_num_workers": 2}, "dataloader_in_order"),
        ({"use_liger_kernel": True}, "Liger has no kernels"),
    ],
)
def test_fields_that_would_be_wrong_silently_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, m=VisualTokenSampler([2, 8], M), **settings).train()


@pytest.mark.parametrize("cls", [Trainer, MQTLlavaTrainer])
def test_fields_that_are_right(cls, tmp_path):
    """All at once: noise on embeddings of text, tokens counted with visual ones, metrics in batches, short batches."""
    seen = []

    def compute_metrics(prediction, compute_result=True):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"n": len(seen)}

    trainer = make_trainer(
        tmp_path,
        cls,
        neftune_noise_alpha=5.0,
        include_num_input_tokens_seen="all",
        batch_eval_metrics=True,
        eval_accumulation_steps=1,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        average_tokens_across_devices=True,
        torch_empty_cache_steps=1,
        trainer_settings={"compute_metrics": compute_metrics},
    )
    trainer.train()
    batch = trainer.data_collator(list(rows()))
    assert trainer.state.num_input_tokens_seen == batch["input_ids"].numel()
    trainer.evaluate()
    assert [len(logits) for logits, *_ in seen] == [2, 1]
    for logits, labels in seen:
        assert logits.shape[:2] == labels.shape  # of logits alone: no cache and no images


@pytest.mark.parametrize("accumulation", [None, 1])
def test_predictions_are_logits_alone(accumulation, tmp_path):
    shapes = []

    def preprocess(logits, labels):
        shapes.append(tuple(logits.shape[:2]) == tuple(labels.shape))
        return logits.argmax(-1)

    trainer = make_trainer(
        tmp_path,
        Trainer,
        per_device_eval_batch_size=2,
        eval_accumulation_steps=accumulation,
        trainer_settings={
            "compute_metrics": lambda p: {"same": p.predictions.shape == p.label_ids.shape},
            "preprocess_logits_for_metrics": preprocess,
        },
    )
    assert trainer.evaluate()["eval_same"] and shapes == [True, True]


def test_lengths_are_read_at_once(data, tmp_path):
    """A column of `datasets` takes 0.3 ms for each row that it is asked for: four minutes an epoch for LLaVA's 665,000."""
    rows = with_lengths(load_conversations(data), make_processor(), M)
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length")
    trainer.train_dataset = rows
    assert trainer._get_train_sampler().sampler.lengths == list(rows["length"])
    assert type(trainer._get_train_sampler().sampler.lengths) is list


@pytest.mark.parametrize("adapter", [False, True])
def test_training_keeps_no_keys_and_values_and_generation_does(adapter, tmp_path):
    model, kept = make_model(), []
    model.model.language_model.register_forward_hook(lambda *args: kept.append(args[-1].past_key_values is not None))
    if adapter:
        model = get_peft_model(model, make_lora_config(model))
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    trainer.evaluate()
    assert kept[0] is False
    kept.clear()
    inputs = {name: value[:1] for name, value in trainer.data_collator(list(rows())[2:]).items() if name != "labels"}
    trainer.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert kept == [True, True]


def test_names_can_be_imported_from_the_package():
    from mqt_llava import training

    for name in training.__all__:
        assert getattr(training, name).__name__ == name and name in dir(training)
    assert training.MQTLlavaTrainer is MQTLlavaTrainer
    with pytest.raises(ImportError, match="MQTLlavaColator"):
        from mqt_llava.training import MQTLlavaColator  # noqa: F401
