"""Inputs, backbones and checks that several of these files share."""

import torch
from safetensors import safe_open
from transformers import Gemma3TextConfig, GemmaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from tests.small_model import NUM_QUERY_TOKENS, SIGLIP, TEXT_SIZES, make_images, make_processor


NUM_VISUAL_TOKENS = [1, 7, NUM_QUERY_TOKENS]
IMAGE_TOKEN_ID = 3
# Rows with two adjacent images, no image, two images apart, and one image
ROWS = ["<image><image> which one?", "no picture", "<image> first, then <image>, go", "look: <image>"]
IMAGES_OF_ROWS = [[0, 1], [], [2, 3], [4]]


def prepare(rows=range(len(ROWS)), m=None, text=ROWS):
    """The processor's inputs for some of the rows, left-padded."""
    images = make_images(5)
    chosen = [[images[i] for i in IMAGES_OF_ROWS[row]] for row in rows]
    return make_processor()(
        images=chosen if any(chosen) else None,
        text=[text[row] for row in rows],
        num_visual_tokens=m,
        padding=True,
        return_tensors="pt",
    )


def two_rows(m=7):
    """Two rows, with one image and with two."""
    first, *others = make_images(3)
    return make_processor()(
        images=[[first], others],
        text=["a <image>b", "<image> and <image> a longer text"],
        num_visual_tokens=m,
        padding=True,
        return_tensors="pt",
    )


def images_of(inputs):
    """The processor's outputs for images. `visual_token_counts` is there only where images are adjacent."""
    return {name: inputs[name] for name in ("pixel_values", "visual_token_counts") if name in inputs}


def new_tokens(sequences, inputs):
    """The answers without the prompt, `</s>` and what follows it."""
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[: answer.index(2)] if 2 in answer else answer for answer in answers]


@torch.no_grad()
def real_logits(model, inputs):
    """The logits where there is no padding, `(tokens, vocab_size)`."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def answers(model, m=None):
    """Greedy answers to `two_rows`, behind their prompts."""
    return model.generate(
        **two_rows(), num_visual_tokens=m, max_new_tokens=6, min_new_tokens=6, do_sample=False
    ).tolist()


class CountVision:
    """Counts the calls of the vision tower and the images passed to it."""

    def __init__(self, model):
        self.calls, self.images = 0, 0
        model.model.vision_tower.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1
        self.images += args[0].shape[0]


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def keys(folder):
    """Names of the tensors that a folder holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def backbone(name):
    """Overrides of `make_config` for a backbone. Configs are new each time, since models write into them."""
    return {
        "clip, llama": lambda: {},
        "siglip, llama": lambda: {**SIGLIP, "vision_config": SiglipVisionConfig(**SIGLIP["vision_config"].to_dict())},
        "clip, mistral": lambda: {"text_config": MistralConfig(**TEXT_SIZES, head_dim=8, sliding_window=16)},
        "clip, qwen2": lambda: {"text_config": Qwen2Config(**TEXT_SIZES)},
        "clip, qwen2 tied": lambda: {"text_config": Qwen2Config(**TEXT_SIZES, tie_word_embeddings=True)},
        "clip, gemma": lambda: {"text_config": GemmaConfig(**TEXT_SIZES, head_dim=8)},
        "siglip, gemma3": lambda: {
            **backbone("siglip, llama"),
            "text_config": Gemma3TextConfig(**TEXT_SIZES, head_dim=8, sliding_window=16),
        },
    }[name]()


BACKBONES = [
    "clip, llama",
    "siglip, llama",
    "clip, mistral",
    "clip, qwen2",
    "clip, qwen2 tied",
    "clip, gemma",
    "siglip, gemma3",
]
