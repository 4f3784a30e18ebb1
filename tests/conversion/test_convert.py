"""`mqt-llava convert`."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mqt_llava import MQTLlavaProcessor, cli
from mqt_llava.conversion import files, names
from tests.commands import assert_refused
from tests.conversion.checkpoints import read_weights


def run(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


def test_report_and_table(authors, tmp_path):
    result = run(authors, tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    assert "89 in, 93 out" not in result.stdout and re.search(
        r"tensors +73 in, 77 out, 70 renamed, 2 split", result.stdout
    )
    assert re.search(r"weights +0\.03 GB, bfloat16", result.stdout)
    assert re.search(r"vision tower +the checkpoint itself", result.stdout)
    assert re.search(r"time +\d+\.\d s", result.stdout)
    assert len(re.findall(r"visual tokens .* m = (?:1|16|256) .* ok", result.stdout)) == 3
    assert re.search(r"logits .* 1e-03 +ok", result.stdout)
    assert (tmp_path / "out" / "README.md").exists() and "README.md" in result.stdout


def test_json(authors, converted, tmp_path):
    result = run(authors, tmp_path / "out", "--json", "--verify", "--max-shard-size", "10MB", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["tensors_in"], report["dtypes"]) == (73, ["float32"])
    assert set(report["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert report["nbytes"] == 2 * sum(tensor.nbytes for tensor in read_weights(converted).values())
    assert len(report["checks"]) == 6 and report["checks"][-1]["difference"] < 1e-3


def test_dry_run(authors, tmp_path):
    dry = run(authors, tmp_path / "out", "--dry-run", "--json", "--max-shard-size", "10MB")
    assert list(tmp_path.iterdir()) == []
    real = run(authors, tmp_path / "out", "--json", "--max-shard-size", "10MB")
    dry, real = json.loads(dry.stdout), json.loads(real.stdout)
    assert dry | {"seconds": 0} == real | {"seconds": 0}
    assert "nothing was written" in run(authors, tmp_path / "other", "--dry-run").stdout
    assert not (tmp_path / "other").exists()


def test_wrong_arguments(authors, converted, source, tmp_path):
    out = tmp_path / "out"
    assert_refused(run(tmp_path / "nowhere", out), "nowhere")
    assert_refused(run(authors, out, "--layout", "mine"), "mine", "full, stage-1, lora, parts, back")
    assert_refused(run(authors, out, "--layout", "lora"), "adapter_config.json")
    assert_refused(run(authors, out, "--layout", "stage-1"), "query_abstractor.bin")
    assert_refused(run(authors, out, "--dtype", "int8"), "int8")
    for size in ("many", "abc", "0", "-5MB"):
        assert_refused(run(authors, out, "--max-shard-size", size), "--max-shard-size", f"got '{size}'")
    assert_refused(run(authors, out, "--keep-adapter"), "--keep-adapter")
    assert_refused(run(authors, out, "--base-model", "x"), "--base-model")
    assert_refused(run(authors, out, "--vision-tower", tmp_path / "nowhere"), "nowhere")
    assert_refused(run(authors, out, "--push-to-hub", "name"), "--push-to-hub", "someone/model")
    assert_refused(run(authors), "DST")
    assert_refused(run(authors, authors), "not empty")
    assert_refused(run(source, source, "--overwrite"), "source")
    assert_refused(run(converted, out, "--layout", "full"), "mqt_llava")
    shard = sorted(source.glob("*.safetensors"))[0]
    assert_refused(run(shard, out), f"{shard} is a file", "pass its folder")
    assert_refused(run(source / "config.json", out), "config.json is a file", "pass its folder")
    settings = json.loads((source / "config.json").read_text())
    for changes, words in (
        ({"num_attention_heads": 5}, "config.json: The hidden size (32)"),
        ({"mm_vision_select_layer": -99}, "mm_vision_select_layer is -99"),
    ):
        (source / "config.json").write_text(json.dumps(settings | changes))
        assert_refused(run(source, out), words)
    (source / "config.json").write_text("{}")
    assert_refused(run(source, out), "config.json has no model_type")
    (source / "config.json").write_text(json.dumps(settings))
    shard.write_bytes(b"garbage")
    assert_refused(run(source, out), "model-00001-of-00002.safetensors")
    assert not out.exists()


def test_failed_verification(authors, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "PACKED", ("k_proj", "q_proj", "v_proj"))
    result = run(authors, tmp_path / "out", "--verify")
    assert result.exit_code == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    assert result.stderr.count("FAILED") >= 3
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: the converted model differs from its source in: visual tokens")


def test_disk_that_fails(authors, tmp_path, monkeypatch):
    def write_all(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", write_all)
    assert_refused(run(authors, tmp_path / "out"), "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_when_the_tokenizer_is_written(authors, tmp_path, monkeypatch):
    """Its library raises a bare `Exception`."""

    def save_pretrained(*args):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(MQTLlavaProcessor, "save_pretrained", save_pretrained)
    assert_refused(run(authors, tmp_path / "out"), "cannot write the tokenizer: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_links(authors, tmp_path):
    """A link to a folder is that folder; links to files elsewhere are refused with what to do."""
    (tmp_path / "link").symlink_to(authors)
    assert run(tmp_path / "link", tmp_path / "out").exit_code == 0
    (tmp_path / "links").mkdir()
    for path in authors.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert_refused(run(tmp_path / "links", tmp_path / "other"), f"symbolic link to {authors}", "copy that file here")


# A conversion that takes its time when the weights are written
SLOW = """
import importlib, sys, time
layouts = importlib.import_module("mqt_llava.conversion.layouts")
layouts.CheckpointPlan.verify = lambda *args: (print("verifying", flush=True), time.sleep(60))
importlib.import_module("mqt_llava.cli").main()
"""


def read(terminal):
    try:
        return os.read(terminal, 65536).decode()
    except OSError:  # the other side is closed
        return ""


def test_progress_and_ctrl_c_on_a_terminal(authors, tmp_path):
    """There is a bar; after an interruption DST is as it was, and there is no traceback."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text("mine")
    terminal, side = os.openpty()
    command = [sys.executable, "-c", SLOW, "convert", authors, out, "--overwrite", "--verify"]
    with subprocess.Popen(command, stderr=side, stdout=side) as process:
        os.close(side)
        seen = ""
        while "verifying" not in seen:
            new = read(terminal)
            assert new, seen
            seen += new
        process.send_signal(signal.SIGINT)
        while new := read(terminal):
            seen += new
    os.close(terminal)
    assert process.returncode != 0 and "Traceback" not in seen
    assert re.search(r"converting .*100%", seen), seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.read_text() for path in out.iterdir()] == ["mine"] * 2


@pytest.mark.parametrize("module", ["sentencepiece", "google.protobuf"])
def test_missing_packages_are_named(authors, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    result = run(authors, tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert result.stderr == (f"Error: {module} is needed to read tokenizer.model: pip install 'mqt-llava[convert]'\n")
