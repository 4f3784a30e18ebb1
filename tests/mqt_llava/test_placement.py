"""Where a model fits is found before its weights are read."""

import json
import re

import psutil
import pytest
import torch
from typer.testing import CliRunner

from mqt_llava import cli, placement
from mqt_llava.cli.errors import UsageError
from mqt_llava.cli.serve import place_server
from mqt_llava.cost import CostModel
from mqt_llava.placement import check_training, free_memory, place_model
from tests.commands import QUESTION, assert_refused
from tests.small_model import make_config


pytestmark = pytest.mark.usefixtures("restore_global_settings")


@pytest.fixture(scope="module")
def costs():
    return CostModel(make_config(dtype="bfloat16"))


@pytest.fixture
def free(monkeypatch):
    """Sets what the devices have free, `free(cpu=..., cuda=...)`."""

    def set_free(**sizes):
        monkeypatch.setattr(placement, "free_memory", lambda device: sizes[torch.device(device).type])

    return set_free


def write_group(folder, version, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached - 10}\n{prefix}active_file 10\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_containers(tmp_path, version):
    """The tightest of the groups that a process is in; files that are cached there do not count."""
    root, process = tmp_path / "cgroup", tmp_path / "process"
    process.write_text("5:cpu:/other\n4:memory:/jobs/one\n" if version == 1 else "0::/jobs/one\n")
    home = root / "memory" if version == 1 else root
    write_group(home, version, 2**62 if version == 1 else "max", 9000, 10)
    assert free_memory("cpu", root, process) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (home / "jobs/one").mkdir(parents=True)
    write_group(home / "jobs", version, 5000, 3000, 500)
    assert free_memory("cpu", root, process) == 2500
    write_group(home / "jobs/one", version, 4000, 2500, 100)
    assert free_memory("cpu", root, process) == 1600


def test_limit_of_the_container_that_one_is_in(tmp_path):
    """Inside, the group by its full name is not there to see."""
    process = tmp_path / "process"
    process.write_text("0::/docker/abc\n")
    write_group(tmp_path / "cgroup", 2, 4000, 2500, 100)
    assert free_memory("cpu", tmp_path / "cgroup", process) == 1600


def test_machine_without_cgroups(tmp_path):
    assert free_memory("cpu", tmp_path, tmp_path / "none") > 2**20


def test_float32_where_there_is_room_to_spare(costs, free):
    in_float32 = costs(dtype="float32").memory_bytes
    free(cpu=2 * in_float32)
    assert place_model(costs, "cpu").dtype == torch.float32
    free(cpu=int(1.1 * in_float32))
    chosen = place_model(costs, "cpu")
    assert (chosen.dtype, chosen.options) == (torch.bfloat16, {})
    assert place_model(costs, "cpu", torch.float32).dtype == torch.float32  # it fits, if barely
    free(cpu=2 * in_float32, cuda=2 * in_float32)
    assert place_model(costs, "cuda").dtype == torch.bfloat16


def test_what_a_gpu_does_not_hold_goes_elsewhere(costs, free, monkeypatch):
    need = costs(dtype="bfloat16").memory_bytes
    free(cuda=need - 1, cpu=need)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen = place_model(costs, "cuda:0")
    assert chosen.options == {"device_map": "auto", "max_memory": {0: need - 1, "cpu": need}}
    words = r"needs .+ GB with --dtype bfloat16; cuda:0 has .+ GB free: the rest goes to the CPU"
    assert chosen.dtype == torch.bfloat16 and re.search(words, chosen.note)
    assert place_model(costs, "cuda", num_bits=4).options == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "the rest goes to other GPUs" in place_model(costs, "cuda:0").note
    free(cuda=1000, cpu=need)
    with pytest.raises(ValueError, match="No other option would fit"):
        place_model(costs, "cuda", num_bits=4)


def test_what_would_fit_is_said(costs, free):
    free(cpu=costs(dtype="bfloat16").memory_bytes)
    words = (
        r"needs .+ GB with --dtype float32; cpu has .+ GB free. What would fit: --dtype bfloat16 needs .+ GB; --dtype"
    )
    with pytest.raises(ValueError, match=words + " bfloat16 --load-in-8bit needs"):
        place_model(costs, "cpu", torch.float32)
    free(cpu=1000)
    with pytest.raises(ValueError, match="No other option would fit"):
        place_model(costs, "cpu")


