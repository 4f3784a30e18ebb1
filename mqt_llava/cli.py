"""The command line: `mqt-llava ask IMAGE [IMAGE ...] "QUESTION"`.

Answers go to stdout, everything else to stderr. Bad input gets one line and exit code 2.
"""

# torch and transformers are imported where they are used: help and errors in the arguments need neither
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps, UnidentifiedImageError
from typer.core import TyperGroup

from . import TINY_CHECKPOINT, __version__


DOWNLOAD_TIMEOUT = 30  # seconds without a byte
MAX_DOWNLOAD_BYTES = 256 * 2**20
MAX_SIDE = 8192  # pixels; the processor pads to a square, so a long strip costs its length squared

# Not `click.UsageError`: newer releases of typer carry click inside
UsageError = typer.BadParameter.__base__


class Dtype(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def parse_budget(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"a number of visual tokens is an integer; got {text!r}") from None


class OneLineErrors(TyperGroup):
    """A group of commands that says in one line what is wrong, without the usage before it."""

    def main(self, *args, **kwargs):
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
        except UsageError as error:
            print_error(error)
            status = error.exit_code
        except typer.Abort:
            status = 1
        sys.exit(status)


def print_error(error):
    print("Error: " + " ".join(error.format_message().split()), file=sys.stderr)


app = typer.Typer(cls=OneLineErrors, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding lacks
    app(prog_name="mqt-llava")


def print_version(wanted: bool):
    if wanted:
        print(f"mqt-llava {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """MQT-LLaVA: one vision-language checkpoint, any number of visual tokens per image."""


@app.command()
def ask(
    images_and_question: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [QUESTION]",
            show_default=False,
            help="Files, http(s) URLs or - for stdin, then the question.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO", help="Checkpoint: a folder or a Hub repository. Default: the shipped one."
        ),
    ] = None,
    num_visual_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="M", parser=parse_budget, help="Visual tokens per image. Default: as many as the model has."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="M,M,...", help="Answer with each of these numbers of visual tokens, side by side."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of an answer, at most, in tokens.")
    ] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.")] = Dtype.auto,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each question instead of streaming.")
    ] = False,
):
    """Ask a question about images and stream the answer.

    Without a question: a chat about the images, with history. It reads one question a line, from the terminal or from
    stdin.

    \b
    mqt-llava ask photo.jpg "What is this?"
    mqt-llava ask before.png after.png "What has changed?" --num-visual-tokens 16
    mqt-llava ask photo.jpg "What is this?" --compare 1,4,16,64
    """
    sources, question = split_question(images_and_question)
    if sources.count("-") > 1:
        raise UsageError("only one image can come from stdin (-)")
    if question is None and "-" in sources:
        raise UsageError("stdin holds the image (-), so the question must be an argument")
    if compare is not None and num_visual_tokens is not None:
        raise UsageError("--compare and --num-visual-tokens exclude each other")
    if compare is not None and question is None:
        raise UsageError("--compare needs a question as an argument")
    budgets = [num_visual_tokens] if compare is None else [parse_budget(text) for text in compare.split(",")]
    images = [load_image(source) for source in sources]

    silence_libraries()
    checkpoint = TINY_CHECKPOINT if model is None else model
    config = load_config(checkpoint)
    budgets = [check_budget(budget, config.num_query_tokens) for budget in budgets]
    processor, network = load_model(checkpoint, device, dtype.value)
    setting = {
        "model": checkpoint,
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "images": sources,
    }

    if compare is not None:
        rows = compare_budgets(processor, network, images, question, budgets, max_new_tokens)
        if as_json:
            print(json.dumps({"question": question, "compare": rows, **setting}))
        else:
            print_table(rows)
        return

    conversation = Conversation(processor, network, images, budgets[0], max_new_tokens)
    if question is not None:
        answer_one(conversation, question, setting if as_json else None)
    else:
        chat(conversation, setting if as_json else None)


def split_question(arguments: list[str]) -> tuple[list[str], str | None]:
    """The last argument is the question unless it is, or by its suffix means to be, an image."""
    *images, last = arguments
    names_image = Path(last).suffix.lower() in Image.registered_extensions()
    if not images or last == "-" or is_url(last) or os.path.exists(last) or names_image:
        return arguments, None
    if not last.strip():
        raise UsageError("the question is empty")
    return images, last


def is_url(source: str) -> bool:
    return re.fullmatch(r"https?://\S+", source, re.IGNORECASE) is not None


def check_budget(num_visual_tokens: int | None, num_query_tokens: int) -> int:
    """m, from 1 to M; `None` stands for M."""
    if num_visual_tokens is None:
        return num_query_tokens
    if not 1 <= num_visual_tokens <= num_query_tokens:
        raise UsageError(
            f"the number of visual tokens must be from 1 to {num_query_tokens} with this model; got {num_visual_tokens}"
        )
    return num_visual_tokens


def load_image(source: str) -> Image.Image:
    """The image in a file, at an http(s) URL or on stdin (`-`), upright."""
    name = "the image on stdin" if source == "-" else source
    try:
        if source == "-":
            file = BytesIO(sys.stdin.buffer.read())
        else:
            file = BytesIO(download(source)) if is_url(source) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities in the metadata are no matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
            if max(upright.size) > MAX_SIDE:
                upright.thumbnail((MAX_SIDE, MAX_SIDE))
            return upright
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"file not found: {name}") from None
    except IsADirectoryError:
        raise UsageError(f"not an image but a directory: {name}") from None
    except PermissionError:
        raise UsageError(f"no permission to read {name}") from None
    except UnidentifiedImageError:
        raise UsageError(f"not an image in any format that Pillow reads: {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(f"too many pixels, more than {Image.MAX_IMAGE_PIXELS}: {name}") from None
    except Exception as error:  # a damaged file can lead a decoder to any exception
        raise UsageError(f"damaged or truncated image: {name} ({error})") from None


def download(url: str) -> bytes:
    from huggingface_hub.utils import httpx  # the one that transformers uses, under whatever name it is installed

    content = bytearray()
    headers = {"User-Agent": f"mqt-llava/{__version__}"}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
            if response.is_error:
                raise UsageError(f"cannot download {url}: HTTP {response.status_code} {response.reason_phrase}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise UsageError(f"cannot download {url}: more than {MAX_DOWNLOAD_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"cannot download {url}: {error or type(error).__name__}") from None
    return bytes(content)


def silence_libraries():
    """Keep warnings and the progress of loading off the terminal; downloads still show theirs there."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    downloads_are_silent = are_progress_bars_disabled()
    logging.disable_progress_bar()
    if not downloads_are_silent:
        enable_progress_bars()


@contextlib.contextmanager
def loading(checkpoint: str):
    """Whatever goes wrong while a checkpoint loads is said in one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(f"cannot load the model {checkpoint}: {reason}") from None


def load_config(checkpoint: str):
    from transformers import AutoConfig

    from . import MQTLlavaConfig

    if checkpoint == TINY_CHECKPOINT and not os.path.isdir(checkpoint):
        raise UsageError(f"the shipped checkpoint is missing ({checkpoint}); name another with --model DIR_OR_REPO")
    with loading(checkpoint):
        # False: a checkpoint may carry its own code, but the classes of this package answer
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if not isinstance(config, MQTLlavaConfig):
        raise UsageError(f"not an MQT-LLaVA model but {config.model_type}: {checkpoint}")
    return config


def load_model(checkpoint: str, device: str, dtype: str):
    """Processor and model, ready to answer on `device`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = resolve_device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    with loading(checkpoint):
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        model, report = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    if report["missing_keys"]:  # transformers would answer with random weights and a warning
        raise UsageError(
            f"cannot load the model {checkpoint}: no weights for {', '.join(sorted(report['missing_keys']))}"
        )
    return processor, model.to(device).eval()


def resolve_device(name: str):
    import torch

    if name == "auto":
        gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((gpu for gpu, backend in gpus.items() if backend.is_available()), "cpu")
    try:
        tensor = torch.zeros(1, device=name)
        tensor.cpu()  # not possible on `meta`, which holds no data
        return tensor.device
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"cannot use the device {name!r}: {reason}") from None


class Conversation:
    """Questions about the same images: each is asked with all turns before it, the images are encoded once.

    Args:
        processor, model: as the Auto classes load them.
        images (`list[PIL.Image.Image]`): they stand at the beginning of the first turn.
        num_visual_tokens (`int`): m, for each of the images.
        max_new_tokens (`int`): length of an answer, at most.
    """

    def __init__(self, processor, model, images, num_visual_tokens: int, max_new_tokens: int):
        self.processor = processor
        self.model = model
        self.images = images
        self.num_visual_tokens = num_visual_tokens
        self.max_new_tokens = max_new_tokens
        self.messages = []
        self.image_features = None

    def prepare(self, question: str):
        """The messages up to the question, and the model's inputs for them."""
        image_token = self.processor.image_token
        if image_token in question:
            raise UsageError(f"the question must not contain {image_token}, which stands for an image")
        if any("\ud800" <= character <= "\udfff" for character in question):  # how Python carries undecodable bytes
            raise UsageError("the question is not text; to read an image from stdin, pass - and a question")
        parts = [{"type": "text", "text": question}]
        if not self.messages:
            parts = [{"type": "image"}] * len(self.images) + parts
        messages = [*self.messages, {"role": "user", "content": parts}]
        inputs = self.processor(
            images=self.images,
            text=self.processor.apply_chat_template(messages, add_generation_prompt=True),
            num_visual_tokens=self.num_visual_tokens,
            return_tensors="pt",
            add_special_tokens=False,  # the template writes the BOS
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        limit = self.context_length()
        if length >= limit:
            raise UsageError(
                f"the prompt has {length} tokens, the model takes {limit}: use fewer images or visual tokens, or a "
                "shorter conversation"
            )
        return messages, inputs

    def context_length(self):
        return getattr(self.model.config.text_config, "max_position_embeddings", None) or float("inf")

    def ask(self, question: str, stream: bool = False) -> dict:
        """Answer a question, print the answer as it is made if `stream`, and remember both."""
        import torch

        messages, inputs = self.prepare(question)
        streamer = AnswerStreamer(self.processor.tokenizer, silent=not stream)
        start = time.perf_counter()
        if self.image_features is None:
            with torch.no_grad():
                self.image_features = self.model.get_image_features(
                    inputs["pixel_values"], inputs["visual_token_counts"]
                )
        length = inputs["input_ids"].shape[1]
        self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"image": self.image_features},
            max_new_tokens=min(self.max_new_tokens, self.context_length() - length),
            do_sample=False,
            num_beams=1,  # more cannot stream
            streamer=streamer,
        )
        seconds = time.perf_counter() - start

        # a token that spells the placeholder would stand for an image in the next prompt
        remembered = streamer.text.replace(self.processor.image_token, "")
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": remembered}]}]
        return {
            "answer": streamer.text,
            "num_visual_tokens": self.num_visual_tokens,
            "prompt_tokens": length,
            "new_tokens": len(streamer.ids),
            "seconds": round(seconds, 4),
        }

    def count_flops(self, question: str) -> int:
        """Floating point operations of one forward pass over images and prompt: what precedes the first token."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        _, inputs = self.prepare(question)
        # The counter knows no fused attention of CPUs and would leave it out; plain products are the same on any device
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()


class AnswerStreamer:
    """Takes tokens from `generate` and prints the text as soon as it is settled; `text` is the whole answer.

    transformers' `TextStreamer` keeps no text, and prints the space with which an answer begins.
    """

    def __init__(self, tokenizer, silent: bool = False):
        self.tokenizer = tokenizer
        self.silent = silent
        self.ids = []
        self.text = ""
        self.printed = 0
        self.prompt_is_next = True

    def put(self, ids):
        if self.prompt_is_next:  # `generate` hands over the prompt first
            self.prompt_is_next = False
            return
        self.ids += ids.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        if not self.text.endswith("\ufffd"):  # what ends so may be a character that the next token completes
            self.print_new()

    def end(self):
        self.print_new()
        if not self.silent:
            print(flush=True)

    def print_new(self):
        if not self.silent:
            print(self.text[self.printed :], end="", flush=True)
        self.printed = len(self.text)


def answer_one(conversation: Conversation, question: str, setting: dict | None):
    """Stream the answer, or print it as JSON with the setting, if one is given."""
    result = conversation.ask(question, stream=setting is None)
    if setting is not None:
        print(json.dumps({"question": question, **result, **setting}), flush=True)


def chat(conversation: Conversation, setting: dict | None):
    """Answer one question after the other until there are no more."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        count = f"{len(conversation.images)} image" + "s" * (len(conversation.images) > 1)
        print(f"{count}, {conversation.num_visual_tokens} visual tokens each. Ctrl-D ends the chat.", file=sys.stderr)
    asked = False
    for question in read_questions(at_terminal):
        try:
            answer_one(conversation, question, setting)
        except UsageError as error:
            if not at_terminal:
                raise
            print_error(error)
        asked = True
    if not asked and not at_terminal:
        raise UsageError("no question: give one as the last argument, or one a line on stdin")


def read_questions(at_terminal: bool) -> Iterator[str]:
    """The lines of stdin that are not blank."""
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives `input` line editing and a history
        # where stdout is no terminal, `input` would write the prompt among the answers
        lines = iter(lambda: input("> " if sys.stdout.isatty() else ""), None)
    else:
        lines = (line.decode(errors="surrogateescape") for line in sys.stdin.buffer)
    try:
        for line in lines:
            if line.strip():
                yield line.strip()
    except EOFError:
        print(file=sys.stderr)


def compare_budgets(processor, model, images, question, budgets, max_new_tokens) -> list[dict]:
    """One answer for each number of visual tokens, with its time and compute."""
    Conversation(processor, model, images, budgets[0], 2).ask(question)  # the first run is slower than all others
    rows = []
    for budget in budgets:
        conversation = Conversation(processor, model, images, budget, max_new_tokens)
        flops = conversation.count_flops(question)
        rows.append({**conversation.ask(question), "flops": flops})
    return rows


def print_table(rows: list[dict]):
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("m", justify="right")
    table.add_column("answer")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("compute", justify="right", no_wrap=True)
    for row in rows:
        # Text: an answer with [brackets] is no markup
        compute = f"{row['flops'] / 1e9:,.2f} GFLOP"
        table.add_row(str(row["num_visual_tokens"]), Text(row["answer"]), f"{row['seconds']:.2f} s", compute)
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
