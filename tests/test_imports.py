"""Whatever is imported is declared, where those who need it install it: nothing rests on what a dependency happens to bring."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
OWN = {"benchmarks", "examples", "mqt_llava", "recipes", "tests"}
# In environments of their own, which bring these
HOSTS = {
    "mqt_llava/evaluation/lmms.py": {"lmms_eval", "loguru"},
    "mqt_llava/evaluation/manifest.py": {"lmms_eval"},
    "examples/vlmevalkit.py": {"vlmeval"},
    "tests/evaluation": {"lmms_eval", "pandas"},
    "tests/demo": {"axe_playwright_python", "gradio_client", "httpx", "playwright"},
}
# Distributions that may not be installed here
DISTRIBUTIONS = {"bitsandbytes": "bitsandbytes", "openai": "openai", "torchao": "torchao", "vllm": "vllm"}


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """The distributions that setup.cfg asks for with these extras, those of the extras that they name included."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    found, wanted = set(), [settings["options"]["install_requires"]]
    wanted += [settings["options.extras_require"][extra] for extra in extras]
    while wanted:
        for requirement in wanted.pop().split():
            name, _, more = re.match(r"([\w.-]+)(\[([\w,-]+)\])?", requirement).groups()
            if name == "mqt-llava":
                wanted += [settings["options.extras_require"][extra] for extra in more.split(",")]
            else:
                found.add(normalized(name))
    return found


def imports(path):
    """The modules that a file imports: those when it is imported itself, and those within functions or for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    at_once, later = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            (later if id(node) in within else at_once).add(name.partition(".")[0])
    return at_once, later


def undeclared(folder, at_once, later):
    """What the files of a folder import, and is in none of the distributions that they may import at once or later."""
    distributions = packages_distributions()
    found = []
    for path in sorted(ROOT.joinpath(folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.is_symlink():
            continue
        hosts = {module for place in HOSTS if name.startswith(place) for module in HOSTS[place]}
        for modules, allowed in zip(imports(path), (at_once, at_once | later)):
            for module in sorted(modules - sys.stdlib_module_names - OWN - hosts):
                providers = {normalized(n) for n in distributions.get(module, [DISTRIBUTIONS.get(module, module)])}
                if not providers & allowed:
                    found.append(f"{name}: {module}")
    return found


USERS = ("convert", "demo", "evaluate", "plot", "quantize", "serve", "train")


@pytest.mark.parametrize(
    "folder, extras",
    [
        ("modeling", ()),
        ("conversion", ()),
        ("mqt_llava/cli", ()),
        ("mqt_llava/demo", ("demo", "plot")),
        ("mqt_llava/training", ("train",)),
        ("mqt_llava/evaluation", ("evaluate",)),
        ("examples", ("train", "evaluate", "serve")),
        ("recipes", ("test",)),
        ("benchmarks", ("test", "quantize", "serve")),
        ("tests", ("test", "serve", "demo")),
    ],
)
def test_imports_are_declared(folder, extras):
    """At once with the extras of a folder; within functions, which say what is missing, with any that users may choose."""
    later = () if folder == "modeling" else USERS
    assert not undeclared(folder, declared(*extras), declared(*later))


def test_imports_of_the_package_are_declared():
    folders = ("cli", "demo", "evaluation", "training")
    found = undeclared("mqt_llava", declared(), declared(*USERS))
    assert not [line for line in found if line.split("/")[1] not in folders]


def test_finds_what_is_not_declared(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "module.py").write_text(
        "import os, yaml\n\ndef f():\n    from hypothesis.strategies import text\n"
    )
    assert undeclared("new", {"numpy"}, {"hypothesis"}) == ["new/module.py: yaml"]
    assert undeclared("new", {"pyyaml"}, set()) == ["new/module.py: hypothesis"]


def test_dependencies_are_pinned():
    """In constraints.txt, apart from those of servers, which tests/serving/requirements.txt pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalized(line.partition("==")[0]) for line in lines}
    assert declared("test", *USERS) - declared("serve") | declared() <= pinned


def test_tools_have_one_version():
    """ruff, in pre-commit as in constraints.txt."""
    pin = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    configuration = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"ruff-pre-commit\n    rev: v{pin}\n" in configuration
