"""`mqt-llava train --stage 1|2`: the paper's two stages."""

import typer

from .errors import UsageError
from .models import load_config
from .runs import running


def train(context: typer.Context):
    """Train in the paper's two stages, with the paper's values. See `mqt-llava train --help`.

    Options are passed on, as they are, to `mqt_llava.training.arguments`.
    """
    try:
        from ..training.arguments import help_text, parse_arguments
        from ..training.train import train as train_stage
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[train]'") from None

    for option in ("-h", "--help", "--help-all"):
        if option in context.args:
            print(help_text(everything=option == "--help-all"), end="")
            return
    try:
        arguments, training = parse_arguments(context.args)
        if arguments.eval_num_visual_tokens and not arguments.eval_data_path:
            raise UsageError("--eval_num_visual_tokens needs --eval_data_path")
        load_config(arguments.model)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None
    with running(training.output_dir, {"resume": "--resume", "overwrite": "--overwrite"}):
        train_stage(arguments, training)
