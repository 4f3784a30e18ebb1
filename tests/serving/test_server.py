"""The OpenAI-compatible server: right answers at every m, and 4xx for whatever is wrong with a request."""

import base64
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from openai import BadRequestError, OpenAI
from PIL import Image

from tests.serving.common import MAX_NEW_TOKENS, ROOT, answer_with_transformers, server


pytestmark = pytest.mark.vllm
NUM_VISUAL_TOKENS = (1, 2, 4, 16, 64, None)
QUESTION = "List everything."


@pytest.fixture(scope="module")
def address(tiny):
    options = ["--trust-request-mm-kwargs", "--dtype", "float32", "--enforce-eager", "--max-model-len", 1024]
    options += ["--limit-mm-per-prompt", json.dumps({"image": 3})]
    with server(tiny, *options) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def as_url(image, format="PNG"):
    """A picture, or a file's bytes, as a data URL."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format)
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def content(urls, text):
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


@pytest.fixture(scope="module")
def urls(pictures):
    return [as_url(Image.open(path)) for path in pictures]


def ask(client, messages, m=None, **options):
    """The answer, and how many tokens the prompt had."""
    if m is not None:
        options["extra_body"] = {"mm_processor_kwargs": {"num_visual_tokens": m}}
    completion = client.chat.completions.create(
        model="mqt-llava", messages=messages, temperature=0, max_tokens=MAX_NEW_TOKENS, **options
    )
    return completion.choices[0].message.content, completion.usage.prompt_tokens


def expected_answers(tiny, prompts):
    """What `generate` answers to `(prompt, images, m)`, as text."""
    from transformers import AutoProcessor

    samples = [{"prompt": prompt, "images": list(images), "num_visual_tokens": m} for prompt, images, m in prompts]
    processor = AutoProcessor.from_pretrained(tiny, trust_remote_code=True)
    answers = answer_with_transformers(tiny, samples)
    return [processor.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.fixture(scope="module")
def expected(tiny, pictures):
    prompts = [(f"USER: <image>\n{QUESTION} ASSISTANT:", pictures[:1], m) for m in NUM_VISUAL_TOKENS]
    return dict(zip(NUM_VISUAL_TOKENS, expected_answers(tiny, prompts)))


def test_every_m(client, urls, expected):
    """The prompt's length tells that m arrived in the prompt, and tests.serving.test_engine that it did in the encoder."""
    messages = [{"role": "user", "content": content(urls[:1], QUESTION)}]
    found = {m: ask(client, messages, m) for m in NUM_VISUAL_TOKENS}
    assert {m: answer for m, (answer, _) in found.items()} == expected
    shortest = found[1][1]
    assert {m: tokens for m, (_, tokens) in found.items()} == {m: shortest + (m or 64) - 1 for m in NUM_VISUAL_TOKENS}


def test_many_at_once(client, urls, expected):
    messages = [{"role": "user", "content": content(urls[:1], QUESTION)}]
    num_visual_tokens = NUM_VISUAL_TOKENS * 8
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda m: ask(client, messages, m)[0], num_visual_tokens))
    assert found == [expected[m] for m in num_visual_tokens]


def test_several_images_text_only_and_history(client, tiny, pictures, urls):
    history = [
        {"role": "user", "content": content(urls[:1], "Is there a dog?")},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": QUESTION},
    ]
    cases = [
        (
            f"USER: <image>\n<image>\n{QUESTION} ASSISTANT:",
            pictures[:2],
            [{"role": "user", "content": content(urls[:2], QUESTION)}],
            7,
        ),
        ("USER: What is there? ASSISTANT:", [], [{"role": "user", "content": "What is there?"}], None),
        (f"USER: <image>\nIs there a dog? ASSISTANT: Yes.</s>USER: {QUESTION} ASSISTANT:", pictures[:1], history, 16),
    ]
    expected = expected_answers(tiny, [(prompt, images, m) for prompt, images, _, m in cases])
    assert [ask(client, messages, m)[0] for _, _, messages, m in cases] == expected


