"""A checkpoint of the authors' layout with the tensors of MQT-LLaVA 7B, random, in bfloat16, and with any number of layers."""

import json
import shutil
from pathlib import Path

import torch

from mqt_llava.conversion.files import LazyTensor, write_shards
from tests.reference import official_layout


HIDDEN, HEADS, INTERMEDIATE, VOCAB = 4096, 32, 11008, 32000
CLIP_LAYERS, CLIP_INTERMEDIATE, CLIP_SIDE, CLIP_PATCH = 24, 4096, 336, 14


def random_tensors(layers: int) -> dict[str, LazyTensor]:
    """Names, shapes and scales are those of the reference's script. A tensor is drawn when it is loaded, always the same."""
    spec = official_layout.llm_tensors(HIDDEN, layers, HEADS, HEADS, INTERMEDIATE, VOCAB)
    spec |= official_layout.resampler_tensors(HIDDEN)
    tower = official_layout.clip_tensors(CLIP_LAYERS, CLIP_INTERMEDIATE, CLIP_SIDE, CLIP_PATCH)
    spec |= {official_layout.VT + name: value for name, value in tower.items()}
    # Residuals add up: at the scales for two layers, all answers of 32 would be one token over and over
    damping = dict.fromkeys(("o_proj.weight", "down_proj.weight"), layers**-0.5)

    def draw(seed, shape, mean, std):
        if mean is None:  # the position table is computed
            side, width = official_layout.NUM_QUERIES_SIDE, official_layout.VISION_WIDTH
            return torch.from_numpy(official_layout.sincos_table(side, width)).bfloat16()
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(std).add_(mean)

    tensors = {}
    for seed, (name, (shape, mean, std)) in enumerate(sorted(spec.items())):
        factor = next((factor for end, factor in damping.items() if name.endswith(end) and "model.layers." in name), 1)
        scale = None if std is None else std * factor
        tensors[name] = LazyTensor(
            shape, torch.bfloat16, lambda seed=seed, shape=shape, mean=mean, std=scale: draw(seed, shape, mean, std)
        )
    return tensors


def write_source(folder: Path, layers: int, as_bin: bool = False):
    """Write it: configs and tokenizer by the reference's script, weights in safetensors shards of 5 GB, a few tensors in
    memory at a time, or as one `.bin` file, all of them in memory."""
    small = folder.with_name(folder.name + "-small")
    tokenizer = Path(official_layout.__file__).parent / "tokenizer.model"
    official_layout.write_checkpoint(
        small, layers=1, hidden=64, heads=2, kv_heads=2, vocab=64, clip_path="clip", tokenizer_model=str(tokenizer)
    )
    folder.mkdir(parents=True)
    for file in small.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, folder)
    shutil.rmtree(small)
    shutil.rmtree(folder.with_name("clip"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(layers)
    if as_bin:
        torch.save({name: tensor.load() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    else:
        write_shards(folder, tensors, "5GB")
