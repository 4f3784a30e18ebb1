"""Loading checkpoints for the commands: quietly, onto a device, with errors of one line."""

import contextlib
import json
import os
import re
import sys
import warnings
from logging import getLogger
from pathlib import Path
from typing import Any

from .. import TINY_CHECKPOINT
from .errors import UsageError
from .options import AUTO, Dtype


EXTRAS = {"peft": "train", "bitsandbytes": "quantize", "torchao": "quantize"}  # the extra that installs a library


def load_schedule(model):
    """The schedule that "auto" stands for with this checkpoint."""
    from ..modeling.adaptive_mqt_llava import resolve_schedule

    try:
        schedule = resolve_schedule(AUTO, [model.generation_config], model.config.num_query_tokens)
    except ValueError as error:
        if getattr(model.generation_config, "visual_token_schedule", None) is not None:
            raise UsageError(str(error)) from None
        raise UsageError(
            f"this checkpoint has no schedule for {AUTO}: choose one with `mqt-llava calibrate`"
        ) from None
    if schedule is not None and schedule.calibration is None:
        print(f"{AUTO} was not calibrated for this checkpoint: see `mqt-llava calibrate`", file=sys.stderr)
    return schedule


def silence_libraries():
    """Hide warnings and progress bars of loading. Downloads still show their progress."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    for library in ("accelerate", "bitsandbytes"):
        getLogger(library).setLevel("ERROR")
    downloads_are_silent = are_progress_bars_disabled()
    logging.disable_progress_bar()
    if not downloads_are_silent:
        enable_progress_bars()


@contextlib.contextmanager
def loading(checkpoint: str, kind: str = "model"):
    """Report in one line whatever goes wrong while a checkpoint loads."""
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[{extra}]'") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(":") or type(error).__name__
        raise UsageError(f"cannot load the {kind} {checkpoint}: {reason}") from None


def name_checkpoint(model: str | None, adapter: str | None = None) -> str:
    """The folder or repository of `--model`. Defaults to the base model of `--adapter`, or to the shipped checkpoint."""
    if model is not None:
        return model
    if adapter is not None:
        with loading(adapter, "adapter"):
            from peft import PeftConfig

            base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
            if not base:
                raise ValueError("its adapter_config.json names no base model; name it with --model DIR_OR_REPO")
            return base
    if not os.path.isdir(TINY_CHECKPOINT):
        raise UsageError(
            f"the shipped checkpoint is missing ({TINY_CHECKPOINT}); choose another with --model DIR_OR_REPO"
        )
    return TINY_CHECKPOINT


def load_config(checkpoint: str):
    """The config of a folder or repository, read by this package. Code in the checkpoint does not run."""
    from transformers import PreTrainedConfig

    from .. import MQTLlavaConfig

    is_repository = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", checkpoint)
    if os.path.isfile(checkpoint) or (not is_repository and not os.path.isdir(checkpoint)):
        problem = "that is a file, not a folder" if os.path.isfile(checkpoint) else "there is no such folder"
        raise UsageError(f"cannot load the model {checkpoint}: {problem}")
    with loading(checkpoint):
        model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
        if not model_type:
            raise ValueError("its config.json names no model_type")
    if model_type.startswith("llava_"):
        raise UsageError(
            f"{checkpoint} is a checkpoint of the authors' code; convert it first: mqt-llava convert {checkpoint} FOLDER"
        )
    if model_type != MQTLlavaConfig.model_type:
        raise UsageError(f"not an MQT-LLaVA model but {model_type}: {checkpoint}")
    with loading(checkpoint):
        return MQTLlavaConfig.from_pretrained(checkpoint)


def find_file(checkpoint: str, name: str) -> Path:
    """A file of a folder or repository. An `OSError` if there is none."""
    from transformers.utils import cached_file

    return Path(cached_file(checkpoint, name))  # type: ignore[arg-type]  # None only if asked not to raise


def load_processor(checkpoint: str):
    from transformers import AutoProcessor

    with loading(checkpoint, "tokenizer of"):
        # without this file transformers would build a tokenizer with other ids from another one
        path = find_file(checkpoint, "tokenizer.json")
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path.name} is damaged") from None
    with loading(checkpoint, "processor of"):
        return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)


def load_costs(config):
    """The [`CostModel`] of a checkpoint, by its config. `None` for a language model that it does not support."""
    from ..cost import CostModel

    with contextlib.suppress(Exception):  # models may raise anything on tensors without data
        return CostModel(config)


def place(checkpoint: str, config, costs, device, dtype: Dtype, num_bits: int | None = None, **request):
    """
    Find how the model fits into free memory. A line on stderr says if it is not loaded in the ordinary way.

    Args:
        costs (`CostModel`, *optional*): without it the model is assumed to fit.
        request: see [`~mqt_llava.placement.place_model`].

    Returns:
        [`~mqt_llava.placement.Placement`].

    Raises:
        `UsageError`: if it does not fit.
    """
    import torch

    from ..placement import Placement, place_model, stored_dtype

    chosen = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    longest = getattr(config.text_config, "max_position_embeddings", None)
    if longest and "num_new_tokens" in request:
        request["num_new_tokens"] = min(request["num_new_tokens"], longest)
    if costs is None:
        return Placement(chosen or (torch.float32 if device.type == "cpu" else stored_dtype(config)))
    try:
        placement = place_model(costs, device, chosen, num_bits, **request)
    except ValueError as error:
        raise UsageError(f"cannot load the model {checkpoint}: {error}") from None
    if placement.note:
        print(placement.note, file=sys.stderr)
    return placement


def place_and_load(
    checkpoint: str,
    config,
    costs,
    device: str,
    dtype: Dtype,
    adapter: str | None = None,
    num_bits: int | None = None,
    compute_dtype: Dtype = Dtype.auto,
    **request: Any,
):
    """
    Load processor and model as the options of a command say, if they fit into free memory. See [`place`] and [`load_model`].

    Returns:
        `tuple`: the processor and the model.

    Raises:
        `UsageError`: if they do not fit, if they cannot be loaded, and for a `compute_dtype` that does not go with the others.
    """
    import torch

    chosen = resolve_device(device)
    if compute_dtype is not Dtype.auto and chosen.type != "cpu":
        raise UsageError(f"--compute-dtype is for a CPU; the model would be on {chosen}")
    placement = place(checkpoint, config, costs, chosen, dtype, num_bits, **request)
    if compute_dtype not in (Dtype.auto, Dtype.float32) and getattr(torch, compute_dtype.value) != placement.dtype:
        raise UsageError(f"--compute-dtype is float32 or that of the weights; got {compute_dtype.value}")
    return load_model(checkpoint, chosen, placement, adapter, num_bits, compute_dtype.value)


def load_model(
    checkpoint: str, device, placement, adapter: str | None = None, num_bits: int | None = None, compute: str = "auto"
):
    """
    Load processor and model, ready to answer, with progress bars on a terminal. An adapter is merged, unless the weights are quantized.

    Args:
        device (`torch.device`): from [`resolve_device`].
        placement (`Placement`): from [`place`].
        num_bits (`int`, *optional*): 4 or 8, to quantize the language model.
        compute (`str`): data type in which a CPU multiplies many tokens. `"auto"`: that of the weights, or float32 if it is faster.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from ..cpu import compute_in_float32, is_slow

    processor = load_processor(checkpoint)
    options = placement.options
    with loading(checkpoint), showing_progress() as bar:
        if num_bits is not None:
            from ..quantization import quantization_config

            quantization = quantization_config(num_bits, device, placement.dtype)
            options = {"device_map": {"": device}, "quantization_config": quantization}
        model: Any
        report: Any
        model, report = AutoModelForImageTextToText.from_pretrained(  # type: ignore[misc]  # a pair, with the loading info
            checkpoint, dtype=placement.dtype, trust_remote_code=False, output_loading_info=True, **options
        )
        if report["missing_keys"]:  # transformers would warn and use random weights
            raise ValueError(f"no weights for {', '.join(sorted(report['missing_keys']))}")
        if adapter is not None:
            with loading(adapter, "adapter"):
                from ..training.adapters import load_adapter

                model = load_adapter(model, adapter)
                if num_bits is None:
                    model = model.merge_and_unload()
                if Path(adapter, "generation_config.json").exists():  # from `mqt-llava calibrate --adapter`
                    model.generation_config = GenerationConfig.from_pretrained(adapter)
        if not options:
            model = model.to(device)
        if device.type == "cpu" and num_bits is None:
            read_mapped(model, bar)
    if compute == "float32" or (compute == "auto" and device.type == "cpu" and is_slow(placement.dtype)):
        compute_in_float32(model)
    return processor, model.eval()


