"""Put `mqt-llava-tiny` together: a pretrained vision tower, a pretrained language model and a fresh query transformer.

For CLIP and a language model of one's own use `mqt-llava convert LANGUAGE_MODEL DST --vision-tower TOWER`. This differs in
what the query transformer begins as, and takes features from the tower's last layer.

    python -m recipes.tiny.assemble --vision_tower runs/vision --language_model runs/text --output_dir runs/start
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, HfArgumentParser, set_seed

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaProcessor


@dataclass
class AssembleArguments:
    """The parts. The processor is that of the language model's folder."""

    vision_tower: str
    language_model: str
    output_dir: str
    num_attention_heads: int = 8
    seed: int = 42


def gazes(side):
    """What the queries look at to begin with, from coarse to fine, `(side * side, side * side)` masks of patches: the whole picture, its
    quarters, its 3 x 3 cells, then squares of 2 x 2 patches, in an order whose beginnings cover the picture evenly."""

    def box(top, left, height, width):
        mask = torch.zeros(side, side)
        mask[top : top + height, left : left + width] = 1
        return mask.flatten()

    half, cell = side // 2, -(-side // 3)
    starts = [0, (side - cell) // 2, side - cell]
    coarse = [box(0, 0, side, side)]
    coarse += [box(y, x, half, half) for y in (0, half) for x in (0, half)]
    coarse += [box(y, x, cell, cell) for y in starts for x in starts]
    fine = [box(y, x, 2, 2) for y in range(side - 1) for x in range(side - 1)]
    fine = [fine[17 * i % len(fine)] for i in range(len(fine))]
    return torch.stack([*coarse, *fine, *fine][: side * side])  # of 8 x 8 queries one has a square for the second time


@torch.no_grad()
def look_from_coarse_to_fine(query_transformer):
    """
    Begin with visual tokens that each show a part of the picture, as [`gazes`] has it.

    With small random projections every query attends evenly to all patches, and all visual tokens begin as the same average. Here queries and keys share a projection that tells rows and columns, a query is the mean
    of the positions that it looks at, and the values go through rotations, in which nothing is lost.
    """
    width, head_dim = query_transformer.q_proj.in_features, query_transformer.head_dim
    positions, side = query_transformer.position_embedding, math.isqrt(query_transformer.num_query_tokens)
    masks = gazes(side)
    query_transformer.query.copy_(masks / masks.sum(1, keepdim=True) @ positions - positions)

    index = torch.arange(side * side)
    lines = F.one_hot(torch.stack([index // side, index % side]), side).permute(1, 0, 2).flatten(1).float()
    keys = F.layer_norm(positions, (width,))
    # Ridge regression: a key tells its row and its column, and its own row and column match by 10 each
    read = torch.linalg.solve(keys.T @ keys + torch.eye(width), keys.T @ (lines - lines.mean(0))).T
    read = read * (10 * head_dim**0.5) ** 0.5
    rest = torch.randn(head_dim - 2 * side, width) * 0.3 * width**-0.5
    projection = torch.cat([read, rest]).repeat(width // head_dim, 1)
    for layer in (query_transformer.q_proj, query_transformer.k_proj):
        layer.weight.copy_(projection)
    nn.init.orthogonal_(query_transformer.v_proj.weight)
    nn.init.eye_(query_transformer.out_proj.weight)
    nn.init.orthogonal_(query_transformer.text_proj.weight)


def assemble(vision_tower, language_model, processor, num_attention_heads):
    """An MQT-LLaVA of a pretrained vision tower, a pretrained language model and a fresh query transformer."""
    vision_tower = AutoModel.from_pretrained(vision_tower)
    language_model = AutoModelForCausalLM.from_pretrained(language_model)
    config = MQTLlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_id=processor.image_token_id,
        num_query_tokens=processor.num_query_tokens,
        query_transformer_num_attention_heads=num_attention_heads,
        vision_feature_layer=-1,
    )
    model = MQTLlavaForConditionalGeneration(config)
    look_from_coarse_to_fine(model.model.query_transformer)
    used = model.model.vision_tower.state_dict().keys()  # not the last norm, which is behind the features
    weights = vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({name: weights[name] for name in used})
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    tokenizer = processor.tokenizer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def main():
    (arguments,) = HfArgumentParser(AssembleArguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    processor = MQTLlavaProcessor.from_pretrained(arguments.language_model)
    heads = arguments.num_attention_heads
    model = assemble(arguments.vision_tower, arguments.language_model, processor, heads)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
