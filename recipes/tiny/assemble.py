"""Put the first edition of `mqt-llava-tiny` together: a pretrained vision tower, a pretrained language model and a fresh query transformer.

For CLIP and a language model of one's own use `mqt-llava convert LANGUAGE_MODEL DST --vision-tower TOWER`. This differs in
what the query transformer begins as, and takes features from the tower's last layer.

    python -m recipes.tiny.assemble --vision_tower runs/vision --language_model runs/text --output_dir runs/start
"""

from dataclasses import dataclass

import torch
from torch import nn
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


@torch.no_grad()
def start_local(query_transformer):
    """Let half of the heads of a fresh query transformer look at the patches around each query's own place.

    With small random projections every query attends evenly to all patches, so all visual tokens begin as the same
    average and take long to part. Where queries and keys share a projection, nearby positions match best. The other
    half stays even, so that the first tokens, which stand in a corner, begin with the whole picture in view.
    """
    width = query_transformer.q_proj.in_features
    for projection in (query_transformer.v_proj, query_transformer.out_proj, query_transformer.text_proj):
        nn.init.normal_(projection.weight, std=width**-0.5)
    nn.init.normal_(query_transformer.k_proj.weight, std=2 * width**-0.5)
    nn.init.normal_(query_transformer.q_proj.weight, std=0.1 * width**-0.5)
    query_transformer.q_proj.weight[: width // 2] = query_transformer.k_proj.weight[: width // 2]


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
    start_local(model.model.query_transformer)
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
