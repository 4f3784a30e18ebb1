"""`mqt-llava card FOLDER --results DIR`: add results of `mqt-llava evaluate` to the model card of a checkpoint or an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError


def card(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint or an adapter.")],
    results: Annotated[Path, typer.Option(metavar="DIR", help="Output folder of `mqt-llava evaluate`.")],
):
    """Add results to the model card of a checkpoint or an adapter.

    The section "Accuracy and compute" of README.md is replaced; the rest of the file stays. accuracy.json, which `mqt-llava cost` reads,
    and the Hub's .eval_results are copied.

    \b
    mqt-llava card my-mqt-llava --results results
    """
    from ..hub import show_results

    try:
        written = show_results(folder, results)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    print(f"written to {folder}: {', '.join(written)}")
