"""`mqt-llava train --stage 1|2`: the paper's two stages."""

import typer

from .errors import UsageError
from .models import load_config


def train(context: typer.Context):
    """Train in the paper's two stages, with the paper's values. See `mqt-llava train --help`.

    Options are passed on, as they are, to `mqt_llava.training.arguments`.
    """
    try:
        from ..training.arguments import parse_arguments
        from ..training.train import train as train_stage
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[train]'") from None

    try:
        arguments, training = parse_arguments(context.args)
        load_config(arguments.model)
        train_stage(arguments, training)
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None
