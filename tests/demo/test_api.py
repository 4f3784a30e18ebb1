"""The page as programs see it, through `gradio_client`; and as a Space."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from mqt_llava import TINY_CHECKPOINT
from mqt_llava.cli.conversation import AnswerStreamer
from mqt_llava.demo.space import write_space
from tests.demo.conftest import ROOT, SCENE
from tests.documentation import run_python


pytestmark = pytest.mark.demo

QUESTION = "List everything."


def connect(address):
    return Client(address, verbose=False, httpx_kwargs={"timeout": 120})  # machines of tests are busy


@pytest.fixture
def client(address):
    return connect(address)


@pytest.fixture
def upload(tmp_path):
    """A file of these bytes, as a client sends it."""

    def make(content: bytes, name="picture.png"):
        path = tmp_path / name
        path.write_bytes(content)
        return handle_file(str(path))

    return make


def test_endpoints_are_documented(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/ask", "/compare", "/explain"}
    parameters = [parameter["parameter_name"] for parameter in endpoints["/ask"]["parameters"]]
    assert parameters == ["image", "question", "num_visual_tokens", "history", "auto"]
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_answers_stream_and_agree_with_the_command_line(client, answers):
    job = client.submit(handle_file(str(SCENE)), QUESTION, 16, api_name="/ask")
    result = job.result()
    *_, expected = answers.ask(str(SCENE), QUESTION, 16)
    for name in ("answer", "num_visual_tokens", "prompt_tokens", "new_tokens", "flops", "kv_cache_bytes"):
        assert result[name] == expected[name]
    parts = [part["answer"] for part in job.outputs()]
    assert len(parts) > 3 and all(result["answer"].startswith(part) for part in parts)


def test_code_of_the_docs_runs(address, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_python("docs/demo.md", {"http://127.0.0.1:7860": address})


def test_history_makes_a_conversation(client, answers):
    first = client.predict(handle_file(str(SCENE)), "How many things are there?", api_name="/ask")["answer"]
    history = [{"role": "user", "content": "How many things are there?"}, {"role": "assistant", "content": first}]
    second = client.predict(handle_file(str(SCENE)), QUESTION, history=history, api_name="/ask")
    *_, expected = answers.ask(str(SCENE), QUESTION, history=history)
    assert second["answer"] == expected["answer"]
    assert second["prompt_tokens"] == expected["prompt_tokens"]


def test_compare(client, answers):
    rows = client.predict(handle_file(str(SCENE)), QUESTION, api_name="/compare")
    assert [row["num_visual_tokens"] for row in rows] == answers.compared
    assert [row["answer"] for row in rows] == [row["answer"] for row in answers.compare(str(SCENE), QUESTION)]


def test_explain(client, answers):
    result = client.predict(handle_file(str(SCENE)), "What is at the top left?", 64, api_name="/explain")
    assert result["words"] == result["answer"].split()
    assert sum(map(sum, result["heat"])) == pytest.approx(1, abs=1e-3)
    assert len(result["heat_of_words"]) == len(result["words"])


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"no picture at all", "picture.png", "Not an image"),
        (SCENE.read_bytes()[:2000], "picture.png", "Damaged or truncated"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture.svg", "Not an image"),
    ],
)
def test_wrong_files_are_refused_by_name(client, upload, content, name, said):
    with pytest.raises(AppError, match=said):
        client.predict(upload(content, name), QUESTION, api_name="/ask")
    assert client.predict(handle_file(str(SCENE)), QUESTION, api_name="/ask")["answer"]


def test_huge_pictures_are_refused_or_made_smaller(client, answers, tmp_path):
    Image.new("1", (40000, 40000)).save(tmp_path / "bomb.png")
    with pytest.raises(AppError, match="Too many pixels"):
        client.predict(handle_file(str(tmp_path / "bomb.png")), QUESTION, api_name="/ask")
    Image.new("RGB", (5000, 4500), (200, 45, 45)).save(tmp_path / "large.png")
    result = client.predict(
        handle_file(str(tmp_path / "large.png")), "What colour is the background?", api_name="/ask"
    )
    assert result["answer"] == "Red."
    assert max(next(reversed(answers.pictures.values())).image.size) <= 4096


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 3000}, "3000 characters"),
        ({"question": "an <image>"}, "must not contain &lt;image&gt;"),
        ({"num_visual_tokens": 0}, "less than minimum"),
        ({"num_visual_tokens": 65}, "greater than maximum"),
        ({"history": [{"role": "assistant", "content": "I begin."}]}, "must alternate"),
        ({"history": [{"role": "user", "content": "What?"}]}, "must end with an answer"),
        ({"history": "What?"}, "must alternate"),
        ({"image": None}, "Choose a picture first"),
    ],
)
def test_mistakes_are_messages(client, arguments, said):
    arguments = {"image": handle_file(str(SCENE)), "question": QUESTION} | arguments
    with pytest.raises(AppError, match=said):
        client.predict(**arguments, api_name="/ask")


def test_nobody_reads_files_of_the_machine(client, address):
    secret = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception):  # which one is Gradio's affair
        client.predict(secret, QUESTION, api_name="/ask")
    assert httpx.get(f"{address}gradio_api/file=/etc/hostname").status_code == 403
    assert httpx.get(f"{address}gradio_api/file={ROOT / 'setup.cfg'}").status_code == 403


def test_two_users_at_once(address, answers):
    """Each gets the answer to the own question about the own picture, with the own number of visual tokens."""
    pictures = sorted((ROOT / "mqt_llava" / "demo" / "pictures").glob("*.png"))[:2]
    requests = [(str(picture), m) for picture in pictures for m in (1, 64)]
    results = {}

    def ask(index, picture, m):
        results[index] = connect(address).predict(handle_file(picture), QUESTION, m, api_name="/ask")["answer"]

    threads = [threading.Thread(target=ask, args=(index, *request)) for index, request in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [list(answers.ask(picture, QUESTION, m))[-1]["answer"] for picture, m in requests]
    assert [results[index] for index in range(len(requests))] == expected
    assert len(set(expected)) > 2


def test_who_leaves_ends_the_answer_and_the_next_is_served(address, answers, client, monkeypatch):
    """A client whose connection breaks in the middle of an answer."""
    made, put = [], AnswerStreamer.put

    def slow(self, ids):
        made.append(1)
        time.sleep(0.3)
        put(self, ids)

    monkeypatch.setattr(AnswerStreamer, "put", slow)
    leaver = connect(address)
    job = leaver.submit(handle_file(str(SCENE)), QUESTION, 64, api_name="/ask")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    time.sleep(3)
    number = len(made)
    time.sleep(2)
    assert len(made) == number < 14  # no token after it was cancelled
    monkeypatch.undo()
    assert client.predict(handle_file(str(SCENE)), QUESTION, 64, api_name="/ask")["answer"]


def test_page_is_private(address):
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False
    page = httpx.get(address).text
    loaded = re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["'](https?://[^"']+)""", page)
    assert not loaded


