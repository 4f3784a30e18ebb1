"""The two stages of MQT-LLaVA's training (arXiv 2405.19315, section 3), the vision tower frozen in both.

Stage 1 aligns: only the query transformer trains, on captions, with all M visual tokens. Stage 2 tunes: the query
transformer and the language model train on conversations, with m drawn from {2, 4, ..., M} at every step.

    python -m mqt_llava.training.train --stage 1 --vision_tower runs/vision --language_model runs/text \
        --data_path runs/data/captions.json --image_folder runs/data/images --output_dir runs/stage1
    python -m mqt_llava.training.train --stage 2 --model runs/stage1 \
        --data_path runs/data/conversations.json --image_folder runs/data/images --output_dir runs/stage2
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .. import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaProcessor
from .collator import MQTLlavaDataCollator
from .data import load_conversations
from .sampling import VisualTokenSampler
from .trainer import MQTLlavaTrainer


@dataclass
class StageArguments:
    """What is trained on what. Optimisation is set by `TrainingArguments`."""

    stage: int = field(metadata={"help": "1 or 2", "choices": [1, 2]})
    data_path: str = field(metadata={"help": "LLaVA conversation JSON"})
    image_folder: str = field(metadata={"help": "where the images of the JSON are"})
    model: str | None = field(default=None, metadata={"help": "an MQT-LLaVA checkpoint to go on from"})
    vision_tower: str | None = field(default=None, metadata={"help": "without --model: a vision tower"})
    language_model: str | None = field(
        default=None, metadata={"help": "without --model: a language model, its processor"}
    )
    budgets: list[int] | None = field(
        default=None,
        metadata={"help": "stage 2: what m is drawn from, evenly; {2, 4, ..., M} as in the paper if not given"},
    )
    query_transformer_num_attention_heads: int = field(default=8, metadata={"help": "without --model"})


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
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    tokenizer = processor.tokenizer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def main():
    arguments, training = HfArgumentParser((StageArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    training.remove_unused_columns = False  # the collator makes the model's inputs
    if arguments.model:
        model = MQTLlavaForConditionalGeneration.from_pretrained(arguments.model)
        processor = MQTLlavaProcessor.from_pretrained(arguments.model)
    else:
        processor = MQTLlavaProcessor.from_pretrained(arguments.language_model)
        heads = arguments.query_transformer_num_attention_heads
        model = assemble(arguments.vision_tower, arguments.language_model, processor, heads)

    model.requires_grad_(False)
    model.model.query_transformer.requires_grad_(True)
    if arguments.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)

    distribution = "fixed" if arguments.stage == 1 else arguments.budgets or "even"
    sampler = VisualTokenSampler(distribution, model.config.num_query_tokens, training.seed)
    trainer = MQTLlavaTrainer(
        model,
        training,
        data_collator=MQTLlavaDataCollator(processor, sampler),
        train_dataset=load_conversations(arguments.data_path, arguments.image_folder),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    model.save_pretrained(training.output_dir)
    processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
