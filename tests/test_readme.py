"""The README's code, as written: Python blocks one after the other in one namespace, and the command lines."""

import re
import shlex
import shutil
from pathlib import Path

from typer.testing import CliRunner

from mqt_llava.cli import app
from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME


ROOT = Path(__file__).parent.parent
SCENE = "A dog, a bear, the number 7 and a fish."  # what examples/scene.png shows
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        block = block.replace("cache=cache", f"{CACHE_NAME}=cache")  # README writes it as the newest transformers does
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].equal(namespace["same"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["64", "16", "1"]
    assert printed[3] == str([" Yes.", " Four."])  # the batch
    assert printed[4].startswith("tensor([")  # auto
    assert printed[0].split(maxsplit=1)[1] == printed[5].strip()  # the pipeline answers as generate does


def test_commands_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [
        line.split("&&")[-1]
        for block in blocks("bash")
        for line in block.splitlines()
        if re.search("mqt-llava (ask examples|cost)", line)
    ]
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0 and result.stdout.strip(), result.output


def test_the_first_command_answers_right_and_worse_with_fewer_tokens():
    answers = [
        CliRunner().invoke(
            app, ["ask", str(ROOT / "examples" / "scene.png"), "List everything.", "--num-visual-tokens", str(m)]
        )
        for m in (64, 1)
    ]
    assert answers[0].stdout.strip() == SCENE
    assert answers[1].stdout.strip() != SCENE
