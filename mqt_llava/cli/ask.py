"""`mqt-llava ask IMAGE [IMAGE ...] "QUESTION"`: answers go to stdout, everything else to stderr."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from .conversation import Conversation, is_text, print_now
from .cost import parse_amount
from .errors import UsageError, print_error
from .images import is_url, load_image
from .models import (
    AUTO,
    Dtype,
    ModelOption,
    check_num_visual_tokens,
    load_config,
    load_costs,
    load_model,
    load_schedule,
    name_base,
    name_checkpoint,
    parse_num_visual_tokens_or_auto,
    place,
    resolve_device,
    silence_libraries,
)


PROMPT_TOKENS = 256  # of text, to reckon with before anything is asked


def ask(
    images_and_question: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [QUESTION]",
            show_default=False,
            help="Files, http(s) URLs or - for stdin, then the question.",
        ),
    ],
    model: ModelOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_REPO", help="LoRA adapter to merge. --model is then its base where not given."),
    ] = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="M|auto",
            help="Visual tokens per image; auto: as many as each question needs. Default: the checkpoint's own number, or as "
            "many as it has.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,...", help="Answer with each of these numbers of visual tokens, or auto, side by side."
        ),
    ] = None,
    max_flops: Annotated[
        float | None,
        typer.Option(
            metavar="AMOUNT", parser=parse_amount, help="With auto: FLOPs of an answer at most, such as 2.5T."
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, help="With auto: what an answer may take, as `cost` estimates it."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of an answer, at most, in tokens.")
    ] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights. auto: the checkpoint's; float32 on a CPU with memory to spare.")
    ] = Dtype.auto,
    compute_dtype: Annotated[
        Dtype,
        typer.Option(help="Of a CPU's products of many tokens. auto: float32, where that is faster than --dtype."),
    ] = Dtype.auto,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="The language model in 4 bits.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="The language model in 8 bits.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each question instead of streaming.")
    ] = False,
):
    """Ask a question about images and stream the answer.

    Without a question: a chat about the images, with history. It reads one question a line, from the terminal, where Ctrl-C
    ends an answer, or from stdin.

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
    if load_in_4bit and load_in_8bit:
        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other")
    num_bits = 4 if load_in_4bit else 8 if load_in_8bit else None
    if num_visual_tokens is not None:
        num_visual_tokens = parse_num_visual_tokens_or_auto(num_visual_tokens)
    compared = [] if compare is None else [parse_num_visual_tokens_or_auto(text) for text in compare.split(",")]
    check_quoted(images_and_question, sources)
    images = [load_image(source) for source in sources]

    silence_libraries()
    import torch

    checkpoint = name_base(adapter) if adapter and model is None else name_checkpoint(model)
    config = load_config(checkpoint)
    given = num_visual_tokens is not None
    for m in (num_visual_tokens, *compared):
        if m != AUTO:
            check_num_visual_tokens(m, config.num_query_tokens)
    device = resolve_device(device)
    if compute_dtype is not Dtype.auto and device.type != "cpu":
        raise UsageError(f"--compute-dtype is for a CPU; the model would be on {device}")
    longest = getattr(config.text_config, "max_position_embeddings", None) or max_new_tokens
    request = {"num_images": len(images), "num_text_tokens": PROMPT_TOKENS}
    request["num_new_tokens"] = min(max_new_tokens, longest)
    costs = load_costs(checkpoint, config)
    placement = place(checkpoint, config, costs, device, dtype, num_bits, **request)
    if compute_dtype not in (Dtype.auto, Dtype.float32) and getattr(torch, compute_dtype.value) != placement.dtype:
        raise UsageError(f"--compute-dtype is float32 or that of the weights; got {compute_dtype.value}")
    processor, network = load_model(checkpoint, device, placement, adapter, num_bits, compute_dtype.value)
    if not given and compare is None:  # a checkpoint may have an m of its own
        own = (network.generation_config, processor.image_processor)
        own = [getattr(settings, "num_visual_tokens", None) for settings in own]
        num_visual_tokens = next((m for m in own if m is not None), config.num_query_tokens)
        if isinstance(num_visual_tokens, str):
            num_visual_tokens = parse_num_visual_tokens_or_auto(num_visual_tokens)
    budgets = {"max_flops": max_flops, "max_seconds": max_seconds}
    budgets = {name: budget for name, budget in budgets.items() if budget is not None}
    limit = None
    if AUTO in (num_visual_tokens, *compared):
        schedule = load_schedule(network)
        num_visual_tokens, *compared = (schedule if m == AUTO else m for m in (num_visual_tokens, *compared))
        if budgets:
            limit = partial(limit_schedule, costs, with_speed(budgets, network), network.dtype, len(images))
    elif budgets:
        raise UsageError("--max-flops and --max-seconds are for --num-visual-tokens auto")
    setting = {
        "model": checkpoint,
        **({"adapter": adapter} if adapter else {}),
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "images": sources,
    }

    if compare is not None:
        rows = compare_answers(processor, network, costs, images, question, compared, max_new_tokens, limit)
        if as_json:
            print(json.dumps({"question": question, "compare": rows, **setting}))
        else:
            print_table(rows)
        return

    conversation = Conversation(processor, network, images, num_visual_tokens, max_new_tokens, limit=limit)
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
    """The stages of a schedule that fit budgets, for a prompt and an answer of so many tokens."""
    if costs is None:
        raise UsageError("no costs are known for this model, so there can be no --max-flops or --max-seconds")
    request = {"num_images": num_images, "num_text_tokens": num_text_tokens, "num_new_tokens": num_new_tokens}
    try:
        return costs.schedule_within(schedule, **budgets, **request, dtype=dtype)
    except ValueError as error:
        message = str(error).replace("`max_flops`", "--max-flops").replace("`max_seconds`", "--max-seconds")
        raise UsageError(f"{message} Less is reckoned with for a smaller --max-new-tokens") from None


