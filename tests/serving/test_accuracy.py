"""mqt-llava-tiny is as accurate through the server as through transformers. Prints the table (`pytest -s`)."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny.evaluate import accuracy_by_type, evaluation_set, is_right, markdown_table, read_answer
from recipes.tiny.scenes import FONTS
from tests.serving.common import server
from tests.serving.test_server import as_url, content


NUM_VISUAL_TOKENS = (1, 4, 16, 64)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(not all(map(os.path.exists, FONTS)), reason="needs fonts-noto-color-emoji and fonts-symbola")
def test_accuracy_through_the_server(tiny):
    """200 pictures of held-out seeds, all types of questions, 16 clients."""
    samples = evaluation_set(200)
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tiny, trust_remote_code=True)
    accuracy = {}
    with server(tiny, "--trust-request-mm-kwargs", "--dtype", "float32", "--enforce-eager") as (address, _):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def is_right_through_the_server(sample, m):
            pictures, _, question, answer = sample
            completion = client.chat.completions.create(
                model="mqt-llava",
                messages=[{"role": "user", "content": content([as_url(picture) for picture in pictures], question)}],
                temperature=0,
                max_tokens=40,
                extra_body={"mm_processor_kwargs": {"num_visual_tokens": m}},
            )
            return read_answer(completion.choices[0].message.content) == read_answer(answer)

        for m in NUM_VISUAL_TOKENS:
            with ThreadPoolExecutor(16) as pool:
                served = list(pool.map(lambda sample, m=m: is_right_through_the_server(sample, m), samples))
            here = is_right(model, processor, samples, m)
            agreement = 100 * sum(map(bool.__eq__, served, here)) / len(samples)
            print(f"m = {m}: {len(samples)} questions, the same verdict on {agreement:.2f} %")
            accuracy[f"{m}, vLLM"] = accuracy_by_type(samples, served)
            accuracy[f"{m}, transformers"] = accuracy_by_type(samples, here)
    print(markdown_table(accuracy))
    for m in NUM_VISUAL_TOKENS:
        assert abs(accuracy[f"{m}, vLLM"]["all"] - accuracy[f"{m}, transformers"]["all"]) <= 1
