"""What the authors' stage 1 leaves: the query transformer alone, `query_abstractor.bin`, beside a base model."""

from pathlib import Path

from .authors import TEXT_MODEL_TYPES
from .files import LazyTensor, fetch, read_file, read_json, read_tensors
from .full import plan_of_tensors
from .names import AUTHORS_QUERY_TRANSFORMER
from .plan import Plan


FILES = ("query_abstractor.bin", "mm_query_abstractor.bin")  # the second in the trainer's own checkpoint folders


def find(source: Path) -> Path | None:
    if source.is_file():
        if source.suffix != ".bin":
            raise ValueError(f"{source} is a file; name the folder that it is in, or a {FILES[0]}")
        return source
    return next((source / name for name in FILES if (source / name).exists()), None)


def recognise(source: Path) -> bool:
    return find(source) is not None


def plan(source: Path, vision_tower: str | None = None, base_model: str | None = None) -> Plan:
    file = find(source)
    if file is None:
        raise ValueError(f"{source} has none of the files {', '.join(FILES)}")
    if base_model is None:
        raise ValueError("stage-1 weights are the query transformer alone; name the language model with --base-model")
    base = fetch(base_model)
    config_file = file.parent / "config.json"
    settings = read_json(config_file) if config_file.exists() else {}
    return plan_of_tensors(
        "stage-1 weights",
        file.parent,
        combine(read_json(base / "config.json"), settings, base_model),
        {**language_model(read_tensors(base)), **query_transformer(read_file(file), file)},
        vision_tower,
        tokenizer_folder=base,
    )


def combine(base: dict, settings: dict, base_model: str) -> dict:
    """An authors' config: the language model's, and what the trained folder's config says about images."""
    known = {model_type: name for name, model_type in TEXT_MODEL_TYPES.items()}
    if base.get("model_type") not in known:
        raise ValueError(f"{base_model} is a {base.get('model_type')!r} model; known are {', '.join(known)}")
    images = {key: value for key, value in settings.items() if key.startswith(("mm_", "image_", "query_"))}
    return {
        "mm_vision_select_layer": -2,
        **base,
        **images,
        "model_type": known[base["model_type"]],
        "_name_or_path": base_model,
    }


def language_model(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A causal language model's tensors; an `lm_head` that is tied to the embeddings is left to the config."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(AUTHORS_QUERY_TRANSFORMER)}


def query_transformer(tensors: dict[str, LazyTensor], file: Path) -> dict[str, LazyTensor]:
    """The query transformer's tensors under their full names, whatever wrappers a trainer put before them."""
    marker = AUTHORS_QUERY_TRANSFORMER.removeprefix("model.")
    unknown = [name for name in tensors if marker not in name]
    if unknown:
        raise ValueError(f"{file} holds more than a query transformer: {', '.join(unknown[:3])}")
    return {AUTHORS_QUERY_TRANSFORMER + name.split(marker, 1)[1]: tensor for name, tensor in tensors.items()}