def test_longer_answers_need_more(costs, free):
    free(cpu=costs(dtype="bfloat16", num_new_tokens=100).memory_bytes)
    place_model(costs, "cpu", torch.bfloat16, num_new_tokens=100)
    with pytest.raises(ValueError, match="the model needs"):
        place_model(costs, "cpu", torch.bfloat16, num_new_tokens=1000)


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_ask_refuses_what_does_not_fit(checkpoint, files, free):
    free(cpu=1000)
    result = run("ask", files[0], QUESTION, "--model", checkpoint)
    assert_refused(result, "GB with --dtype float32", "cpu has 1e-06 GB free")


def test_long_answers_are_as_long_as_the_model_has_positions(checkpoint, files, free):
    free(cpu=10 * CostModel(make_config())(dtype="float32", num_new_tokens=2048).memory_bytes)
    result = run("ask", files[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 10**9, "--num-visual-tokens", 1)
    assert result.exit_code == 0, result.output


def test_model_that_cannot_be_counted_is_loaded_as_before(checkpoint, files, free, monkeypatch):
    def fail(*_):
        raise RuntimeError("Expected inputs of BF16 type")

    monkeypatch.setattr("mqt_llava.cost.CostModel.__init__", fail)
    free(cpu=1000)
    options = [files[0], QUESTION, "--model", checkpoint, "--json", "--max-new-tokens", 2]
    result = run("ask", *options, "--compare", "1,4")
    assert result.exit_code == 0 and [row["flops"] for row in json.loads(result.stdout)["compare"]] == [None, None]
    assert_refused(run("cost", "--model", checkpoint), "Expected inputs of BF16 type")


def test_server_refuses_what_does_not_fit(checkpoint, free):
    free(cpu=1000)
    with pytest.raises(UsageError, match="cpu has 1e-06 GB free"):
        place_server([str(checkpoint), "--device=cpu", "--port", "8000"])
    for options in (["--device", "balanced"], ["--device", "0"], ["--quantization", "bnb-4bit"]):
        assert place_server([str(checkpoint), *options]) == [str(checkpoint), *options]
        with pytest.raises(UsageError, match="--load-in-8bit cannot be combined with"):
            place_server([str(checkpoint), *options, "--load-in-8bit"])
    with pytest.raises(UsageError, match=r"--dtype is one of auto, .*; got nonsense"):
        place_server([str(checkpoint), "--dtype", "nonsense"])


PARTS = {"finetune": (), "stage 1": ("query_transformer",)}
PARTS["stage 2"] = ("query_transformer", "embeddings", "language_model", "lm_head")


@pytest.mark.parametrize("command", PARTS)
def test_training_refuses_what_does_not_fit(checkpoint, files, tmp_path, free, command):
    """Before weights are read. A stage of the language model needs more than one of the query transformer."""
    row = {"image": files[0], "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    row["conversations"].append({"from": "gpt", "value": "A cat."})
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row]))
    weights = CostModel(make_config())(1, dtype="float32").weight_bytes
    need = sum(weights.values()) + 3 * sum(weights[part] for part in PARTS[command])
    free(cpu=need)
    check_training(CostModel(make_config()), "cpu", torch.float32, PARTS[command])
    free(cpu=need - 1)
    if command == "finetune":
        arguments = ["finetune", data, "--output-dir", tmp_path / "out", "--model", checkpoint, "--use-cpu"]
    else:
        arguments = ["train", "--stage", command[-1], "--model", checkpoint, "--data_path", data]
        arguments += ["--output_dir", tmp_path / "out", "--use_cpu"]
    result = run(*arguments)
    assert result.exit_code == 2 and "training needs more than" in result.stderr, result.output
    assert (
        f"Less is needed with {'--bf16, --load-in-4bit' if command == 'finetune' else '--dtype bfloat16'}"
        in result.stderr
    )
    assert not list((tmp_path / "out").glob("*.safetensors"))
