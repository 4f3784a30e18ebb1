"""Small checkpoints in the authors' layouts. Their code fixes a width of 1024, 576 patches and 256 queries; the rest is tiny."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.reference import official_layout


PIECES = 300  # of the small tokenizer
SMALL = {
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 48,
    "vocab": PIECES,
    "clip_layers": 2,
    "clip_intermediate": 16,
    "dtype": "bfloat16",
}
QUERY_TRANSFORMER = "model.query_abstractor."
VISION_TOWER = "model.vision_tower.vision_tower."


def train_tokenizer(path: Path):
    """A SentencePiece model as Llama's, of few pieces."""
    from sentencepiece import SentencePieceTrainer

    words = "a an the cat dog this that it is in on image picture user assistant describe what where one thing detail"
    SentencePieceTrainer.train(
        sentence_iterator=iter([words, "USER: What is this? ASSISTANT: A cat.", words.upper()] * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def write_authors(folder: Path, tokenizer_model: Path, **layout) -> Path:
    """A checkpoint and, beside it, the folder `clip` of its vision tower."""
    official_layout.write_checkpoint(folder / "ckpt", tokenizer_model=str(tokenizer_model), **(SMALL | layout))
    return folder / "ckpt"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in folder.glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], suffix=".safetensors", shards=1):
    """Replace a folder's weights by `tensors`, in so many files."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")]:
        path.unlink()
    stem, save = ("model", save_file) if suffix == ".safetensors" else ("pytorch_model", torch.save)
    if shards == 1:
        save(tensors, folder / (stem + suffix))
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_json(path: Path, **changes):
    """Set keys of a JSON file; `None` removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
