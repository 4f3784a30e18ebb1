"""Options that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError


AUTO = "auto"
IMAGES_HELP = "Files, http(s) URLs or - for stdin, then the question."


class Dtype(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Model = Annotated[
    str | None,
    typer.Option(metavar="DIR_OR_REPO", help="Checkpoint: a folder or a Hub repository. Default: the shipped one."),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR_OR_REPO", help="LoRA adapter to merge. --model defaults to its base model."),
]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1, mps ...")]
WeightsDtype = Annotated[
    Dtype,
    typer.Option(help="Data type of the weights. auto: the checkpoint's, or float32 on a CPU with enough memory."),
]
LoadIn4bit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the language model in 4 bits.")]
LoadIn8bit = Annotated[bool, typer.Option("--load-in-8bit", help="Load the language model in 8 bits.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer in tokens.")]
ImageFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the images. Default: that of each data file.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions per batch.")]


def number_of_bits(load_in_4bit: bool, load_in_8bit: bool) -> int | None:
    """4, 8, or `None` if the weights are not quantized."""
    if load_in_4bit and load_in_8bit:
        raise UsageError("--load-in-4bit and --load-in-8bit are mutually exclusive")
    return 4 if load_in_4bit else 8 if load_in_8bit else None


def parse_num_visual_tokens(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"a number of visual tokens is an integer; got {text!r}") from None


def parse_num_visual_tokens_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else parse_num_visual_tokens(text)


def check_num_visual_tokens(num_visual_tokens: int | None, num_query_tokens: int) -> int:
    """m, checked to be from 1 to M. `None` stands for M."""
    if num_visual_tokens is None:
        return num_query_tokens
    if not 1 <= num_visual_tokens <= num_query_tokens:
        raise UsageError(
            f"the number of visual tokens must be from 1 to {num_query_tokens} with this model; got {num_visual_tokens}"
        )
    return num_visual_tokens