def test_streaming(client, urls, expected):
    stream = client.chat.completions.create(
        model="mqt-llava",
        messages=[{"role": "user", "content": content(urls[:1], QUESTION)}],
        temperature=0,
        max_tokens=MAX_NEW_TOKENS,
        stream=True,
        extra_body={"mm_processor_kwargs": {"num_visual_tokens": 4}},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected[4] and sum(map(bool, pieces)) > 5


def test_an_image_is_served_after_a_request_with_it_was_refused(client, tiny, pictures, tmp_path):
    """vLLM prepares the image before it finds the prompt too long, and keeps it in one of its two caches."""
    path = tmp_path / "new.png"
    Image.open(pictures[0]).rotate(90).save(path)
    url = as_url(Image.open(path))
    with pytest.raises(BadRequestError, match="maximum context length"):
        ask(client, [{"role": "user", "content": content([url], "a " * 1200)}], 16)
    (expected,) = expected_answers(tiny, [(f"USER: <image>\n{QUESTION} ASSISTANT:", [str(path)], 16)])
    assert ask(client, [{"role": "user", "content": content([url], QUESTION)}], 16)[0] == expected


def test_the_example(address, pictures):
    command = [sys.executable, "examples/serve_vllm.py", pictures[0], QUESTION, "--num_visual_tokens", "64", "1"]
    run = subprocess.run([*command, "--url", f"{address}/v1"], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, background = run.stdout.splitlines()
    assert first.startswith("m = 64: A bear, a dog,") and second.startswith("m = 1: A bear,") and background.strip()


@pytest.mark.parametrize("schedule, m", [(["1:1.0", "64"], 64), (["1:0.0", "64"], 1)])
def test_the_example_asks_with_as_many_as_needed(address, pictures, schedule, m):
    command = [sys.executable, "examples/serve_vllm.py", pictures[0], QUESTION, "--url", f"{address}/v1"]
    answers = {}
    for way in (["--num_visual_tokens", "auto", "--schedule", *schedule], ["--num_visual_tokens", str(m)]):
        run = subprocess.run([*command, *way], cwd=ROOT, capture_output=True, text=True, check=True)
        name, _, answer = run.stdout.splitlines()[0].partition(": ")
        answers[name] = answer.partition("  (")[0]
    assert list(answers) == [f"m = auto, {m}", f"m = {m}"]
    assert len(set(answers.values())) == 1


def kwargs(**values):
    return {"mm_processor_kwargs": values}


def images(*pictures):
    return {"urls": [as_url(picture) for picture in pictures]}


HOSTILE = {
    "m = 0": kwargs(num_visual_tokens=0),
    "m = M + 1": kwargs(num_visual_tokens=65),
    "m = -1": kwargs(num_visual_tokens=-1),
    "m = 'x'": kwargs(num_visual_tokens="x"),
    "m = '4'": kwargs(num_visual_tokens="4"),
    "m = 2.5": kwargs(num_visual_tokens=2.5),
    "m = 4.0": kwargs(num_visual_tokens=4.0),
    "m = 'auto'": kwargs(num_visual_tokens="auto"),  # a request is known by its m
    "m = true": kwargs(num_visual_tokens=True),
    "m = [4]": kwargs(num_visual_tokens=[4]),
    "m = [4, 5]": kwargs(num_visual_tokens=[4, 5]),
    "m = {}": kwargs(num_visual_tokens={"m": 4}),
    "nested m = M + 1": kwargs(images_kwargs={"num_visual_tokens": 65}),
    "nested list": kwargs(images_kwargs={"num_visual_tokens": [4]}),
    "nested unknown": kwargs(images_kwargs={"visual_tokens": 4}),
    "nested no mapping": kwargs(images_kwargs="x"),
    "no mapping": {"mm_processor_kwargs": "x"},
    "unknown": kwargs(visual_tokens=4),
    "misspelt": kwargs(num_visual_token=4),
    "max_visual_tokens": kwargs(max_visual_tokens=4),
    "num_query_tokens": kwargs(num_query_tokens=400, num_visual_tokens=300),
    "image_side": kwargs(image_side=48, size={"height": 48, "width": 48}),
    "image_token": kwargs(image_token="a"),
    "chat_template": kwargs(chat_template="x"),
    "subfolder": kwargs(subfolder="x"),
    "cache_dir": kwargs(cache_dir="x"),
    "revision": kwargs(revision="x"),
    "trust_remote_code": kwargs(trust_remote_code=False),
    "crop_size": kwargs(crop_size={"height": 48, "width": 48}),
    "crop_size and crop": kwargs(crop_size={"height": 48, "width": 48}, do_center_crop=True),
    "nested crop_size": kwargs(images_kwargs={"crop_size": {"height": 48, "width": 48}}),
    "small size": kwargs(size={"height": 48, "width": 48}),
    "large size": kwargs(size={"height": 100_000, "width": 100_000}),
    "shortest edge": kwargs(size={"shortest_edge": 96}),
    "no resize": kwargs(do_resize=False),
    "mean of two": kwargs(image_mean=[0, 0]),
    "no deviation": kwargs(image_std=[0, 0, 0]),
    "rescale by text": kwargs(rescale_factor="x"),
    "truncation": kwargs(truncation=True, max_length=5),
    "text": kwargs(text="x"),
    "images": kwargs(images=None),
    "return_tensors": kwargs(return_tensors="np"),
    "no image": {"urls": [as_url(b"no image")]},
    "cut image": {"urls": [as_url(Image.effect_noise((64, 64), 50))[:2001]]},
    "no base64": {"urls": ["data:image/png;base64,%%%"]},
    "endless row": images(Image.new("L", (80_000_000, 1))),
    "endless column": images(Image.new("L", (1, 80_000_000))),
    "tall image padded by another mean": images(Image.new("L", (500, 60_000))) | kwargs(image_mean=[0.1] * 3),
    "placeholders already expanded": {"text": "<image>" * 4 + QUESTION} | kwargs(num_visual_tokens=4),
    "two placeholders for one image": {"text": f"<image>\n{QUESTION}"},
    "placeholder without image": {"text": f"<image>\n{QUESTION}", "urls": []},
    "placeholder in a string": {"messages": [{"role": "user", "content": f"<image>\n{QUESTION}"}]},
    "image of the assistant": {
        "messages": [{"role": "assistant", "content": content([as_url(Image.new("L", (9, 9)))], "x")}]
    },
    "unknown role": {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]},
    "4 images": images(*[Image.new("L", (9, 9))] * 4),
    "1000 images": images(*[Image.new("L", (9, 9))] * 1000),
    "too long": {"text": "a " * 1200},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_request(address, client, urls, expected, case):
    """Refused with a text that says why, and the next request is answered as if nothing had been."""
    request = dict(HOSTILE[case])
    message = {"role": "user", "content": content(request.pop("urls", urls[:1]), request.pop("text", QUESTION))}
    body = {"model": "mqt-llava", "messages": [message], "temperature": 0, "max_tokens": 8} | request
    response = requests.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert 400 <= response.status_code < 500, response.text
    told = response.json()["error"]["message"]
    assert len(told) > 10
    for name in set(request.get("mm_processor_kwargs", {})) & {"num_visual_tokens", "crop_size", "visual_tokens"}:
        assert name in told or "must not contain <image>" in told
    assert ask(client, [{"role": "user", "content": content(urls[:1], QUESTION)}], 4)[0] == expected[4]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (13_000, 13_000)])
def test_images_of_any_size_are_answered(client, urls, size):
    answer, _ = ask(client, [{"role": "user", "content": content([as_url(Image.new("L", size))], QUESTION)}], 4)
    assert answer


def test_a_decompression_bomb_leaves_the_server_alive(address, client, urls, expected):
    """vLLM opens images before our code sees them, and calls PIL's refusal an error of its own: 500."""
    body = {
        "model": "mqt-llava",
        "messages": [{"role": "user", "content": content([as_url(Image.new("1", (30_000, 30_000)))], "?")}],
    }
    response = requests.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code >= 400 and "decompression bomb" in response.json()["error"]["message"]
    assert ask(client, [{"role": "user", "content": content(urls[:1], QUESTION)}], 4)[0] == expected[4]
