"""`mqt-llava ask IMAGE... [QUESTION]`: answers go to stdout, everything else to stderr."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from . import options
from .conversation import Conversation, is_text, print_now
from .cost import parse_amount
from .errors import UsageError, print_error
from .images import is_url, load_image
from .models import load_config, load_costs, load_schedule, name_checkpoint, place_and_load, silence_libraries
from .options import AUTO, IMAGES_HELP, Dtype, check_num_visual_tokens, number_of_bits, parse_num_visual_tokens_or_auto


PROMPT_TOKENS = 256  # text tokens to expect, before the question is known


def ask(
    images_and_question: Annotated[
        list[str], typer.Argument(metavar="IMAGE... [QUESTION]", show_default=False, help=IMAGES_HELP)
    ],
    model: options.Model = None,
    adapter: options.Adapter = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="M|auto",
            help="Visual tokens per image, or auto: as many as each question needs. Default: the checkpoint's own default, or "
            "all.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,...", help="Compare the answers at these numbers of visual tokens, or auto, side by side."
        ),
    ] = None,
    max_flops: Annotated[
        float | None,
        typer.Option(
            metavar="AMOUNT", parser=parse_amount, help="With auto: maximum FLOPs of an answer, such as 2.5T."
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, help="With auto: maximum time of an answer, as estimated by `cost`."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    compute_dtype: Annotated[
        Dtype,
        typer.Option(
            help="Data type in which a CPU multiplies many tokens. auto: float32 if that is faster than --dtype."
        ),
    ] = Dtype.auto,
    load_in_4bit: options.LoadIn4bit = False,
    load_in_8bit: options.LoadIn8bit = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each question instead of streaming.")
    ] = False,
):
    """Ask a question about images and stream the answer.

    Without a question, it starts a chat about the images, with history. The chat reads one question per line, from the terminal or
    from stdin. On a terminal, Ctrl-C ends an answer.

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
        raise UsageError("--compare and --num-visual-tokens are mutually exclusive")
    if compare is not None and question is None:
        raise UsageError("--compare needs a question as an argument")
    num_bits = number_of_bits(load_in_4bit, load_in_8bit)
    m: Any = None if num_visual_tokens is None else parse_num_visual_tokens_or_auto(num_visual_tokens)
    compared: list[Any] = (
        [] if compare is None else [parse_num_visual_tokens_or_auto(text) for text in compare.split(",")]
    )
    check_quoted(images_and_question, sources)
    images = [load_image(source) for source in sources]

    silence_libraries()
    checkpoint = name_checkpoint(model, adapter)
    config = load_config(checkpoint)
    for given in (m, *compared):
        if not isinstance(given, str):
            check_num_visual_tokens(given, config.num_query_tokens)
    request = {"num_images": len(images), "num_text_tokens": PROMPT_TOKENS, "num_new_tokens": max_new_tokens}
    costs = load_costs(config)
    processor, loaded = place_and_load(
        checkpoint, config, costs, device, dtype, adapter, num_bits, compute_dtype, **request
    )
    if m is None and compare is None:  # a checkpoint may have its own default
        own = [loaded.generation_config, processor.image_processor]
        defaults = [getattr(settings, "num_visual_tokens", None) for settings in own]
        m = next((default for default in defaults if default is not None), config.num_query_tokens)
        if isinstance(m, str):
            m = parse_num_visual_tokens_or_auto(m)
    budgets = {"max_flops": max_flops, "max_seconds": max_seconds}
    budgets = {name: budget for name, budget in budgets.items() if budget is not None}
    limit = None
    if AUTO in (m, *compared):
        schedule = load_schedule(loaded)
        m, *compared = (schedule if given == AUTO else given for given in (m, *compared))
        if budgets:
            limit = partial(limit_schedule, costs, with_speed(budgets, loaded), loaded.dtype, len(images))
    elif budgets:
        raise UsageError("--max-flops and --max-seconds are for --num-visual-tokens auto")
    setting = {
        "model": checkpoint,
        **({"adapter": adapter} if adapter else {}),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "images": sources,
    }

    if compare is not None:
        rows = compare_answers(processor, loaded, costs, images, question, compared, max_new_tokens, limit)
        if as_json:
            print(json.dumps({"question": question, "compare": rows, **setting}))
        else:
            print_table(rows)
        return

    conversation = Conversation(processor, loaded, images, m, max_new_tokens, limit=limit)
    if question is not None:
        answer_one(conversation, question, setting if as_json else None)
    else:
        chat(conversation, setting if as_json else None)


def with_speed(budgets: dict, model) -> dict:
    if "max_seconds" in budgets:
        from ..cost import measure_device

        budgets = budgets | {"speed": measure_device(model.device, model.dtype)}
    return budgets


def limit_schedule(costs, budgets: dict, dtype, num_images: int, schedule, num_text_tokens: int, num_new_tokens: int):
    """The stages of a schedule that fit the budgets, for a prompt and an answer of these lengths."""
    if costs is None:
        raise UsageError("the costs of this model are unknown, so --max-flops and --max-seconds cannot be used")
    request = {"num_images": num_images, "num_text_tokens": num_text_tokens, "num_new_tokens": num_new_tokens}
    try:
        return costs.schedule_within(schedule, **budgets, **request, dtype=dtype)
    except ValueError as error:
        message = str(error).replace("`max_flops`", "--max-flops").replace("`max_seconds`", "--max-seconds")
        raise UsageError(f"{message} The estimate is lower with a smaller --max-new-tokens") from None


