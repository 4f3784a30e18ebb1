"""README and docs/: their code runs as written, and what they name is there."""

import configparser
import re
import shlex
import shutil
from runpy import run_path

import pytest
import torch
from typer.testing import CliRunner

from mqt_llava.cli import app
from tests.documentation import PAGES, ROOT, blocks, run_python, text_of


SCENE = "A bear, a dog, a fish and the number 7."  # what examples/scene.png shows
ELSEWHERE = {"docs/demo.md", "docs/trl.md"}  # run by tests/demo/test_api.py and tests/mqt_llava/test_trl.py
RUN = r"mqt-llava (ask examples|cost|evaluate questions.json|explain examples)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands and code run: a folder with the examples, and questions about them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "images").symlink_to("examples")
    [questions] = blocks("docs/evaluate.md", "json")
    (tmp_path / "questions.json").write_text(questions, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE])
def test_python_blocks_run(page, folder, capsys):
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # put back at the end
        namespace = run_python(page)
    printed = capsys.readouterr().out.splitlines()
    if page in ("README.md", "docs/ask.md"):
        assert [line.split()[0] for line in printed[:3]] == ["64", "16", "1"]
        assert printed[0] == f"64 {SCENE}"
    if page == "docs/ask.md":
        assert printed[3] == str([" Yes.", " Four."])  # the batch
        assert printed[4].strip() == SCENE  # the pipeline
    if page == "docs/auto.md":
        assert printed[0].startswith("tensor([")
    if page == "docs/budgets.md":
        assert namespace["logits"].equal(namespace["same"])
        assert namespace["few"]["input_ids"].equal(namespace["few_again"]["input_ids"])


def commands(page: str) -> list[list[str]]:
    """The command lines of the page's blocks, word by word."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(command) for line in lines for command in line.split("&&")]


ALL_COMMANDS = sorted({shlex.join(command): None for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", [command for command in ALL_COMMANDS if re.match(RUN, command)])
def test_command_runs(command, folder):
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0 and result.stdout.strip(), result.output


def test_commands_have_their_options():
    """Those that are not run: they need a GPU, the Hub or days."""
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    helps, checked = {}, 0
    for command in map(shlex.split, ALL_COMMANDS):
        options = [word for word in command if word.startswith("--")]
        if command[0] != "mqt-llava":
            continue
        name = command[1]
        assert name in known
        if options and name not in helps:
            result = CliRunner().invoke(app, [name, "--help-all"], env={"COLUMNS": "200"})
            if result.exit_code:
                result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
            assert result.exit_code == 0, result.output
            helps[name] = result.stdout
        for option in options:
            assert re.search(rf"{option}\b(?!-)", helps[name]), f"mqt-llava {name} has no {option}"
            checked += 1
    assert len(helps) >= 9 and checked >= 25


def test_scripts_have_their_options():
    checked = 0
    for command in map(shlex.split, ALL_COMMANDS):
        if command[0] == "python" and not command[2].startswith("vllm."):
            path = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
            source = (ROOT / path).read_text(encoding="utf-8")
            for option in (word for word in command if word.startswith("--")):
                assert f'"{option}"' in source, f"{path} has no {option}"
                checked += 1
    assert checked >= 3


def test_paths_and_extras_are_there():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = "benchmarks|conversion|docs|examples|modeling|mqt_llava|recipes|tests"
    for page in PAGES:
        text = text_of(page)
        for path in set(re.findall(rf"[` ]((?:{folders})/[\w./-]*\w)", text)):
            assert (ROOT / path).exists(), f"{page} names {path}"
        for extra in re.findall(r'"\.\[([\w,]+)\]"', text):
            assert set(extra.split(",")) <= set(config["options.extras_require"]), f"{page} installs [{extra}]"


def test_links_of_the_readme_lead_somewhere():
    """Those of docs/ are checked by `mkdocs build --strict`."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text_of("README.md")) if "://" not in link]
    assert len(links) > 15
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / (path or "README.md")).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)", text_of(path or "README.md"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_ci_runs_the_command_of_the_readme():
    [command] = [block.strip() for block in blocks("README.md", "bash") if "pytest" in block]
    assert f"command='{command}'" in text_of(".ci/run").splitlines()


def test_readme_is_one_page():
    assert len(text_of("README.md").splitlines()) <= 150


def test_figure_of_the_design_is_drawn(tmp_path):
    draw = run_path(str(ROOT / "docs" / "images" / "model.py"))["draw"]
    draw(tmp_path / "model.svg")
    drawn, kept = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "model.svg", ROOT / "docs/images/model.svg")
    )
    assert drawn.count("<path") == kept.count("<path")


def test_the_first_command_answers_right_and_worse_with_fewer_tokens():
    answers = [
        CliRunner().invoke(
            app, ["ask", str(ROOT / "examples" / "scene.png"), "List everything.", "--num-visual-tokens", str(m)]
        )
        for m in (64, 1)
    ]
    assert answers[0].stdout.strip() == SCENE
    assert answers[1].stdout.strip() != SCENE
