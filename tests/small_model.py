"""A small random model and its processor, for the tests."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaImageProcessor, MQTLlavaProcessor


NUM_QUERY_TOKENS = 16  # M of the small random model
TEXT_SIZES = {  # of its language model
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough for images and m to show in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {  # for `make_config`: a tower without a class token
    "vision_config": SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=30,
        patch_size=5,
    ),
    "vision_feature_select_strategy": "full",
}


def make_tokenizer():
    """A byte-level tokenizer: every character is a token, so nothing has to be trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<image>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_config(**overrides):
    """A config with a CLIP tower of 30 x 30 pixels in 6 x 6 patches, a Llama and 16 queries."""
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=30,
        patch_size=5,
        initializer_range=0.2,
    )
    settings = {
        "vision_config": vision_config,
        "text_config": LlamaConfig(**TEXT_SIZES),
        "image_token_id": 3,
        "num_query_tokens": NUM_QUERY_TOKENS,
        "query_transformer_num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    return MQTLlavaConfig(**(settings | overrides))


def make_processor():
    side = {"height": 30, "width": 30}
    image_processor = MQTLlavaImageProcessor(size=side, crop_size=side)
    return MQTLlavaProcessor(image_processor, make_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)


def make_model(**overrides):
    torch.manual_seed(0)
    return MQTLlavaForConditionalGeneration(make_config(**overrides)).eval()


def make_images(count, seed=0):
    """Random RGB pictures of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(40, 30), (30, 30), (25, 50), (64, 20), (33, 31)]
    return [
        Image.fromarray(torch.randint(256, (*sizes[i % 5], 3), generator=generator, dtype=torch.uint8).numpy())
        for i in range(count)
    ]
