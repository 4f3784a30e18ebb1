"""Several processes train as one does: DDP and FSDP2 with the configurations that ship, on two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mqt_llava.training.arguments import CONFIGS
from mqt_llava.training.sampling import VisualTokenSampler
from tests.mqt_llava.stage_data import write_conversations
from tests.mqt_llava.stage_run import run
from tests.small_model import NUM_QUERY_TOKENS


M = NUM_QUERY_TOKENS
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "stage_run.py"
SETTINGS = (
    "--max_steps 3 --logging_steps 1 --disable_tqdm true --use_cpu --bf16 false --dataloader_num_workers 0 "
    # Not Adam, which makes steps of rounding errors where a gradient is zero
    "--max_grad_norm 0 --optim sgd --learning_rate 0.1 --lr_scheduler_type constant --warmup_steps 0 --seed 3"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data"))


def launch(config, *arguments):
    """Run a script in two processes."""
    command = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / "accelerate" / config]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "29617"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = map(str, [sys.executable, *command, *options, *arguments])
    done = subprocess.run(list(command), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]


def launch_stage(config, folder, *arguments):
    """What each of two processes noted."""
    launch(config, SCRIPT, folder, *arguments)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


# In the order of the file, one process has a batch of pictures and the other one of text alone
SCENARIOS = {
    "stage 1": ["--stage", 1, "--train_sampling_strategy", "random"],
    "stage 2": ["--stage", 2, "--train_sampling_strategy", "random"],
    "text on one rank": ["--stage", 2, "--train_sampling_strategy", "sequential"],
    "text on one rank, stage 1": ["--stage", 1, "--train_sampling_strategy", "sequential"],
    "accumulation": ["--stage", 2, "--train_sampling_strategy", "sequential", "--global_batch_size", 12],
    "distillation": [
        "--stage",
        2,
        "--train_sampling_strategy",
        "sequential",
        "--distill_weight",
        1,
        "--num_visual_tokens",
        9,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_two_processes_train_as_one(config, scenario, checkpoint, data, tmp_path):
    common = ["--model", checkpoint, "--data_path", data, "--global_batch_size", 4, *SETTINGS, *scenario]
    one = run(*common, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one")
    ranks = launch_stage(
        config, tmp_path, *common, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "two"
    )
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one.losses, abs=1e-4)
        assert rank["gradients"].keys() == one.gradients.keys() and len(one.gradients) > 10
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-4, rtol=0)
    distribution = 9 if "--distill_weight" in scenario else "even" if scenario[1] == 2 else "fixed"
    sampler = VisualTokenSampler(distribution, M, seed=3)
    for rank in ranks:
        times = len(rank["batches"]) // 3
        expected = [sampler.sample(step) for step in range(3) for _ in range(times)]
        assert all(set(counts) <= {m, 1} for counts, m in zip(rank["batches"], expected))  # 1 is a blank image's
    if scenario[3] == "sequential":
        assert [1] in ranks[1]["batches"] and [1] not in ranks[0]["batches"]

    together, alone = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True).state_dict()
        for name in ("two", "one")
    )
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-4, rtol=0)
    assert (tmp_path / "two" / "modeling_mqt_llava.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
@pytest.mark.parametrize("targets", ["language_model,query_transformer", "language_model,query_transformer_full"])
def test_two_processes_tune_an_adapter_as_one(config, targets, checkpoint, data, tmp_path):
    """`mqt-llava finetune`, resumed, too: adapters of the same weights, whole in every checkpoint."""
    common = [SCRIPT, "finetune", data, "--model", checkpoint, "--targets", targets]
    common += ["--use-cpu", "--dropout", 0, "--save-steps", 2, "--seed", 3]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = [*common, "--batch-size", 4, "--max-steps", 3, "--output-dir", tmp_path / "one"]
    subprocess.run(list(map(str, [sys.executable, *one])), env=environment, check=True, timeout=240)
    two = [*common, "--batch-size", 2, "--output-dir", tmp_path / "two"]
    launch(config, *two, "--max-steps", 3)
    alone = load_file(tmp_path / "one" / "adapter_model.safetensors")
    together = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert together.keys() == alone.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-4, rtol=0)
    assert (tmp_path / "two" / "README.md").exists()
    assert load_file(tmp_path / "two" / "checkpoint-2" / "adapter_model.safetensors").keys() == alone.keys()
    launch(config, *two, "--max-steps", 4, "--resume")


@pytest.mark.slow
def test_fsdp_resumes(checkpoint, data, tmp_path):
    """The same losses as an unbroken run; and every checkpoint is one for `from_pretrained`."""
    common = [
        "--model",
        checkpoint,
        "--data_path",
        data,
        "--stage",
        2,
        *SETTINGS,
        "--save_steps",
        2,
        "--optim",
        "adamw_torch",
    ]
    common += ["--per_device_train_batch_size", 2, "--global_batch_size", 4]
    whole, _ = launch_stage("fsdp2.yaml", tmp_path, *common, "--max_steps", 5, "--output_dir", tmp_path / "whole")
    launch_stage("fsdp2.yaml", tmp_path, *common, "--max_steps", 2, "--output_dir", tmp_path / "broken")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "broken" / "checkpoint-2")
    rest, _ = launch_stage(
        "fsdp2.yaml", tmp_path, *common, "--max_steps", 5, "--output_dir", tmp_path / "broken", "--resume"
    )
    assert rest["losses"] == whole["losses"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations(name, monkeypatch):
    """DeepSpeed is not installed: its files are read by accelerate, and that is all."""
    file = str(CONFIGS / "accelerate" / f"{name}.yaml")
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert load_config_from_file(file).distributed_type == kinds[name]
    arguments = launch_command_parser().parse_args(["--config_file", file, "-m", "mqt_llava.cli", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16"
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (name == "fsdp2", name.startswith("zero"))
    if name.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(arguments)
        for key, value in environment.items():
            if key.startswith("ACCELERATE_"):
                monkeypatch.setenv(key, value)
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == int(name[-1])
        assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
