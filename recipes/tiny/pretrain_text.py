"""Pretrain the tokenizer and the language model of `mqt-llava-tiny` from scratch, without pictures.

LLaVA starts from Vicuna, which can already answer questions about what it is told. Here nothing is downloaded, so the
language model learns that much from scenes told in words (`text.json` of `make_data`).

    python -m recipes.tiny.pretrain_text --data_path runs/data/text.json --output_dir runs/text
"""

import os
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mqt_llava import MQTLlavaImageProcessor, MQTLlavaProcessor
from mqt_llava.modeling.processing_mqt_llava import CHAT_TEMPLATE, SYSTEM_PROMPT
from mqt_llava.training import MQTLlavaDataCollator, load_conversations

from .make_data import IMAGE_SIZE
from .optimizer import muon_and_adamw


@dataclass
class TextArguments:
    """The language model. Defaults made that of `mqt-llava-tiny`."""

    data_path: str
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    vocab_size: int = 1024
    image_size: int = IMAGE_SIZE
    num_query_tokens: int = 64


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer with Llama's special tokens and `<image>`."""
    tokenizer = Tokenizer(models.BPE())
    # Numbers figure by figure
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",  # for `generate`; training pads by itself
    )


def make_processor(tokenizer, image_size, num_query_tokens):
    """LLaVA 1.5's preprocessing at a small size, and its chat template without a system prompt of its own."""
    side = {"height": image_size, "width": image_size}
    image_processor = MQTLlavaImageProcessor(size=side, crop_size=side)
    template = CHAT_TEMPLATE.replace(SYSTEM_PROMPT.replace("'", "\\'"), "")
    return MQTLlavaProcessor(image_processor, tokenizer, num_query_tokens=num_query_tokens, chat_template=template)


@torch.no_grad()
def look_for_the_same(model):
    """Start half of the heads with keys that are queries, so that they look at tokens like their own (mimetic initialization,
    arXiv 2305.09828). After 200 steps of drills 86 % of the questions whether something is there were answered rightly; with
    heads that began at random 60 %."""
    for layer in model.model.layers:
        attention = layer.self_attn
        half = attention.k_proj.out_features // 2
        attention.k_proj.weight[:half] = attention.q_proj.weight[:half]


def main():
    arguments, training = HfArgumentParser((TextArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    os.makedirs(training.output_dir, exist_ok=True)
    dataset = load_conversations(arguments.data_path)
    texts = (f" {turn['content']} ASSISTANT: USER:" for messages in dataset["messages"] for turn in messages)
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    processor = make_processor(tokenizer, arguments.image_size, arguments.num_query_tokens)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            initializer_range=arguments.hidden_size**-0.5,
            attn_implementation="eager",  # on CPUs in bfloat16, the backward pass of sdpa is slower than eager
        )
    )
    look_for_the_same(model)
    training.train_sampling_strategy = "sequential"  # the order of the texts is their curriculum
    trainer = Trainer(
        model,
        training,
        data_collator=MQTLlavaDataCollator(processor),
        train_dataset=dataset,
        optimizer_cls_and_kwargs=muon_and_adamw(training),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    if trainer.is_world_process_zero():
        model.save_pretrained(training.output_dir)
        processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