@contextlib.contextmanager
def showing_progress():
    """Progress bars on stderr for what takes more than a second, including those of transformers. Yields the function that makes one."""
    from tqdm import tqdm
    from transformers.utils import logging

    def bar(_, args, options):
        # `None` disables it unless stderr is a terminal
        return tqdm(*args, **options | {"disable": None, "delay": 1, "leave": False})

    before = logging.set_tqdm_hook(bar)
    try:
        yield bar
    finally:
        logging.set_tqdm_hook(before)


def read_mapped(model, bar):
    """Read weights that are mapped from their files. Otherwise the first answer would read them, without progress."""
    import torch

    total = sum(parameter.nbytes for parameter in model.parameters())
    options = {"desc": "Reading weights", "total": total, "unit": "B", "unit_scale": True}
    with bar(None, (), options) as shown:
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.is_contiguous() and parameter.numel():
                parameter.detach().flatten().view(torch.uint8)[::4096].max()  # one byte of each page
            shown.update(parameter.nbytes)


def resolve_device(name: str):
    import torch

    if name == "auto":
        gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((gpu for gpu, backend in gpus.items() if backend.is_available()), "cpu")
    try:
        tensor = torch.zeros(1, device=name)
        tensor.cpu()  # not possible on `meta`, which holds no data
        return tensor.device
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"cannot use the device {name!r}: {reason}") from None
