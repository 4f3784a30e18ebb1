"""`mqt-llava serve`: transformers' own server. For many clients, use vLLM: see docs/serve.md."""

from importlib.util import find_spec
from itertools import pairwise

import typer

from .. import TINY_CHECKPOINT
from .errors import UsageError
from .models import load_config, load_costs, loading, place, resolve_device
from .options import Dtype, number_of_bits


def serve(context: typer.Context):
    """Serve a model with `transformers serve`.

    On its own, `transformers serve` finds only models that are part of transformers. The first argument is the checkpoint, a folder or a Hub repository. It defaults to the shipped one. --load-in-4bit and
    --load-in-8bit quantize its language model. Other options are passed on to `transformers serve`: --help-all shows them.

    \b
    mqt-llava serve
    mqt-llava serve DIR_OR_REPO --port 8000 --load-in-8bit
    """
    if any(option in context.args for option in ("-h", "--help")):
        print(context.get_help())
        return
    missing = [name for name in ("fastapi", "uvicorn", "pydantic", "openai") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} is missing, for transformers' server: pip install 'transformers[serving]'"
        )
    import transformers.cli.serve  # replaces the `transformers` module by another object
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from .. import MQTLlavaForConditionalGeneration

    # The server looks classes up by name
    name = MQTLlavaForConditionalGeneration.__name__
    setattr(transformers, name, MQTLlavaForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mqt_llava"] = name

    arguments = ["--help" if argument == "--help-all" else argument for argument in context.args]
    if not arguments or arguments[0].startswith("-"):
        arguments.insert(0, TINY_CHECKPOINT)
    if "--help" not in arguments:
        arguments = place_server(arguments)
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="mqt-llava")


def place_server(arguments: list[str]) -> list[str]:
    """Arguments for `transformers serve` with a placement that fits. Quantization is ours: the server's own leaves no part out."""
    num_bits = number_of_bits("--load-in-4bit" in arguments, "--load-in-8bit" in arguments)
    arguments = [argument for argument in arguments if not argument.startswith("--load-in-")]
    checkpoint, options = arguments[0].partition("@")[0], dict(pairwise(arguments))
    options |= dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    config = load_config(checkpoint)
    device, dtype = options.get("--device", "auto"), options.get("--dtype", "auto")
    if "--quantization" in options or not device.startswith(("auto", "cpu", "cuda", "mps")):
        if num_bits is not None:
            raise UsageError(f"--load-in-{num_bits}bit cannot be combined with --quantization or --device {device}")
        return arguments  # checked by the server
    if dtype not in list(Dtype):
        raise UsageError(f"--dtype is one of {', '.join(Dtype)}; got {dtype}")
    if dtype == "auto":  # the server uses the checkpoint's own, on a CPU too
        from ..placement import stored_dtype

        dtype = str(stored_dtype(config)).removeprefix("torch.")
    device = resolve_device(device)
    placement = place(checkpoint, config, load_costs(config), device, Dtype(dtype), num_bits)
    if placement.options:  # the last one counts
        arguments = [*arguments, "--device", "auto"]
    if num_bits is not None:
        from transformers.cli.serving.model_manager import ModelManager

        from ..quantization import quantization_config

        with loading(checkpoint):
            quantization = quantization_config(num_bits, device, placement.dtype)
        ModelManager.get_quantization_config = lambda self: quantization  # type: ignore[method-assign]  # no option takes ours
    return arguments
