"""`mqt-llava serve`: transformers' own server, with the shipped checkpoint."""

import subprocess
import sys

import pytest
import requests
from openai import InternalServerError, OpenAI
from PIL import Image
from transformers import AutoProcessor

import mqt_llava
from tests.serving.common import answer_with_transformers, serving
from tests.serving.test_server import as_url, content


pytestmark = pytest.mark.vllm  # for the web server's packages, which vLLM brings
QUESTION = "List everything."


@pytest.fixture(scope="module")
def address():
    with serving([sys.executable, "-m", "mqt_llava.cli", "serve", "--device", "cpu", "--dtype", "float32"]) as (
        address,
        _,
    ):
        yield address


def test_answers_are_those_of_generate(address, pictures):
    client = OpenAI(base_url=f"{address}/v1", api_key="none")  # the server hangs up after an error: tried again
    messages = [{"role": "user", "content": content([as_url(Image.open(pictures[0]))], QUESTION)}]

    def ask(**chat_template_kwargs):
        completion = client.chat.completions.create(
            model=mqt_llava.TINY_CHECKPOINT,
            messages=messages,
            temperature=0,
            max_tokens=24,
            extra_body={"chat_template_kwargs": chat_template_kwargs},
        )
        return completion.choices[0].message.content

    num_visual_tokens = (1, 4, 64, None)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    samples = [{"prompt": prompt, "images": pictures[:1], "num_visual_tokens": m} for m in num_visual_tokens]
    processor = AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT)
    expected = [
        processor.decode(answer, skip_special_tokens=True)
        for answer in answer_with_transformers(mqt_llava.TINY_CHECKPOINT, samples)
    ]
    found = [ask(num_visual_tokens=m) if m else ask() for m in num_visual_tokens]
    assert found == expected and len(set(found)) > 2
    with pytest.raises(InternalServerError):  # the server gives no reasons, but goes on
        ask(num_visual_tokens=0)
    assert ask() == expected[-1]
    assert requests.get(f"{address}/health", timeout=5).ok


def test_load_in_8bit():
    """The server answers with a quantized language model, as `ask` does."""
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "mqt_llava.cli", "serve", "--device", "cpu", "--load-in-8bit"]
    with serving(command) as (address, _):
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        picture = Image.open("examples/scene.png")
        completion = client.chat.completions.create(
            model=mqt_llava.TINY_CHECKPOINT,
            messages=[{"role": "user", "content": content([as_url(picture)], QUESTION)}],
            temperature=0,
            max_tokens=24,
        )
        found = completion.choices[0].message.content
    command = [sys.executable, "-m", "mqt_llava.cli", "ask", "examples/scene.png", QUESTION, "--load-in-8bit"]
    result = subprocess.run([*command, "--max-new-tokens", "24"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert found.strip() == result.stdout.strip()


def test_options_that_exclude_each_other():
    command = [sys.executable, "-m", "mqt_llava.cli", "serve", "--device", "cpu", "--load-in-8bit", "--load-in-4bit"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (
        result.returncode == 2 and "Error: --load-in-4bit and --load-in-8bit are mutually exclusive" in result.stderr
    )
