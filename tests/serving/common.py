"""Starts vLLM, in processes of its own, and asks transformers the same."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = {"dtype": "float32", "max_model_len": 1024, "limit_mm_per_prompt": {"image": 3}}
MAX_NEW_TOKENS = 24


def make_requests(pictures, num_visual_tokens):
    """One picture at every m, several, adjacent ones, none, and a conversation that goes on."""
    first, second, third = pictures

    def request(*turns, images=(), m=None, separator="\n"):
        question, *others = turns
        prompt = f"USER: {('<image>' + separator) * len(images)}{question} ASSISTANT:"
        for number, turn in enumerate(others):
            prompt += f"USER: {turn} ASSISTANT:" if number % 2 else f" {turn}</s>"
        return {"prompt": prompt, "turns": turns, "images": images, "num_visual_tokens": m}

    few, some = num_visual_tokens[1], num_visual_tokens[3]
    return [
        *(request("List everything.", images=[first], m=m) for m in num_visual_tokens),
        *(request("What colour is the background?", images=[second], m=m) for m in (few, some)),
        request("List everything.", images=[first, second], m=some),
        request("List everything.", images=[third, first, first], m=few),
        request("What is there?"),
        request("Is there a dog?", "Yes.", "List everything.", images=[first], m=some),
        request("List everything.", images=[third, first, first], m=few, separator=""),
    ]


def answer_with_vllm(model, requests_, passes=("one by one",), adapter=None, **options):
    """
    Answers of vLLM's offline engine.

    Args:
        model (`Path`): the checkpoint's folder.
        requests_ (`list[dict]`): as [`make_requests`] makes them.
        passes (`tuple[str]`): all requests are asked so often: "one by one", "together" in one batch, or by "chat".
        adapter (`Path`, *optional*): a LoRA adapter to use for all of them.
        options: of vLLM's `LLM`.

    Returns:
        `dict`: "passes", the token ids of each pass's answers, and "rows", the number of visual tokens of each image that the
        encoder was given, as long as there is one process.
    """
    parallel = options.get("tensor_parallel_size", 1)
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(parallel > 1))}
    if parallel > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(parallel)))
    with tempfile.TemporaryDirectory() as folder:
        job, answers, log = (Path(folder) / name for name in ("job.json", "answers.json", "log.txt"))
        settings = {
            "model": str(model),
            "image_token_id": json.loads((Path(model) / "config.json").read_text())["image_token_id"],
            "adapter": adapter and str(adapter),
            "requests": requests_,
            "passes": passes,
            "max_new_tokens": MAX_NEW_TOKENS,
            "options": OPTIONS | {"enforce_eager": True} | options,
        }
        job.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "tests.serving.engine", str(job), str(answers)]
        with log.open("w") as file:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=600).returncode
        if code:
            raise RuntimeError(f"vLLM failed:\n{log.read_text()[-6000:]}")
        return json.loads(answers.read_text())


@torch.no_grad()
def answer_with_transformers(model, requests_, adapter=None):
    """The token ids of `generate`'s answers, up to and with the end-of-sequence token."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype="float32", trust_remote_code=True)
    if adapter:
        network = PeftModel.from_pretrained(network, adapter)
    answers = []
    for request in requests_:
        inputs = processor(
            images=[Image.open(path) for path in request["images"]] or None,
            text=request["prompt"],
            num_visual_tokens=request["num_visual_tokens"],
            return_tensors="pt",
        )
        output = network.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def server(model, *arguments, **kwargs):
    """vLLM's OpenAI-compatible server of a checkpoint, under the name mqt-llava: see [`serving`]."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return serving(
        [*command, "--served-model-name", "mqt-llava", "--trust-remote-code", *map(str, arguments)], **kwargs
    )


@contextlib.contextmanager
def serving(command, environment=None, log=os.devnull):
    """A server on loopback, ready to answer: its address and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=ENVIRONMENT | (environment or {}),
            stdout=file,
            stderr=file,
            start_new_session=True,  # to end the engine's processes with it
        )
        try:
            deadline = time.monotonic() + 300
            while not is_up(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not start; see {log}")
                time.sleep(0.5)
            yield address, process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_up(address) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.RequestException:
        return False
