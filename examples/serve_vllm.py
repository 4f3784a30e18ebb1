"""Ask a vLLM server about a picture, at several numbers of visual tokens.

    vllm serve my-mqt-llava --trust-remote-code --trust-request-mm-kwargs
    python examples/serve_vllm.py examples/scene.png "List everything." --num_visual_tokens 64 4
    python examples/serve_vllm.py examples/scene.png "List everything." --num_visual_tokens auto --schedule 2:0.977 8:0.75 32

A server knows requests by their m, so "auto" is the client's: it asks at the m of each stage until the answer is sure enough. Needs `pip install openai`. README.md says how `my-mqt-llava` is made and who may be let in.
"""

import argparse
import base64
import math
import mimetypes
import time
from pathlib import Path
from types import SimpleNamespace

from openai import OpenAI


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--num_visual_tokens", nargs="+", default=["64", "4"], help="per image, or auto")
parser.add_argument(
    "--schedule",
    nargs="+",
    default=["2:0.95", "8:0.75", "64"],
    metavar="M:THRESHOLD",
    help="of auto, as `visual_token_schedule` in generation_config.json has it; the last m takes every answer",
)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
arguments = parser.parse_args()
if ":" in arguments.schedule[-1]:
    parser.error("the last m of --schedule takes every answer, so it has no threshold")

NO_TOKENS = SimpleNamespace(content=())
client = OpenAI(base_url=arguments.url, api_key="none")
model = client.models.list().data[0].id

# An http(s) URL does as well, if the server may fetch it
kind = mimetypes.guess_type(arguments.image)[0] or "image/png"
url = f"data:{kind};base64,{base64.b64encode(arguments.image.read_bytes()).decode()}"
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": arguments.question}]


def ask(m, threshold=0.0):
    """The answer with m visual tokens per image, and the product of its tokens' probabilities; broken off where that falls below
    the threshold, since it can only fall."""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=64,
        logprobs=True,
        stream=True,
        extra_body={"mm_processor_kwargs": {"num_visual_tokens": m}},  # for all images of the request
    )
    answer, log_confidence = "", 0.0
    for chunk in chunks:
        answer += chunk.choices[0].delta.content or ""
        log_confidence += sum(token.logprob for token in (chunk.choices[0].logprobs or NO_TOKENS).content or ())
        if math.exp(log_confidence) < threshold:
            chunks.close()  # the server stops, too
            break
    return answer.strip(), math.exp(log_confidence)


def ask_as_needed():
    """The answer of the first stage that is sure enough, its m and its confidence."""
    for stage in arguments.schedule:
        m, _, threshold = stage.partition(":")
        answer, confidence = ask(int(m), float(threshold or 0))
        if confidence >= float(threshold or 0):
            return answer, int(m), confidence


for m in arguments.num_visual_tokens:
    start = time.perf_counter()
    if m == "auto":
        answer, last, confidence = ask_as_needed()
        m = f"auto, {last}"
    else:
        (answer, confidence), last = ask(int(m)), int(m)
    print(f"m = {m}: {answer}  (confidence {confidence:.2f}, {time.perf_counter() - start:.2f} s)")

# A conversation goes on as with any model; its images are encoded once and stay in the server's cache
messages = [
    {"role": "user", "content": content},
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "What colour is the background?"},
]
stream = client.chat.completions.create(
    model=model,
    messages=messages,
    temperature=0,
    max_tokens=64,
    stream=True,
    extra_body={"mm_processor_kwargs": {"num_visual_tokens": last}},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
