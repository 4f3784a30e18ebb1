"""Model cards, and pushing to a stand-in of the Hub's HTTP interface."""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from mqt_llava import cli
from mqt_llava.conversion import convert
from mqt_llava.cost import CostModel
from mqt_llava.hub import write_card
from tests.small_model import make_images, make_model, make_processor


REPO = "someone/mqt-llava-test"


# --- cards ---


def test_metadata(converted, tmp_path):
    shutil.copyfile(converted / "config.json", tmp_path / "config.json")
    bases = ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336", "clip", "/a/folder", str(converted)]
    path = write_card(tmp_path, REPO, "llama2", bases, ["liuhaotian/LLaVA-Instruct-150K"], origin="Made by a test.")
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "license": "llama2",
        "base_model": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mqt_llava", "llava", "matryoshka", "custom_code"],
        "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
        "language": ["en"],
    }
    assert "# mqt-llava-test\n" in card.text and "Made by a test." in card.text and "from 1 to 256" in card.text
    assert f'repo = "{REPO}"' in card.text and "{{" not in card.text and "{%" not in card.text
    assert "Accuracy" not in card.text


def test_card_without_license_or_bases(converted, tmp_path):
    shutil.copyfile(converted / "config.json", tmp_path / "config.json")
    data = ModelCard.load(write_card(tmp_path, REPO)).data
    assert data.license is None and data.base_model is None


def test_what_the_command_line_says(authors, tmp_path):
    options = ["--license", "mit", "--dataset", "a/one", "--dataset", "b/two", "--language", "de", "--json"]
    result = CliRunner().invoke(cli.app, ["convert", str(authors), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.datasets, data.language) == ("mit", ["a/one", "b/two"], ["de"])


def test_accuracy_and_compute(tmp_path):
    make_model().save_pretrained(tmp_path)
    accuracy = {m: {"all": 50.0 + int(m), "count": 30.25} for m in ("1", "4", "16")}
    controls = {"16, no picture": {"all": 12.0, "count": 10.0}}
    (tmp_path / "accuracy.json").write_text(json.dumps(accuracy | controls))
    card = write_card(tmp_path, REPO).read_text()
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert rows[0] == ["m", "all", "count", "GFLOP to the first token"]
    costs = CostModel(make_model().config)
    assert rows[2:] == [[str(m), f"{50 + m:.1f}", f"{30.25:.1f}", f"{costs(m).flops / 1e9:.2f}"] for m in (1, 4, 16)]


def test_snippet_runs_as_written(tmp_path, monkeypatch, capsys):
    """From the folder where `photo.jpg` and the checkpoint are."""
    monkeypatch.chdir(tmp_path)
    model, processor = make_model(), make_processor()
    model.save_pretrained("my-model")
    processor.save_pretrained("my-model")
    make_images(1)[0].save("photo.jpg")
    card = write_card(Path("my-model"), "my-model").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    capsys.readouterr()
    exec(snippet, {})
    turns = [{"role": "user", "content": "<image>\nWhat is in the picture?"}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=Image.open("photo.jpg"), text=prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, num_visual_tokens=16, max_new_tokens=64)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"


# --- the Hub ---


class Hub(http.server.BaseHTTPRequestHandler):
    """What `create_repo`, `create_branch`, `upload_folder` and `ModelCard.load` need of the Hub."""

    cards = {}  # repository: its README.md

    def log_message(self, *args):
        pass

    def answer(self, content=None, status=200, headers=()):
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(r"/(.+/.+)/resolve/[^/]+/README\.md", self.path.partition("?")[0])
        if match and match[1] in self.cards:
            headers = [("ETag", '"0"'), ("X-Repo-Commit", "0" * 40)]
            return self.answer(self.cards[match[1]].encode(), headers=headers)
        return self.answer({"error": "not found"}, 404, [("X-Error-Code", "RepoNotFound")])

    def do_POST(self):
        server, body, path = self.server, self.body(), self.path.partition("?")[0]
        here = f"http://127.0.0.1:{server.server_port}"
        server.requests.append(f"{self.command} {path}")
        if path == "/api/repos/create":
            server.created = json.loads(body)
            return self.answer({"url": f"{here}/{REPO}", "name": REPO})
        if path == "/api/validate-yaml":
            server.validated = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(rf"/api/models/{REPO}/branch/(.+)", path):
            server.branch = match[1]
            return self.answer({}, 201)
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for name in files
            ]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{here}/lfs/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            kind = {"transfer": "basic", "objects": objects}
            return self.answer(kind, headers=[("Content-Type", "application/vnd.git-lfs+json")])
        if match := re.fullmatch(rf"/api/models/{REPO}/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            server.commits.append((match[1], lines))
            return self.answer({"commitUrl": f"{here}/{REPO}/commit/{'1' * 40}", "commitOid": "1" * 40})
        return self.answer({"error": f"unexpected {path}"}, 404)

    def do_PUT(self):
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests, server.commits, server.objects = [], [], {}
        server.created = server.branch = server.validated = None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_push(hub, authors, tmp_path, monkeypatch):
    monkeypatch.setitem(Hub.cards, "lmsys/vicuna-7b-v1.5", "---\nlicense: llama2\n---\n")
    options = ["--private", "--revision", "converted", "--commit-message", "From the authors"]
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_a_test",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "mqt_llava.cli", "convert", authors, tmp_path / "out", "--push-to-hub", REPO]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"pushed to http://127.0.0.1:{hub.server_port}/{REPO}" in done.stderr
    organization, name = REPO.split("/")
    assert (hub.created["organization"], hub.created["name"]) == (organization, name)
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.branch == "converted"
    ((revision, lines),) = hub.commits
    assert revision == "converted"
    (header,) = (line["value"] for line in lines if line["key"] == "header")
    assert header["summary"] == "From the authors"
    files = {line["value"]["path"]: line["value"] for line in lines if line["key"] in ("file", "lfsFile")}
    assert set(files) == {path.name for path in (tmp_path / "out").iterdir()}
    for path in (tmp_path / "out").iterdir():
        value = files[path.name]
        content = hub.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        assert content == path.read_bytes(), path.name
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "llama2" and card.data.base_model == ["lmsys/vicuna-7b-v1.5"]
    assert f'repo = "{REPO}"' in card.text
    assert "license: llama2" in hub.validated


# What follows needs no Hub: the tests run offline


def run(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments), "--push-to-hub", REPO])


def test_dry_run_lists_the_files(authors, tmp_path):
    result = run(authors, tmp_path / "out", "--dry-run", "--license", "apache-2.0")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    (line,) = result.stderr.splitlines()
    convert(str(authors), tmp_path / "out")
    expected = sorted([*(path.name for path in (tmp_path / "out").iterdir()), "README.md"])
    assert line == f"would push to {REPO}: {', '.join(expected)}"


def test_license_is_asked_for_before_any_work(authors, tmp_path):
    for arguments in ([], ["--dry-run"]):
        result = run(authors, tmp_path / "out", *arguments)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr == "Error: no base model states a license; name that of the model with --license\n"
    assert list(tmp_path.iterdir()) == []


def test_push_that_fails_keeps_the_result(authors, tmp_path):
    result = run(authors, tmp_path / "out", "--license", "mit")
    assert result.exit_code == 2
    assert re.fullmatch(rf"Error: {tmp_path}/out is converted, but cannot be pushed: [^\n]+\n", result.stderr)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    assert (tmp_path / "out" / "model.safetensors").exists()
