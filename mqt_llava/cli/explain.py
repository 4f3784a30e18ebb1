"""`mqt-llava explain IMAGE... QUESTION`: a picture of what the answer depends on."""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .ask import check_quoted, split_question
from .errors import UsageError, requiring
from .images import load_image
from .models import load_config, load_costs, load_model, name_checkpoint, place, resolve_device, silence_libraries
from .options import IMAGES_HELP, Dtype, check_num_visual_tokens, parse_num_visual_tokens


NUM_TEXT_TOKENS = 256  # of the prompt, for the estimate of memory
FORMATS = (".png", ".jpg", ".pdf", ".svg", ".webp")


class Method(str, Enum):  # as `mqt_llava.explain.METHODS`
    integrated_gradients = "integrated_gradients"
    gradient = "gradient"
    attention = "attention"
    rollout = "rollout"
    occlusion = "occlusion"


def explain(
    images_and_question: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", show_default=False, help=IMAGES_HELP)
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help=f"Picture to write: {', '.join(FORMATS)}.")],
    model: options.Model = None,
    adapter: options.Adapter = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="M[,M,...]",
            help="Visual tokens per image: one number, to explain the answer and its words, or several, to compare answers. "
            "Default: all.",
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Attribution method. docs/explain.md compares them.")
    ] = Method.integrated_gradients,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per batch of the language model. A smaller batch needs less memory.")
    ] = 16,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object for each m, with the values of heat maps and visual tokens."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
):
    """Show which parts of an image an answer depends on.

    The picture has heat maps over the image, and the effect of each visual token.

    \b
    mqt-llava explain photo.jpg "What is this?" --num-visual-tokens 16 --output words.png
    mqt-llava explain photo.jpg "What is this?" --num-visual-tokens 8,16,64,256 --output sheet.png
    """
    sources, question = split_question(images_and_question)
    if question is None:
        raise UsageError("explain needs a question as its last argument")
    if sources.count("-") > 1:
        raise UsageError("only one image can come from stdin (-)")
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}; got {output}")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists: choose another file, or use --overwrite")
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}")
    asked: list[int | None] = [None]
    if num_visual_tokens is not None:
        asked = [parse_num_visual_tokens(text) for text in num_visual_tokens.split(",")]
    check_quoted(images_and_question, sources)
    images = [load_image(source) for source in sources]
    with requiring("plot"):
        import matplotlib  # noqa: F401

    silence_libraries()
    from .. import explain as explaining
    from ..placement import free_memory, gigabytes

    checkpoint = name_checkpoint(model, adapter)
    config = load_config(checkpoint)
    sizes = [check_num_visual_tokens(m, config.num_query_tokens) for m in asked]
    chosen = resolve_device(device)
    request: dict[str, Any] = {
        "num_images": len(images),
        "num_text_tokens": NUM_TEXT_TOKENS,
        "num_new_tokens": max_new_tokens,
    }
    costs = load_costs(config)
    placement = place(checkpoint, config, costs, chosen, dtype, **request)
    per_word = len(sizes) == 1
    if costs is not None:
        request |= {"num_words": max_new_tokens if per_word else 1, "method": method.value, "batch_size": batch_size}
        extra = explaining.extra_bytes(costs, max(sizes), dtype=placement.dtype, **request)
        weights = sum(costs(dtype=placement.dtype).weight_bytes.values())
        print(
            f"needs up to {gigabytes(extra)} beside the weights' {gigabytes(weights)}, less with a smaller --batch-size; {chosen} "
            f"has {gigabytes(free_memory(chosen))} free",
            file=sys.stderr,
        )
    processor, loaded = load_model(checkpoint, chosen, placement, adapter)
    settings: dict[str, Any] = {"per_word": per_word, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    explanations = []
    try:
        encoded = explaining.EncodedImages(loaded, processor, images, max(sizes))
        for m in sizes:
            one = explaining.explain(loaded, processor, encoded, question, m, method.value, **settings)
            print(json.dumps(as_numbers(one)) if as_json else f"m = {m}: {one.answer}", flush=True)
            explanations.append(one)
    except ValueError as error:
        raise UsageError(str(error).rstrip(".")) from None
    save(explaining.sheet(explanations), output)
    print(f"drawn to {output}", file=sys.stderr)


def as_numbers(explanation) -> dict:
    """An [`Explanation`] for JSON."""
    heat = [[rounded(of_image) for of_image in explanation.heat(word)] for word in range(len(explanation.words))]
    tokens = explanation.tokens and [rounded(of_image) for of_image in explanation.tokens]
    return {
        "question": explanation.question,
        "answer": explanation.answer,
        "num_visual_tokens": explanation.visual_token_counts[0],
        "method": explanation.method,
        "words": explanation.words,
        "log_probs": rounded(explanation.log_probs),
        "answer_heat": [rounded(of_image) for of_image in explanation.heat()],
        "heat": heat,
        "tokens": tokens,
    }


def rounded(tensor) -> list:
    return (tensor.double() * 1e6).round().div(1e6).tolist()


def save(figure, output: Path):
    """Write a temporary file and move it into place."""
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=output.suffix[1:].lower(), dpi=150)
        partial.replace(output)
    except OSError as error:
        raise UsageError(f"cannot draw to {output}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
