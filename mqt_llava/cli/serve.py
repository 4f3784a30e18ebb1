"""`mqt-llava serve`: transformers' own server. For many clients, vLLM: see the README."""

import typer

from .. import TINY_CHECKPOINT, MQTLlavaForConditionalGeneration
from .errors import UsageError


def serve(context: typer.Context):
    """Serve a model with `transformers serve`, which on its own finds no model that transformers does not carry.

    The first argument is the checkpoint, a folder or a Hub repository; by default the shipped one. Options are passed on, as
    they are, to `transformers serve`.
    """
    try:
        import transformers.cli.serve  # loads `transformers`, which is another object afterwards
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError as error:
        raise UsageError(f"{error.name or error} is missing: pip install 'mqt-llava[serve]'") from None

    # Where the server looks classes up by name
    name = MQTLlavaForConditionalGeneration.__name__
    setattr(transformers, name, MQTLlavaForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mqt_llava"] = name

    arguments = list(context.args)
    if not arguments or arguments[0].startswith("-"):
        arguments.insert(0, TINY_CHECKPOINT)
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="mqt-llava")
