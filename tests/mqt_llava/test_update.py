"""`mqt-llava update`: today's code in a checkpoint that was saved with older code."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from typer.testing import CliRunner

import mqt_llava
from mqt_llava import cli, update
from mqt_llava.modeling.configuration_mqt_llava import AUTO_MAP
from tests.small_model import make_model, make_processor


OLD_CODE = {
    "configuration_mqt_llava.py": "raise RuntimeError('old code')\n",
    "modeling_mqt_llava.py": "raise RuntimeError('old code')\n",
    "processing_mqt_llava.py": "raise RuntimeError('old code')\n",
}
OLD_AUTO_MAP = {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": AUTO_MAP["AutoModel"]}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder as version 0.0.1 wrote it, which never was: its code is another one, and it named fewer classes."""
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    for path in tmp_path.glob("*_mqt_llava.py"):
        path.unlink()
    for name, code in OLD_CODE.items():
        (tmp_path / name).write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": OLD_AUTO_MAP, "own": "é"}))
    (tmp_path / "notes.txt").write_text("mine")
    versions = {name: [update._digest(code.encode())] for name, code in OLD_CODE.items()}
    monkeypatch.setitem(update.HISTORY, "0.0.1", versions)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["update", *map(str, arguments)])


LOAD = """
import sys
sys.modules["mqt_llava"] = None  # as where it is not installed
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **trust)
processor = AutoProcessor.from_pretrained(sys.argv[1], **trust)
print(model.generate(**processor(text="a", return_tensors="pt"), max_new_tokens=3, do_sample=False).tolist())
"""


def load_in_a_fresh_process(folder, code=LOAD):
    return subprocess.run([sys.executable, "-c", code, str(folder)], cwd=folder, capture_output=True, text=True)


def test_code_and_auto_map_are_replaced_and_nothing_else(old):
    assert "old code" in load_in_a_fresh_process(old).stderr
    before = contents(old)
    result = run(old)
    assert result.exit_code == 0, result.output
    after = contents(old)
    assert {name for name in after if after[name] != before.get(name)} == {*update.CODE, "config.json"}
    assert (
        before.keys() - after.keys() == set() and after.keys() - before.keys() == update.CODE.keys() - OLD_CODE.keys()
    )
    assert all(after[name] == path.read_bytes() for name, path in update.CODE.items())
    config = json.loads(after["config.json"])
    assert config.pop("auto_map") == AUTO_MAP
    assert config == {name: value for name, value in json.loads(before["config.json"]).items() if name != "auto_map"}
    answer = load_in_a_fresh_process(old)
    inputs = make_processor()(text="a", return_tensors="pt")
    assert answer.stdout.strip() == str(make_model().generate(**inputs, max_new_tokens=3, do_sample=False).tolist())

    lines = result.stdout.splitlines()
    assert any(line.startswith("budget_mqt_llava.py ") and line.endswith(" new") for line in lines)
    assert any(line.startswith("modeling_mqt_llava.py ") and "from 0.0.1, " in line for line in lines)
    assert any(line.startswith("config.json ") and "auto_map: AutoImageProcessor" in line for line in lines)
    assert lines[-1] == f"updated to mqt-llava {mqt_llava.__version__}: {old}"
    again = run(old)
    assert again.stdout == f"{old} has the code of mqt-llava {mqt_llava.__version__} already\n"
    assert contents(old) == after


def test_dry_run_changes_nothing(old):
    before = contents(old)
    result = run(old, "--dry-run")
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "nothing was written"
    assert "modeling_mqt_llava.py" in result.stdout and contents(old) == before


def test_edited_code_is_kept_without_force(old):
    (old / "modeling_mqt_llava.py").write_text(OLD_CODE["modeling_mqt_llava.py"] + "# my change\n")
    before = contents(old)
    result = run(old)
    assert result.exit_code == 2 and contents(old) == before
    assert (
        "modeling_mqt_llava.py in" in result.stderr
        and "edited by hand" in result.stderr
        and "--force" in result.stderr
    )
    assert run(old, "--force").exit_code == 0
    assert contents(old)["modeling_mqt_llava.py"] == update.CODE["modeling_mqt_llava.py"].read_bytes()


