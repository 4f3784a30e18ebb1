"""Ask a vLLM server about a picture, at several numbers of visual tokens.

    vllm serve my-mqt-llava --trust-remote-code --trust-request-mm-kwargs
    python examples/serve_vllm.py examples/scene.png "List everything." --num_visual_tokens 64 4

Needs `pip install openai`. README.md says how `my-mqt-llava` is made and who may be let in.
"""

import argparse
import base64
import mimetypes
import time
from pathlib import Path

from openai import OpenAI


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--num_visual_tokens", type=int, nargs="+", default=[64, 4], help="per image")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.url, api_key="none")
model = client.models.list().data[0].id

# An http(s) URL does as well, if the server may fetch it
kind = mimetypes.guess_type(arguments.image)[0] or "image/png"
url = f"data:{kind};base64,{base64.b64encode(arguments.image.read_bytes()).decode()}"
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": arguments.question}]

for m in arguments.num_visual_tokens:
    start = time.perf_counter()
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=64,
        extra_body={"mm_processor_kwargs": {"num_visual_tokens": m}},  # m, for all images of the request
    )
    answer, tokens = completion.choices[0].message.content.strip(), completion.usage.prompt_tokens
    print(f"m = {m}: {answer}  ({tokens} tokens of prompt, {time.perf_counter() - start:.2f} s)")

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
    extra_body={"mm_processor_kwargs": {"num_visual_tokens": arguments.num_visual_tokens[-1]}},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