def split_question(arguments: list[str]) -> tuple[list[str], str | None]:
    """The last argument is the question unless it is, or by its suffix means to be, an image."""
    *images, last = arguments
    names_image = Path(last).suffix.lower() in Image.registered_extensions()
    if not images or last == "-" or is_url(last) or os.path.exists(last) or names_image:
        return arguments, None
    if not last.strip():
        raise UsageError("the question is empty")
    return images, last


def check_quoted(arguments: list[str], sources: list[str]):
    """Words of a question without quotes arrive as arguments of their own, and look like images."""
    for i, source in enumerate(sources[1:], 1):
        is_word = not is_url(source) and source != "-" and not os.path.exists(source)
        if is_word and Path(source).suffix.lower() not in Image.registered_extensions():
            question = " ".join(arguments[i:]).replace('"', "'")
            raise UsageError(f'file not found: {source}. A question must be in quotes: "{question}"')


def answer_one(conversation: Conversation, question: str, setting: dict | None):
    """Stream the answer, or print it as JSON with the setting, if one is given."""
    result = conversation.ask(question, print_now if setting is None else None)
    if setting is not None:
        print(json.dumps({"question": question, **result, **setting}), flush=True)


def chat(conversation: Conversation, setting: dict | None):
    """Answer one question after the other until there are no more."""
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
        except KeyboardInterrupt:  # ends the answer; the question is as if it had not been asked
            if not at_terminal:
                raise
            print(flush=True)
    if at_terminal:
        return
    if not asked:
        raise UsageError("no question: give one as the last argument, or one a line on stdin")
    if failed:
        raise typer.Exit(2)


def read_questions(at_terminal: bool) -> Iterator[tuple[int, str]]:
    """The lines of stdin that are not blank, with their numbers."""
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives `input` line editing and a history
        # where stdout is no terminal, `input` would write the prompt among the answers
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
    """One answer for each number of visual tokens, with its time and, up to its first token, its compute. What they share is
    computed once: the beginning of the prompt, which is left out of both, and the images, which count for each. "auto" goes on from
    no cache: for it the beginning counts, too."""
    import torch

    from ..prefix_cache import PrefixCache

    prefix = None
    with contextlib.suppress(ValueError):  # of a template whose prompts have no beginning in common
        prefix = PrefixCache(model, processor)
    num_cached = 0 if prefix is None else len(prefix)
    most = max(m if isinstance(m, int) else m.num_visual_tokens[-1] for m in compared)
    first = Conversation(processor, model, images, most, max_new_tokens)
    _, inputs = first.prepare(question)
    start = time.perf_counter()
    first.encode(inputs["pixel_values"])
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    encoding = time.perf_counter() - start
    num_text_tokens = inputs["input_ids"].shape[1] - len(images) * most
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
        else:  # of all stages that it went through, from the prompt's beginning
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
        # Text: an answer with [brackets] is no markup
        compute = "" if row["flops"] is None else f"{row['flops'] / 1e9:,.2f} GFLOP"
        m = f"auto: {row['num_visual_tokens']}" if "stage" in row else str(row["num_visual_tokens"])
        table.add_row(m, Text(row["answer"]), f"{row['seconds']:.2f} s", compute)
    Console(file=sys.stdout).print(table)