def test_line_ends_of_another_system_are_no_edit(old):
    for name, code in OLD_CODE.items():
        (old / name).write_bytes(code.replace("\n", "\r\n").encode())
    assert update.plan_update(str(old)).edited == []


def test_an_interrupted_update_leaves_the_old_code(old, monkeypatch):
    before, write = contents(old), type(old).write_bytes

    def full_disk(path, content):
        if path.name.startswith("processing"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(type(old), "write_bytes", full_disk)
    assert run(old).exit_code == 2
    monkeypatch.undo()
    assert contents(old) == before


def test_a_folder_without_code_gets_it(old):
    """As the shipped checkpoint, which leaves it to the package."""
    for name in OLD_CODE:
        (old / name).unlink()
    config, processor = (json.loads((old / name).read_text()) for name in ("config.json", "processor_config.json"))
    del config["auto_map"], processor["auto_map"]
    (old / "config.json").write_text(json.dumps(config))
    (old / "processor_config.json").write_text(json.dumps(processor))
    assert run(old).exit_code == 0
    assert load_in_a_fresh_process(old).returncode == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "llava"}, "is not an MQT-LLaVA checkpoint"),
        ({"auto_map": {"AutoConfig": "someone/other--configuration_mqt_llava.MQTLlavaConfig"}}, "someone/other"),
    ],
)
def test_what_has_no_code_of_ours_is_refused(old, settings, words):
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | settings))
    before = contents(old)
    result = run(old)
    assert result.exit_code == 2 and words in result.stderr and contents(old) == before


def test_a_repository_is_updated_in_one_commit(old, monkeypatch):
    commits = []

    def download(repo_id, name, **kwargs):
        assert repo_id == "someone/mqt" and kwargs["revision"] == "main"
        if not (old / name).exists():
            raise RemoteEntryNotFoundError(name, response=SimpleNamespace(headers={}, request=None, status_code=404))
        return str(old / name)

    def commit(api, repo_id, operations, **kwargs):
        commits.append(
            (repo_id, {operation.path_in_repo: operation.path_or_fileobj for operation in operations}, kwargs)
        )
        return SimpleNamespace(commit_url="https://hub/someone/mqt/commit/1")

    monkeypatch.setattr(update, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    before = contents(old)
    assert run("someone/mqt", "--revision", "main", "--dry-run").exit_code == 0 and not commits
    result = run("someone/mqt", "--revision", "main")
    assert result.exit_code == 0 and "https://hub/someone/mqt/commit/1" in result.stdout
    ((repo_id, files, kwargs),) = commits
    assert repo_id == "someone/mqt" and files.keys() == {*update.CODE, "config.json"}
    assert files["modeling_mqt_llava.py"] == update.CODE["modeling_mqt_llava.py"].read_bytes()
    assert kwargs == {"commit_message": f"Update the code to mqt-llava {mqt_llava.__version__}", "revision": "main"}
    assert contents(old) == before


def test_every_earlier_version_is_known():
    """Add the hashes of a version's code to code_history.json when the next one begins."""
    changelog = (update.CODE["modeling_mqt_llava.py"].parents[1] / "CHANGELOG.md").read_text()
    versions = [line.removeprefix("## ").split()[0] for line in changelog.splitlines() if line.startswith("## ")]
    assert versions[0] == mqt_llava.__version__ and versions[1:] == list(update.HISTORY)


def test_old_transformers_is_said_in_one_line(old):
    assert run(old).exit_code == 0
    for auto_class in ("AutoConfig", "AutoProcessor", "AutoImageProcessor"):
        code = f"""
import sys
sys.modules["mqt_llava"] = None
from transformers import {auto_class}
sys.modules["transformers"].__version__ = "5.18.3"
{auto_class}.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
        error = load_in_a_fresh_process(old, code).stderr.strip().splitlines()[-1]
        assert error == (
            f"ImportError: MQT-LLaVA {mqt_llava.__version__} needs transformers 5.19.0 or newer, but 5.18.3 is installed: "
            "pip install -U 'transformers>=5.19.0'"
        )