def split_question(arguments: list[str]) -> tuple[list[str], str | None]:
    """The last argument is the question, unless it is an image or has the suffix of one."""
    *images, last = arguments
    names_image = Path(last).suffix.lower() in Image.registered_extensions()
    if not images or last == "-" or is_url(last) or os.path.exists(last) or names_image:
        return arguments, None
    if not last.strip():
        raise UsageError("the question is empty")
    return images, last


def check_quoted(arguments: list[str], sources: list[str]):
    """Refuse a question without quotes: its words arrive as separate arguments, and look like images."""
    for i, source in enumerate(sources[1:], 1):
        is_word = not is_url(source) and source != "-" and not os.path.exists(source)
        if is_word and Path(source).suffix.lower() not in Image.registered_extensions():
            question = " ".join(arguments[i:]).replace('"', "'")
            raise UsageError(f'file not found: {source}. A question must be in quotes: "{question}"')


def answer_one(conversation: Conversation, question: str, setting: dict | None):
    """Stream the answer, or print it as JSON if a setting is given."""
    result = conversation.ask(question, print_now if setting is None else None)
    if setting is not None:
        print(json.dumps({"question": question, **result, **setting}), flush=True)


def chat(conversation: Conversation, setting: dict | None):
    """Answer one question after another until there are no more."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        count = f"{len(conversation.images)} image" + "s" * (len(conversation.images) > 1)
        at_most = "" if conversation.schedule is None else "up to "
        print(
            f"{count}, {at_most}{conversation.num_visual_tokens} visual tokens each. Ctrl-D ends the chat.",
            file=sys.stderr,
        )
        conversation.prefill()
    asked, failed = 0, 0
    for number, question in read_questions(at_terminal):
        asked += 1
        try:
            answer_one(conversation, question, setting)
        except UsageError as error:
            if asked == 1 and not is_text(question):  # an image, most likely
                raise
            failed += 1
            print_error(error.format_message() if at_terminal else f"line {number}: {error.format_message()}")
        except KeyboardInterrupt:  # ends the answer, and the question is forgotten
            if not at_terminal:
                raise
            print(flush=True)
    if at_terminal:
        return
    if not asked:
        raise UsageError("no question: give one as the last argument, or one per line on stdin")
    if failed:
        raise typer.Exit(2)


def read_questions(at_terminal: bool) -> Iterator[tuple[int, str]]:
    """The non-blank lines of stdin, with their numbers."""
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives `input` line editing and a history
        # if stdout is not a terminal, `input` would write the prompt among the answers
        lines = iter(lambda: input("> " if sys.stdout.isatty() else ""), None)
    else:
        lines = (line.decode(errors="surrogateescape") for line in sys.stdin.buffer)
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.strip()
    except EOFError:
        print(file=sys.stderr)


def compare_answers(processor, model, costs, images, question, compared, max_new_tokens, limit=None) -> list[dict]:
    """
    One answer for each number of visual tokens, with its time and its compute up to the first token.

    What the answers share is computed once: the beginning of the prompt, which counts for none of them, and the images, which count for
    each. "auto" does not start from a cache, so the beginning counts for it, too.
    """
    import torch

    from ..prefix_cache import PrefixCache

    prefix = None
    with contextlib.suppress(ValueError):  # raised if the prompts of a template have no common beginning
        prefix = PrefixCache(model, processor)
    num_cached = 0 if prefix is None else len(prefix)
    largest = max(m if isinstance(m, int) else m.num_visual_tokens[-1] for m in compared)
    first = Conversation(processor, model, images, largest, max_new_tokens)
    _, inputs = first.prepare(question)
    start = time.perf_counter()
    first.encode(inputs["pixel_values"])
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    encoding = time.perf_counter() - start
    num_text_tokens = inputs["input_ids"].shape[1] - len(images) * largest
    rows = []
    for m in compared:
        conversation = Conversation(processor, model, images, m, max_new_tokens, first.image_features, prefix, limit)
        row = conversation.ask(question)
        seconds = round(row["seconds"] + encoding, 4)
        request = {"num_text_tokens": num_text_tokens, "num_cached_tokens": num_cached, "num_images": len(images)}
        if costs is None:
            flops = None
        elif isinstance(m, int):
            flops = costs(m, **request).flops
        else:  # all stages that ran, from the prompt's beginning
            request = {"num_text_tokens": num_text_tokens, "num_images": len(images)}
            flops = sum(cost.flops for cost in costs.stages(m, **request)[: row["stage"] + 1])
        num_reused = num_cached if isinstance(m, int) else 0
        rows.append({**row, "seconds": seconds, "cached_tokens": num_reused, "flops": flops})
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
        # Text, since an answer may have [brackets], which are markup
        compute = "" if row["flops"] is None else f"{row['flops'] / 1e9:,.2f} GFLOP"
        m = f"auto: {row['num_visual_tokens']}" if "stage" in row else str(row["num_visual_tokens"])
        table.add_row(m, Text(row["answer"]), f"{row['seconds']:.2f} s", compute)
    Console(file=sys.stdout).print(table)
