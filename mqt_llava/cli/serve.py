"""`mqt-llava serve`: transformers' own server. For many clients, vLLM: see the README."""

from importlib.util import find_spec

import typer

from .. import TINY_CHECKPOINT, MQTLlavaForConditionalGeneration
from .errors import UsageError


def serve(context: typer.Context):
    """Serve a model with `transformers serve`, which on its own finds no model that transformers does not carry.

    The first argument is the checkpoint, a folder or a Hub repository; by default the shipped one. Options are passed on, as
    they are, to `transformers serve`.
    """
    missing = [name for name in ("fastapi", "uvicorn", "pydantic", "openai") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} is missing, for transformers' server: pip install 'transformers[serving]'"
        )
    import transformers.cli.serve  # loads `transformers`, which is another object afterwards
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    # Where the server looks classes up by name
    name = MQTLlavaForConditionalGeneration.__name__
    setattr(transformers, name, MQTLlavaForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mqt_llava"] = name

    arguments = ["--help" if argument == "-h" else argument for argument in context.args]
    if not arguments or arguments[0].startswith("-"):
        arguments.insert(0, TINY_CHECKPOINT)
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="mqt-llava")
