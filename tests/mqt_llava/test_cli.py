"""The program `mqt-llava` whatever the command: help, version, output that cannot be written, Ctrl-C."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging
from typer.main import get_command
from typer.testing import CliRunner

from mqt_llava import __version__, cli
from mqt_llava.cli import models
from tests.commands import QUESTION


pytestmark = pytest.mark.usefixtures("restore_global_settings")
ask_module = importlib.import_module("mqt_llava.cli.ask")  # its name is that of the command, too


def run_program(*arguments, **settings):
    command = [sys.executable, "-c", "from mqt_llava_cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **settings)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["streamed", "json", "help", "help of a command", "version"])
def test_output_that_nothing_takes(command, checkpoint, files):
    ask = ["ask", files[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 3]
    arguments = {"streamed": ask, "json": [*ask, "--json"], "help": ["--help"], "version": ["--version"]}
    arguments["help of a command"] = ["ask", "--help"]
    with open("/dev/full", "w") as full:
        result = run_program(*arguments[command], stdout=full)
    assert result.returncode == 1
    assert re.fullmatch(r"Error: [^\n]*No space left on device\n", result.stderr), result.stderr


def test_output_that_nobody_reads(checkpoint, files):
    read, write = os.pipe()
    os.close(read)
    for arguments in (["ask", files[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 3], ["--help"]):
        result = run_program(*arguments, stdout=write)
        assert (result.returncode, result.stderr) == (1, "")
    os.close(write)


STARTED = """
import sys
class Interrupt:
    def find_spec(self, name, *args):
        if name == "mqt_llava":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
import mqt_llava_cli
mqt_llava_cli.main()
"""


def test_ctrl_c_while_libraries_are_loaded():
    result = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_ctrl_c_while_a_command_runs(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask_module, "load_image", interrupted)
    result = CliRunner().invoke(cli.app, ["ask", "photo.png", QUESTION])
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


def test_bare_command_and_short_help():
    help = CliRunner().invoke(cli.app, ["--help"])
    for command in ("ask", "finetune", "convert", "cost", "explain", "update", "serve", "train"):
        assert f" {command} " in help.stdout
    for arguments in ([], ["-h"]):
        result = CliRunner().invoke(cli.app, arguments)
        assert (result.exit_code, result.stdout) == (0, help.stdout)
    for command in ("ask", "finetune", "convert", "cost", "explain", "update", "train"):
        short, long = (CliRunner().invoke(cli.app, [command, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0 and short.stdout == long.stdout and "mqt-llava" in short.stdout


# In a sitecustomize module, since it runs before `python -m` imports the package
AT_EXIT = """
import atexit, sys
atexit.register(lambda: print(*{"torch", "transformers"} & set(sys.modules), file=sys.stderr))
"""
SCRIPT = ["-c", "from mqt_llava_cli import main; main()"]
MODULE = ["-m", "mqt_llava.cli"]


@pytest.mark.parametrize(
    "program, arguments",
    [
        *((SCRIPT, [*command, "--help"]) for command in ([], *([name] for name in get_command(cli.app).commands))),
        (SCRIPT, ["--version"]),
        (MODULE, ["--help"]),
        (MODULE, ["ask", "--help"]),
        (MODULE, ["--version"]),
    ],
    ids=" ".join,
)
def test_help_and_version_wait_for_no_library(tmp_path, program, arguments):
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    settings = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, *program, *arguments], **settings)
    assert result.returncode == 0 and "mqt-llava" in result.stdout and result.stderr == "\n"


def test_package_in_a_module_that_is_run_registers_its_model(tmp_path):
    """Only the command line itself is lazy, not a package of a user's, even if it is run by `python -m` too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import mqt_llava")
    code = "from transformers import AutoConfig\nprint(AutoConfig.for_model('mqt_llava').model_type)"
    (tmp_path / "mine" / "__main__.py").write_text(code)
    result = subprocess.run([sys.executable, "-m", "mine"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "mqt_llava\n", result.stderr


LAZY = """
import mqt_llava_cli
import mqt_llava
from transformers import AutoConfig
assert not hasattr(mqt_llava, "nonsense")
names = {name: getattr(mqt_llava, name) for name in mqt_llava.__all__}
assert type(AutoConfig.for_model("mqt_llava")) is names["MQTLlavaConfig"]
"""


def test_names_of_the_package_in_the_program():
    """As `evaluate --metric module:function` may import them."""
    subprocess.run([sys.executable, "-c", LAZY], check=True)


def test_version_and_help():
    version = CliRunner().invoke(cli.app, ["--version"])
    assert (version.exit_code, version.stdout) == (0, f"mqt-llava {__version__}\n")
    usage = CliRunner().invoke(cli.app, ["ask", "--help"])
    assert usage.exit_code == 0
    for option in ("IMAGE", "--model", "--num-visual-tokens", "--max-new-tokens", "--device", "--dtype", "--json"):
        assert option in usage.stdout
    assert " ask " in CliRunner().invoke(cli.app, ["--help"]).stdout


def test_download_progress_stays_as_it_was():
    from huggingface_hub.utils import are_progress_bars_disabled

    was_disabled = are_progress_bars_disabled()
    try:
        for switch, disabled in ((enable_progress_bars, False), (disable_progress_bars, True)):
            switch()
            models.silence_libraries()
            assert are_progress_bars_disabled() == disabled
            assert not logging.is_progress_bar_enabled()
    finally:
        (disable_progress_bars if was_disabled else enable_progress_bars)()
