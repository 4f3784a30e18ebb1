"""`mqt-llava serve`: transformers' own server. For many clients, vLLM: see the README."""

from importlib.util import find_spec
from itertools import pairwise

import typer

from .. import TINY_CHECKPOINT, MQTLlavaForConditionalGeneration
from .errors import UsageError
from .models import load_config, load_costs, place, resolve_device


def serve(context: typer.Context):
    """Serve a model with `transformers serve`, which on its own finds no model that transformers does not carry.

    The first argument is the checkpoint, a folder or a Hub repository; by default the shipped one. --load-in-4bit and
    --load-in-8bit quantize its language model. Other options are passed on, as they are, to `transformers serve`.
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
    if "--help" not in arguments:
        arguments = place_server(arguments)
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="mqt-llava")


def place_server(arguments: list[str]) -> list[str]:
    """Arguments for `transformers serve`, of a model that fits. Its own way to quantize leaves no part out, so it gets ours."""
    num_bits = [bits for bits in (4, 8) if f"--load-in-{bits}bit" in arguments]
    if len(num_bits) == 2:
        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other")
    arguments = [argument for argument in arguments if not argument.startswith("--load-in-")]
    num_bits = num_bits[0] if num_bits else None
    options = dict(pairwise(arguments)) | dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    device, checkpoint = resolve_device(options.get("--device", "auto")), arguments[0].partition("@")[0]
    config = load_config(checkpoint)
    dtype = options.get("--dtype", "auto")
    if dtype == "auto":  # the server takes the checkpoint's own, on a CPU too
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    placement = place(checkpoint, load_costs(checkpoint, config), device, dtype, num_bits)
    if num_bits is not None:
        from transformers.cli.serving.model_manager import ModelManager

        from ..quantization import quantization_config

        quantization = quantization_config(num_bits, device, placement.dtype)
        ModelManager.get_quantization_config = lambda self: quantization
    return arguments
