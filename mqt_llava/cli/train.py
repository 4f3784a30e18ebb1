"""`mqt-llava train --stage 1|2`: the paper's two stages."""

import typer

from .errors import UsageError
from .models import load_config
from .runs import check_memory, running


def train(context: typer.Context):
    """Train in the paper's two stages, with the paper's values. See `mqt-llava train --help`.

    Options are passed on, as they are, to `mqt_llava.training.arguments`.
    """
    try:
        import torch

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
        config = load_config(arguments.model)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None
    with running(training.output_dir, {"resume": "--resume", "overwrite": "--overwrite"}):
        parts = ("query_transformer", "embeddings", "language_model", "lm_head")[: 1 if arguments.stage == 1 else None]
        num_moments = 2 if training.optim in ("adamw_torch", "adamw_torch_fused") else 0
        dtype = getattr(torch, arguments.dtype)
        check_memory(
            training, arguments.model, config, dtype, "--dtype bfloat16", parts=parts, num_moments=num_moments
        )
        train_stage(arguments, training)
