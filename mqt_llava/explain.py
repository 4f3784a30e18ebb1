"""What an answer looks at: exact maps of the visual tokens, and heat maps of an answer over the picture.

Queries and keys of the query transformer are made of positions alone, so which patches a visual token reads is fixed by the
checkpoint ([`token_maps`]). A picture enters through the values, and what it adds to a visual token is a sum over patches
([`contribution`]). What visual tokens do to an answer is a question to the language model, which several methods answer in
different ways ([`explain`]). `benchmarks/explain.py` measures how often they are right.

A patch here is a feature of the vision tower. It knows its surroundings through the tower's own attention, which no map shows;
occlusion alone changes the picture itself.
"""

import contextlib
import math
import threading
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling.image_processing_mqt_llava import to_rgb


METHODS = ("gradient", "attention", "rollout", "occlusion")
MAX_SIDE = 1024  # pixels of pictures that are drawn over
LOCK = threading.Lock()  # settings of the model are changed for a while


@dataclass
class Explanation:
    """
    What an answer rests on, as one method has it.

    Args:
        question (`str`): as it was asked.
        answer (`str`): as it was given.
        words (`list[str]`): of the answer, between spaces.
        log_probs (`torch.Tensor` of shape `(num_words,)`): natural logarithms of the words' probabilities, each after the words
            before it.
        evidence (`list[torch.Tensor]`): one for each image, of shape `(num_words, side, side)`: what each patch, in raster order,
            did for each word. For gradients and occlusion in natural logarithms of the word's probability, and below 0 where
            a patch spoke against it; for attention a share of it.
        tokens (`list[torch.Tensor]` or `None`): one for each image, of shape `(num_words, m)`: the same for each visual token.
            None by occlusion, which does not know them.
        pictures (`list[PIL.Image.Image]`): the images as the grid of patches lies on them, padding included.
        boxes (`list[tuple[int, int, int, int]]`): where in each of `pictures` the image is: left, top, right, bottom.
        method (`str`): of [`METHODS`].
    """

    question: str
    answer: str
    words: list[str]
    log_probs: torch.Tensor
    evidence: list[torch.Tensor]
    tokens: list[torch.Tensor] | None
    pictures: list[Image.Image]
    boxes: list[tuple[int, int, int, int]]
    method: str

    def heat(self, word: int | None = None) -> list[torch.Tensor]:
        """A heat map for each image, `(side, side)`: each patch's share of all that spoke for a word, or for the whole answer where
        `word` is None. All images' together sum to 1, or to 0 where nothing spoke for it."""
        raise NotImplementedError

    def importance(self, word: int | None = None) -> list[torch.Tensor]:
        """What each visual token did for a word, or for the whole answer: for each image a tensor of shape `(m,)`."""
        raise NotImplementedError

    def draw(self, word: int | None = None, image: int = 0) -> Image.Image:
        """An image with the heat map of a word, or of the whole answer, over it."""
        raise NotImplementedError


def token_maps(model) -> torch.Tensor:
    """
    Which patches each visual token reads, whatever the picture shows: the attention of the query transformer.

    Args:
        model ([`MQTLlavaForConditionalGeneration`]): or a `PeftModel` of one.

    Returns:
        `torch.Tensor` of shape `(M, num_heads, num_patches)`, float32. It sums to 1 over the patches, which lie on a square grid
        in raster order: `maps.mean(1).unflatten(-1, (side, side))` are pictures.
    """
    raise NotImplementedError


def contribution(model, pixel_values: torch.Tensor, num_visual_tokens: int | None = None) -> torch.Tensor:
    """
    How much each patch adds to each visual token: the norm of its part of the sum that the token is.

    Args:
        model ([`MQTLlavaForConditionalGeneration`]): or a `PeftModel` of one.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): as the processor makes them.
        num_visual_tokens (`int`, *optional*): m. Defaults to M.

    Returns:
        `torch.Tensor` of shape `(num_images, m, num_patches)`, float32, in units of the language model's embeddings.
    """
    raise NotImplementedError


def explain(
    model,
    processor,
    images,
    question: str | list[dict],
    num_visual_tokens: int | list[int] | None = None,
    method: str = "gradient",
    answer: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Explanation:
    """
    Ask a question about images, and find what the answer rests on.

    Args:
        model ([`MQTLlavaForConditionalGeneration`]): or a `PeftModel` of one. Its weights get no gradients.
        processor ([`MQTLlavaProcessor`]): the model's.
        images (`PIL.Image.Image` or `list`): as the processor takes them.
        question (`str` or `list[dict]`): a question about all of the images; or the messages of a conversation, as
            `apply_chat_template` takes them, of which the next answer is explained.
        num_visual_tokens (`int` or `list[int]`, *optional*): m, for all images or for each. Defaults to M.
        method (`str`): of [`METHODS`].
        answer (`str`, *optional*): to explain in place of the model's own.
        max_new_tokens (`int`): length of an answer, at most.
        batch_size (`int`): rows that the language model computes at once: words for gradients, patches for occlusion.

    Raises:
        `ValueError`: for an unknown method, an empty question or answer, and whatever processor and model refuse.
    """
    raise NotImplementedError


def extra_bytes(
    costs,
    num_visual_tokens: int,
    num_text_tokens: int,
    num_words: int,
    num_images: int = 1,
    method: str = "gradient",
    batch_size: int = 16,
    dtype=torch.bfloat16,
) -> int:
    """What [`explain`] needs beside the weights, in bytes: an estimate, as [`CostModel`]'s are."""
    raise NotImplementedError
