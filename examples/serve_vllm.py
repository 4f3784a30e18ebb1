"""Ask a vLLM server about a picture, at several numbers of visual tokens, or with as many as the question needs.

    vllm serve my-mqt-llava --trust-remote-code --trust-request-mm-kwargs
    python examples/serve_vllm.py examples/scene.png "List everything." --num_visual_tokens 64 4
    python examples/serve_vllm.py examples/scene.png "List everything." --num_visual_tokens auto --schedule 2:0.977 8:0.75 32

A server knows requests by their m, so "auto" is the client's: it asks at the m of each stage until the answer is sure enough. Needs
`pip install openai`. docs/serve.md says how `my-mqt-llava` is made, and which clients to trust.
"""

import argparse
import base64
import math
import mimetypes
import time
from pathlib import Path

from openai import OpenAI


def ask(client, messages, num_visual_tokens, threshold=0.0, model="mqt-llava", max_tokens=64):
    """The answer with so many visual tokens per image, and the product of its tokens' probabilities. It is broken off, by the server
    too, where that falls below the threshold, since it can only fall."""
    answer, log_confidence = "", 0.0
    with client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        logprobs=True,
        stream=True,
        extra_body={"mm_processor_kwargs": {"num_visual_tokens": num_visual_tokens}},  # for all images of the request
    ) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                answer += choice.delta.content or ""
                log_confidence += sum(token.logprob for token in (choice.logprobs and choice.logprobs.content) or ())
            if math.exp(log_confidence) < threshold:
                break
    return answer.strip(), math.exp(log_confidence)


def ask_as_needed(client, messages, schedule, **options):
    """The answer of the first stage that is sure enough, its number of visual tokens, and its confidence. A schedule is a list of
    `(number of visual tokens, threshold)`; the last one takes every answer."""
    for num_visual_tokens, threshold in schedule:
        answer, confidence = ask(client, messages, num_visual_tokens, threshold, **options)
        if confidence >= threshold:
            break
    return answer, num_visual_tokens, confidence


def parse_stage(text):
    number, _, threshold = text.partition(":")
    return int(number), float(threshold or 0)


def as_url(path):
    """An http(s) URL does as well, if the server may fetch it."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--num_visual_tokens", nargs="+", default=["64", "4"], help="per image, or auto")
    parser.add_argument(
        "--schedule",
        nargs="+",
        type=parse_stage,
        default=[(2, 0.95), (8, 0.75), (64, 0.0)],
        metavar="M:THRESHOLD",
        help="of auto, as `visual_token_schedule` in generation_config.json has it; the last m has no threshold",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    arguments = parser.parse_args()
    if arguments.schedule[-1][1]:
        parser.error("the last m of --schedule takes every answer, so it has no threshold")

    client = OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    image = {"type": "image_url", "image_url": {"url": as_url(arguments.image)}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": arguments.question}]}]
    for m in arguments.num_visual_tokens:
        start = time.perf_counter()
        if m == "auto":
            answer, last, confidence = ask_as_needed(client, messages, arguments.schedule, model=model)
            m = f"auto, {last}"
        else:
            (answer, confidence), last = ask(client, messages, int(m), model=model), int(m)
        print(f"m = {m}: {answer}  (confidence {confidence:.2f}, {time.perf_counter() - start:.2f} s)")

    # A conversation goes on as with any model; its images are encoded once and stay in the server's cache
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "What colour is the background?"},
    ]
    print(ask(client, messages, last, model=model)[0])


if __name__ == "__main__":
    main()
