"""A vLLM server asked with as many visual tokens as each question needs, beside fixed numbers: answers per second and accuracy.

    python -m benchmarks.serving_auto [--output_dir docs/benchmarks] [--pictures 100]

Runs in the environment that `VENV=... bash tests/serving/run` makes. The client escalates, see examples/serve_vllm.py: a server
knows requests by their m, so each stage is a request of its own, which prefills its prompt anew but for what vLLM caches.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from openai import OpenAI
from transformers import AutoProcessor, GenerationConfig

import mqt_llava
from benchmarks.measure import machine
from benchmarks.serving import CLIENTS, save_tiny
from examples.serve_vllm import ask, ask_as_needed
from mqt_llava import VisualTokenSchedule
from recipes.tiny.evaluate import evaluation_set, read_answer
from tests.serving.common import server
from tests.serving.test_server import as_url, content


ROUNDS = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=[2, 8, 16, 32, 64])
    arguments = parser.parse_args()
    samples = evaluation_set(
        arguments.pictures, AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT).image_processor.side
    )
    settings = GenerationConfig.from_pretrained(mqt_llava.TINY_CHECKPOINT)
    schedule = VisualTokenSchedule(**settings.visual_token_schedule)
    stages = list(zip(schedule.num_visual_tokens, [*schedule.thresholds, 0.0]))
    messages = [
        [{"role": "user", "content": content([as_url(picture) for picture in pictures], question)}]
        for pictures, _, question, _ in samples
    ]
    ways = {str(m): m for m in arguments.num_visual_tokens} | {"auto": stages}
    seconds, said, requests = {name: [] for name in ways}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        options = ("--trust-request-mm-kwargs", "--dtype", "float32", "--enforce-eager")
        with server(Path(folder), *options) as (address, _):
            client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

            def answer(way, asked):
                if isinstance(way, list):
                    text, m, _ = ask_as_needed(client, asked, way, max_tokens=40)
                    return text, m
                return ask(client, asked, way, max_tokens=40)[0], way

            for _ in range(ROUNDS):
                for name, way in ways.items():
                    start = time.perf_counter()
                    with ThreadPoolExecutor(CLIENTS) as pool:
                        said[name] = list(pool.map(lambda asked, way=way: answer(way, asked), messages))
                    seconds[name].append(time.perf_counter() - start)
                    used = [m for _, m in said[name]]
                    requests[name] = sum(1 + [s for s, _ in stages].index(m) if name == "auto" else 1 for m in used)
    lines = [machine(torch.device("cpu")), ""]
    lines += [
        f"{len(samples)} questions about {arguments.pictures} pictures, {CLIENTS} clients, the better of {ROUNDS} rounds; vLLM, eager, "
        f"float32. auto is {schedule.num_visual_tokens} with thresholds {schedule.thresholds}.",
        "",
        "| m | accuracy, % | visual tokens | requests per answer | answers/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ways:
        right = [read_answer(text) == read_answer(sample[3]) for (text, _), sample in zip(said[name], samples)]
        number = len(samples)
        cells = [f"{100 * sum(right) / number:.1f}", f"{sum(m for _, m in said[name]) / number:.1f}"]
        cells += [f"{requests[name] / number:.2f}", f"{number / min(seconds[name]):.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    (arguments.output_dir / "serving_auto.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