def test_space_runs(tmp_path):
    """Another process, in the Space's folder, with the package that the Space carries."""
    folder = tmp_path / "space"
    assert write_space(folder) == ["README.md", "app.py", "mqt_llava", "requirements.txt"]
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (card["sdk"], card["app_file"], card["title"]) == ("gradio", "app.py", "MQT-LLaVA")
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("transformers") for line in requirements)
    assert not any("extra" in line for line in requirements)
    code = f"""
import json, app, mqt_llava
from gradio_client import Client, handle_file
_, address, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.settings())
client = Client(address, verbose=False, httpx_kwargs={{"timeout": 120}})
answer = client.predict(handle_file({str(SCENE)!r}), "What is at the top left?", api_name="/ask")["answer"]
print(json.dumps([mqt_llava.__file__, app.spaces is None, answer]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, _, answer = json.loads(run.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(folder)
    assert answer == "A dog."
    with pytest.raises(ValueError, match="not empty"):
        write_space(folder)


def test_space_of_a_model_on_the_hub(tmp_path):
    write_space(tmp_path / "space", "org/model")
    assert "from_pretrained('org/model')" in (tmp_path / "space" / "app.py").read_text()
    assert not (tmp_path / "space" / "mqt_llava" / "checkpoints").exists()
    with pytest.raises(ValueError, match="push it first"):
        write_space(tmp_path / "other", TINY_CHECKPOINT)
    assert not (tmp_path / "other").exists()
