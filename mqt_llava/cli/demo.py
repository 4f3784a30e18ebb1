"""`mqt-llava demo`: a page in the browser to ask questions about pictures."""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError
from .models import (
    Dtype,
    ModelOption,
    load_config,
    load_costs,
    load_model,
    name_base,
    name_checkpoint,
    place,
    resolve_device,
    silence_libraries,
)


PROMPT_TOKENS = 512  # text tokens to expect, before a question is known


def demo(
    model: ModelOption = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR_OR_REPO", help="LoRA adapter to merge.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on. Default: the first free one from 7860 on.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on. 0.0.0.0 admits everybody who can reach this machine."
        ),
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Create a public address for a week, through Gradio's server.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum length of an answer in tokens.")
    ] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Data type of the weights. auto: as for `ask`.")] = Dtype.auto,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the language model in 4 bits.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Load the language model in 8 bits.")] = False,
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the page to a new folder, as a Space for the Hub, without starting it."
        ),
    ] = None,
):
    """Open a page in the browser: ask about pictures, choose m, compare answers and see what they depend on.

    The page is served to this machine only, sends nothing to other machines and works offline.

    \b
    mqt-llava demo
    mqt-llava demo --model ORG/REPO --port 8000
    mqt-llava demo --space my-space --model ORG/REPO
    """
    if load_in_4bit and load_in_8bit:
        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other")
    if space is not None:
        from ..demo.space import write_space

        try:
            for name in write_space(space, model):
                print(space / name)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return
    checkpoint = name_base(adapter) if adapter and model is None else name_checkpoint(model)
    if port is not None:
        check_free(host, port)
    silence_libraries()
    try:
        from ..demo.app import build, settings
    except ImportError as error:
        if not (error.name or "").startswith("gradio"):
            raise
        raise UsageError("gradio is missing: pip install 'mqt-llava[demo]'") from None
    from ..demo.answers import Answers

    num_bits = 4 if load_in_4bit else 8 if load_in_8bit else None
    config = load_config(checkpoint)
    device = resolve_device(device)
    costs = load_costs(checkpoint, config)
    request = {"num_images": 1, "num_text_tokens": PROMPT_TOKENS, "num_new_tokens": max_new_tokens}
    placement = place(checkpoint, config, costs, device, dtype, num_bits, **request)
    processor, model = load_model(checkpoint, device, placement, adapter, num_bits)
    page = build(Answers(processor, model, checkpoint, costs, max_new_tokens))
    try:
        _, address, public = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, **settings()
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host}: {error}") from None
    print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
    if public:
        print(f"For a week, anybody can open {public}", flush=True)
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
