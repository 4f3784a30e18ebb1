"""`mqt-llava demo`: a page in the browser to ask questions about images."""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .errors import UsageError, requiring
from .models import load_config, load_costs, name_checkpoint, place_and_load, silence_libraries
from .options import Dtype, number_of_bits


PROMPT_TOKENS = 512  # text tokens to expect, before a question is known


def demo(
    model: options.Model = None,
    adapter: options.Adapter = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on. Default: the first free one from 7860 on.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on. With 0.0.0.0, other machines can open the page, too."
        ),
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Create a public link through Gradio's server, valid for a week.")
    ] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    load_in_4bit: options.LoadIn4bit = False,
    load_in_8bit: options.LoadIn8bit = False,
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the page to a new folder as a Space for the Hub, and do not serve it."
        ),
    ] = None,
):
    """Serve a page to ask about images in the browser.

    Choose m, compare answers and see what they depend on. By default only this machine can open the page, which works
    offline and sends nothing to other machines.

    \b
    mqt-llava demo
    mqt-llava demo --model ORG/REPO --port 8000
    mqt-llava demo --space my-space --model ORG/REPO
    """
    num_bits = number_of_bits(load_in_4bit, load_in_8bit)
    if space is not None:
        from ..demo.space import write_space

        try:
            for name in write_space(space, model):
                print(space / name)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return
    checkpoint = name_checkpoint(model, adapter)
    if port is not None:
        check_free(host, port)
    silence_libraries()
    with requiring("demo"):
        from ..demo.app import build, settings
    from ..demo.answers import Answers

    config = load_config(checkpoint)
    costs = load_costs(config)
    request: dict[str, Any] = {"num_images": 1, "num_text_tokens": PROMPT_TOKENS, "num_new_tokens": max_new_tokens}
    processor, model = place_and_load(checkpoint, config, costs, device, dtype, adapter, num_bits, **request)
    page = build(Answers(processor, model, checkpoint, costs, max_new_tokens))
    try:
        _, address, public = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, **settings()
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host}: {error}") from None
    print(f"Open {address} in a browser. Ctrl-C stops the server.", flush=True)
    if public:
        print(f"Public link, valid for a week: {public}", flush=True)
    elif share:
        print("Gradio's server gave no public address", file=sys.stderr)
    page.block_thread()


def check_free(host: str, port: int):
    """Refuse a port before the model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            if os.name != "nt":  # there it means something else
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
