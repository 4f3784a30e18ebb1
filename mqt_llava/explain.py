"""Explain an answer: exact maps of the visual tokens, and heat maps of an answer over the image.

Queries and keys of the query transformer depend on positions only, so the patches that a visual token attends to are fixed by the
checkpoint ([`token_maps`]). The image enters through the values, and a visual token is a sum over patches ([`contribution`]). How
the language model uses visual tokens for an answer can only be estimated, and several methods do it differently ([`explain`]).
`benchmarks/explain.py` measures how often they are right.

A patch here is a feature of the vision tower. Through the tower's attention it also holds information from other patches, which
no map shows; only occlusion changes the image itself.
"""

import contextlib
import math
import textwrap
import threading
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling.budget_mqt_llava import resolve_visual_token_counts
from .modeling.image_processing_mqt_llava import to_rgb
from .speed import resolve_dtype


METHODS = ("integrated_gradients", "gradient", "attention", "rollout", "occlusion")
NUM_STEPS = 8  # of integrated gradients
WINDOW = 3  # side in patches of the window that occlusion covers at once
MAX_SIDE = 1024  # pixels of images that heat maps are drawn on
LOCK = threading.Lock()  # settings of the model are changed temporarily


@dataclass
class Explanation:
    """
    Which patches and visual tokens an answer depends on, according to one method.

    Args:
        question (`str`): the question.
        answer (`str`): the answer.
        words (`list[str]`): the answer, split at spaces.
        visual_token_counts (`list[int]`): m of each image.
        log_probs (`torch.Tensor` of shape `(num_words,)`): natural logarithm of each word's probability given the words before it.
        evidence (`list[torch.Tensor]`): for each image, a tensor of shape `(num_words, side, side)` with the effect of each patch, in
            raster order, on each word. In nats of the word's log-probability for gradients and occlusion, negative if a patch makes
            the word less likely; a share of the attention for `attention` and `rollout`.
        tokens (`list[torch.Tensor]` or `None`): for each image, a tensor of shape `(num_words, m)` with the same for each visual
            token. `None` for occlusion.
        pictures (`list[PIL.Image.Image]`): the images with their padding, as covered by the grid of patches.
        boxes (`list[tuple[int, int, int, int]]`): the box of each image in its padded picture, in pixels: left, top, right, bottom.
        method (`str`): `"integrated_gradients"`, `"gradient"`, `"attention"`, `"rollout"` or `"occlusion"`.
    """

    question: str
    answer: str
    words: list[str]
    visual_token_counts: list[int]
    log_probs: torch.Tensor
    evidence: list[torch.Tensor]
    tokens: list[torch.Tensor] | None
    pictures: list[Image.Image]
    boxes: list[tuple[int, int, int, int]]
    method: str

    def heat(self, word: int | None = None) -> list[torch.Tensor]:
        """
        A heat map for each image: each patch's share of the positive evidence.

        Args:
            word (`int`, *optional*): the index of a word. Defaults to the whole answer.

        Returns:
            `list[torch.Tensor]`: for each image, of shape `(side, side)`. They sum to 1 over all images, or to 0 if there is no
            positive evidence.
        """
        maps = self.support(word)
        total = sum(float(one.sum()) for one in maps)
        return [one / total if total > 0 else one for one in maps]

    def support(self, word: int | None = None) -> list[torch.Tensor]:
        """The positive evidence for a word, or for the whole answer: for each image, a tensor of shape `(side, side)`."""
        return [(of_image.sum(0) if word is None else of_image[word]).clamp(min=0) for of_image in self.evidence]

    def importance(self, word: int | None = None) -> list[torch.Tensor] | None:
        """The effect of each visual token on a word, or on the whole answer: for each image, a tensor of shape `(m,)`. `None` for
        occlusion."""
        return self.tokens and [of_image.sum(0) if word is None else of_image[word] for of_image in self.tokens]

    def draw(self, word: int | None = None, image: int = 0) -> Image.Image:
        """
        Draw a heat map over an image. The patch with the most evidence in all images is red; patches without evidence stay grey.
        For gradients and occlusion, colours fade if the total evidence is below 1 nat (a factor of e in probability), so that words
        that don't depend on the image get no strong colours.

        Args:
            word (`int`, *optional*): the index of a word. Defaults to the whole answer.
            image (`int`, *optional*, defaults to 0): the index of the image.

        Returns:
            `PIL.Image.Image`: the image without its padding.
        """
        support = self.support(word)
        hottest, total = max(float(one.max()) for one in support), sum(float(one.sum()) for one in support)
        strength = 1.0 if self.method in ("attention", "rollout") else min(1.0, total)
        picture, box = self.pictures[image], self.boxes[image]
        levels = (255 * support[image] / (hottest or 1.0)).round().to(torch.uint8).numpy()
        mask = Image.fromarray(levels).resize(picture.size, Image.Resampling.BICUBIC)
        return overlay(picture, mask, strength).crop(box)


def overlay(picture: Image.Image, mask: Image.Image, strength: float = 1.0) -> Image.Image:
    """A grayscale picture, coloured from yellow to red by an 8-bit mask of its size, with an opacity of `strength` (0 to 1)."""
    colours = [(255, max(0, 230 - level * 230 // 255), 0) for level in range(256)]
    heat = mask.copy()
    heat.putpalette([channel for colour in colours for channel in colour])
    grey = picture.convert("L").convert("RGB")
    return Image.composite(heat.convert("RGB"), grey, mask.point([round(0.75 * strength * i) for i in range(256)]))


def base_model(model):
    """The [`MQTLlavaForConditionalGeneration`] inside a model that PEFT may have wrapped, with its adapters."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(model, "get_image_features") or not hasattr(model.base_model, "query_transformer"):
        raise ValueError(f"Only an MQT-LLaVA model can be explained; got {type(model).__name__}.")
    return model


def token_maps(model) -> torch.Tensor:
    """
    The attention weights of the query transformer: which patches each visual token attends to, for every image.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model, or a `PeftModel` of one.

    Returns:
        `torch.Tensor` of shape `(M, num_heads, num_patches)`, float32. It sums to 1 over the patches, which form a square grid in
        raster order: `maps.mean(1).unflatten(-1, (side, side))` gives M maps.

    Raises:
        `ValueError`: for another model.
    """
    model = base_model(model)
    vision = model.config.vision_config
    if isinstance(getattr(vision, "patch_size", None), int) and isinstance(vision.image_size, int):
        return _maps(model, (vision.image_size // vision.patch_size) ** 2)
    blank = torch.zeros(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    with torch.no_grad():
        return _maps(model, _patch_features(model, model.get_image_features(blank.to(model.device), 1)).shape[1])


@torch.no_grad()
def _maps(model, num_patches: int) -> torch.Tensor:
    part = model.base_model.query_transformer
    queries = part.q_proj(part.query_norm(part.query + part.position_embedding))
    keys = part.k_proj(part.key_norm(part.patch_positions(num_patches)))
    queries, keys = (states.float().unflatten(-1, (-1, part.head_dim)).transpose(0, 1) for states in (queries, keys))
    return (queries @ keys.mT * part.scaling).softmax(-1).transpose(0, 1)


def _patch_features(model, image_outputs) -> torch.Tensor:
    """The input of the query transformer, `(num_images, num_patches, vision_hidden_size)`."""
    first_patch = int(model.config.vision_feature_select_strategy == "default")  # after the class token
    return image_outputs.last_hidden_state[:, first_patch:]


class PatchParts:
    """Visual tokens as sums over patches.

    The query transformer is linear in the values, so visual token i is `constant + sum over patches of part(i, patch)`, where
    `part(i, patch)` is `sum over heads of maps[i, head, patch] * values[patch, head]`. The values are the image's contribution after
    value, output and text projection. All biases, including that of the values' layer norm, are in `constant`, which is the same for
    every image and every token, since attention sums to 1.

    Args:
        maps (`torch.Tensor` of shape `(m, num_heads, num_patches)`): attention weights, see [`token_maps`].
        values (`torch.Tensor` of shape `(num_images, num_patches, num_heads, text_hidden_size)`): float32.
        constant (`torch.Tensor` of shape `(text_hidden_size,)`): float32.
    """

    def __init__(self, maps: torch.Tensor, values: torch.Tensor, constant: torch.Tensor):
        self.maps, self.values, self.constant = maps, values, constant

    @classmethod
    @torch.no_grad()
    def of(cls, model, image_outputs) -> "PatchParts":
        """The parts of images, from the output of `get_image_features`."""
        model, features = base_model(model), _patch_features(base_model(model), image_outputs)
        part = model.base_model.query_transformer
        nothing = torch.zeros_like(features[0, 0])
        offset = part.v_proj(part.value_norm(nothing))  # the layer norm of zeros is its bias
        values = part.v_proj(part.value_norm(features)) - offset
        num_heads = values.shape[-1] // part.head_dim
        # Each head alone, with the others at 0, through the projections, which may be adapted or quantized
        alone = torch.eye(num_heads, dtype=values.dtype, device=values.device).repeat_interleave(part.head_dim, 1)
        projected = part.text_proj(part.out_proj(values[:, :, None] * alone))
        bias = part.text_proj(part.out_proj(nothing))
        constant = part.text_proj(part.out_proj(offset))
        return cls(_maps(model, features.shape[1]), (projected - bias).float(), constant.float())

    def __getitem__(self, images) -> "PatchParts":
        return PatchParts(self.maps, self.values[images], self.constant)

    def vectors(self, num_visual_tokens: int) -> torch.Tensor:
        """The parts, `(num_images, m, num_patches, text_hidden_size)`. For a 7B model, 256 tokens of one image take 2.4 GB."""
        return torch.einsum("ihp,nphd->nipd", self.maps[:num_visual_tokens], self.values)

    def norms(self, num_visual_tokens: int) -> torch.Tensor:
        """The norms of the parts, `(num_images, m, num_patches)`, computed from the products of the heads."""
        maps, products = self.maps[:num_visual_tokens], self.values @ self.values.mT
        return torch.einsum("ihp,nphg,igp->nip", maps, products, maps).clamp(min=0).sqrt()

    def along(self, directions: torch.Tensor) -> torch.Tensor:
        """Dot products of the first image's parts with `directions` of shape `(rows, m, text_hidden_size)`: `(rows, m, num_patches)`."""
        projected = torch.einsum("rid,phd->riph", directions, self.values[0])
        return torch.einsum("riph,ihp->rip", projected, self.maps[: directions.shape[1]])


def contribution(model, pixel_values: torch.Tensor, num_visual_tokens: int | None = None) -> torch.Tensor:
    """
    How much each patch contributes to each visual token: the norm of its part of the sum, see [`PatchParts`].

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model, or a `PeftModel` of one.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): images as returned by the processor.
        num_visual_tokens (`int`, *optional*): m. Defaults to M.

    Returns:
        `torch.Tensor` of shape `(num_images, m, num_patches)`, float32, in units of the language model's embeddings.

    Raises:
        `ValueError`: for another model, and for m that is not an integer from 1 to M.
    """
    model = base_model(model)
    m = resolve_visual_token_counts(num_visual_tokens, 1, model.config.num_query_tokens)[0]
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values.to(model.device), 1)
    return PatchParts.of(model, outputs).norms(m)


class EncodedImages:
    """
    Images that are encoded once for any number of questions, together with a grey image as the baseline.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model, or a `PeftModel` of one.
        processor (`MQTLlavaProcessor`): its processor.
        images (`PIL.Image.Image` or `list`): anything the processor accepts.
        num_visual_tokens (`int` or `list[int]`, *optional*): the largest number that will be asked for. Defaults to M.

    Raises:
        `ValueError`: if there is no image, for one that cannot be read, and for numbers that are not integers from 1 to M.
    """

    def __init__(self, model, processor, images, num_visual_tokens: int | list[int] | None = None):
        model, image_processor = base_model(model), processor.image_processor
        self.images = flat_list(image_processor, images)
        counts = resolve_visual_token_counts(num_visual_tokens, len(self.images), model.config.num_query_tokens)
        self.num_visual_tokens = max(counts)
        pixel_values = image_processor(self.images, return_tensors="pt")["pixel_values"]
        blank = Image.new("RGB", tuple(pixel_values.shape[:-3:-1]), padding_colour(image_processor))
        grey = image_processor(blank, return_tensors="pt")["pixel_values"]
        laid_out = [lay_out(image_processor, *both) for both in zip(self.images, pixel_values)]
        self.pictures, self.boxes = map(list, zip(*laid_out))
        self.pixel_values, self.grey = pixel_values.to(model.device), grey.to(model.device)
        with torch.no_grad():
            pixel_values = torch.cat([self.pixel_values, self.grey])
            self.outputs = model.get_image_features(pixel_values, self.num_visual_tokens)
        self.side = math.isqrt(_patch_features(model, self.outputs).shape[1])

    def __len__(self):
        return len(self.images)


def explain(
    model,
    processor,
    images,
    question: str | list[dict],
    num_visual_tokens: int | list[int] | None = None,
    method: str = METHODS[0],
    answer: str | None = None,
    per_word: bool = True,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Explanation:
    """
    Answer a question about images, and find which parts of them the answer depends on.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model, or a `PeftModel` of one. Its weights get no gradients.
        processor (`MQTLlavaProcessor`): its processor.
        images (`PIL.Image.Image`, `list` or [`EncodedImages`]): anything the processor accepts, or images encoded before.
        question (`str` or `list[dict]`): a question about all images; or the messages of a conversation, as for
            `apply_chat_template`, whose next answer is explained.
        num_visual_tokens (`int` or `list[int]`, *optional*): m of all images or of each. Defaults to M.
        method (`str`, *optional*): `"integrated_gradients"` (the default), `"gradient"`, `"attention"`, `"rollout"` or `"occlusion"`.
        answer (`str`, *optional*): an answer to explain instead of the model's own.
        per_word (`bool`, *optional*, defaults to `True`): explain each word. Otherwise the whole answer counts as one word, which
            takes fewer rows.
        max_new_tokens (`int`, *optional*, defaults to 64): the maximum length of the answer.
        batch_size (`int`, *optional*, defaults to 16): number of rows that the language model processes at once. `gradient` takes a
            row per word, `integrated_gradients` 8 rows per word, `occlusion` a row per patch.

    Returns:
        [`Explanation`]: the answer and what it depends on.

    Raises:
        `ValueError`: for an unknown method, an empty question or answer, a prompt that is too long, and inputs that the processor or
            the model refuse.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    asked = AskedQuestion(model, processor, images, question, num_visual_tokens, answer, per_word, max_new_tokens)
    return asked.explain(method, batch_size)


class AskedQuestion:
    """A question with its answer and encoded images, from which all methods start. Takes the arguments of [`explain`]."""

    def __init__(
        self,
        model,
        processor,
        images,
        question,
        num_visual_tokens=None,
        answer=None,
        per_word=True,
        max_new_tokens=64,
    ):
        self.model = model = base_model(model)
        if not isinstance(images, EncodedImages):
            images = flat_list(processor.image_processor, images)
        counts = resolve_visual_token_counts(num_visual_tokens, len(images), model.config.num_query_tokens)
        if isinstance(images, EncodedImages) and max(counts) > images.num_visual_tokens:
            raise ValueError(
                f"`images` were encoded for at most {images.num_visual_tokens} visual tokens; got {num_visual_tokens}."
            )
        self.counts, self.question, messages = counts, question, question
        if isinstance(question, str):
            if processor.image_token in question:
                raise ValueError(
                    f"The question must not contain {processor.image_token}, the placeholder of an image."
                )
            parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
            messages = [{"role": "user", "content": parts}]
        else:
            self.question = text_of(messages[-1])
        if not self.question.strip():
            raise ValueError("The question is empty.")
        self.prompt_ids = self.tokenize(processor, messages)
        length = self.prompt_ids.shape[1]
        limit = getattr(model.config.text_config, "max_position_embeddings", None) or float("inf")
        if length >= limit:
            raise ValueError(f"The prompt has {length} tokens, but the model supports at most {limit}.")
        told_ids = None
        if answer is not None:
            told_ids = self.tokenize(processor, [*messages, {"role": "assistant", "content": answer.strip()}])
            if not torch.equal(told_ids[:, :length], self.prompt_ids):
                raise ValueError(
                    "`answer` cannot be used with this tokenizer, which merges it with the end of the prompt."
                )

        if not isinstance(images, EncodedImages):
            images = EncodedImages(model, processor, images, counts)
        self.images = images
        *visual_tokens, grey = images.outputs.pooler_output
        visual_tokens = [tokens[:m] for tokens, m in zip(visual_tokens, counts)]
        self.visual_tokens, self.grey_tokens = torch.cat(visual_tokens), torch.cat([grey[:m] for m in counts])

        if told_ids is None:
            features = BaseModelOutputWithPooling(pooler_output=visual_tokens)  # type: ignore[arg-type]  # a list, as LLaVA's
            settings = {"mm_encoder_outputs": {"image": features}, "num_visual_tokens": counts, "do_sample": False}
            settings |= {"max_new_tokens": min(max_new_tokens, limit - length), "num_beams": 1}
            mask = torch.ones_like(self.prompt_ids)
            told_ids = model.generate(input_ids=self.prompt_ids, attention_mask=mask, **settings)
        ids = told_ids[0, length:].tolist()
        while ids and ids[-1] in processor.tokenizer.all_special_ids:  # the end-of-sequence token belongs to no word
            ids.pop()
        self.answer, self.words, word_of = split_words(processor.tokenizer, ids)
        if not self.words:
            raise ValueError("The answer is empty, so there is nothing to explain.")
        if not per_word:
            self.words, word_of = [self.answer], [0] * len(ids)
        self.answer_ids = torch.tensor([ids], device=self.prompt_ids.device)
        self.ids = torch.cat([self.prompt_ids, self.answer_ids], 1)
        # A product with it sums over the tokens of each word
        self.in_word = torch.zeros(len(self.words), len(ids), device=self.ids.device)
        self.in_word[word_of, range(len(ids))] = 1

    def tokenize(self, processor, messages) -> torch.Tensor:
        """The ids of a conversation, `(1, length)`. They don't depend on the content of the images."""
        blanks = [Image.new("RGB", (1, 1))] * len(self.counts)
        text = processor.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user")
        options = {"num_visual_tokens": self.counts, "add_special_tokens": False, "return_tensors": "pt"}
        return processor(images=blanks, text=text, **options)["input_ids"].to(self.model.device)

    def explain(self, method: str, batch_size: int = 16) -> Explanation:
        """Explain the answer with one method; see [`explain`]."""
        with torch.no_grad():
            log_probs = self.log_probs(self.visual_tokens[None])[0]
        evidence, tokens = getattr(self, f"by_{method}")(batch_size)
        side = self.images.side
        return Explanation(
            question=self.question,
            answer=self.answer,
            words=self.words,
            visual_token_counts=self.counts,
            log_probs=log_probs.cpu(),
            evidence=[of_image.unflatten(-1, (side, side)).cpu() for of_image in evidence],
            tokens=tokens and [of_image.cpu() for of_image in tokens],
            pictures=self.images.pictures,
            boxes=self.images.boxes,
            method=method,
        )

    def run(self, visual_tokens: torch.Tensor, **options):
        """The model's outputs on the prompt and its answer, for visual tokens of shape `(rows, all tokens, text_hidden_size)`."""
        rows = len(visual_tokens)
        counts, ids = self.counts * rows, self.ids.expand(rows, -1)
        of_images = list(visual_tokens.flatten(0, 1).split(counts))
        features = BaseModelOutputWithPooling(pooler_output=of_images)  # type: ignore[arg-type]  # a list, as LLaVA's
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["visual_token_counts"] = torch.tensor(counts, device=ids.device)
        return self.model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False, **options)

    def log_probs(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """The words' log-probabilities, `(rows, num_words)`."""
        length = self.answer_ids.shape[1]
        logits = self.run(visual_tokens, logits_to_keep=length + 1).logits[:, :-1].to(self.ids.device, torch.float32)
        chosen = logits.log_softmax(-1).gather(-1, self.answer_ids[..., None].expand(len(logits), -1, -1))
        return chosen[..., 0] @ self.in_word.T

    def gradients(self, shares: list[float], batch_size: int) -> torch.Tensor:
        """Gradients of each word's log-probability with respect to the visual tokens, `(num_words, all tokens, text_hidden_size)`: the
        mean over points on the line from a grey image's tokens (share 0) to the image's own (share 1)."""
        rows = [(word, share) for word in range(len(self.words)) for share in shares]
        way = self.visual_tokens - self.grey_tokens
        gradients = torch.zeros(len(self.words), *way.shape, device=way.device)
        with LOCK, torch.enable_grad(), checkpointing(self.model.base_model.language_model):
            for start in range(0, len(rows), batch_size):
                words, at = map(torch.tensor, zip(*rows[start : start + batch_size]))
                words, at = words.to(way.device), at.to(way.device, way.dtype)
                leaf = (self.grey_tokens + at[:, None, None] * way).detach().requires_grad_()
                total = self.log_probs(leaf).gather(1, words[:, None]).sum()
                gradients.index_add_(0, words, torch.autograd.grad(total, leaf)[0].float())
        return gradients / len(shares)

    def by_gradient(self, batch_size: int, shares=(1.0,)):
        """Gradient times the difference between the parts of the image's and a grey image's visual tokens, patch by patch."""
        gradients = self.gradients(shares, batch_size).split(self.counts, 1)
        parts = PatchParts.of(self.model, self.images.outputs)
        added = PatchParts(parts.maps, parts.values[:-1] - parts.values[-1:], parts.constant)
        products = [added[[image]].along(of_image) for image, of_image in enumerate(gradients)]
        return [one.sum(1) for one in products], [one.sum(2) for one in products]

    def by_integrated_gradients(self, batch_size: int):
        """The same with the mean gradient on the way from a grey image's tokens (integrated gradients, https://arxiv.org/abs/1703.01365):
        the evidence of all patches sums to the word's difference in log-probability from the grey image."""
        return self.by_gradient(batch_size, [(step + 0.5) / NUM_STEPS for step in range(NUM_STEPS)])

    def by_attention(self, batch_size: int, rolled_out: bool = False):
        """The language model's attention to visual tokens, averaged over layers and heads, times the norms of the patches' parts."""
        with LOCK, torch.no_grad(), eager_attention(self.model):
            layers = self.run(self.visual_tokens[None], output_attentions=True, logits_to_keep=1).attentions
        if not layers or any(layer is None or layer.ndim != 4 for layer in layers):
            raise ValueError("This language model does not return attention weights: use another `method`.")
        layers = [layer[0].to(self.ids.device, torch.float32).mean(0) for layer in layers]
        reach = sum(layers) / len(layers)
        if rolled_out:  # https://arxiv.org/abs/2005.00928
            reach = torch.eye(len(reach), device=reach.device)
            for layer in layers:
                reach = (reach + layer @ reach) / 2
        columns = (self.prompt_ids[0] == self.model.config.image_token_id).nonzero()[:, 0]
        predicting = slice(self.prompt_ids.shape[1] - 1, self.ids.shape[1] - 1)
        tokens = (self.in_word @ reach[predicting, columns]).split(self.counts, 1)
        parts, evidence = PatchParts.of(self.model, self.images.outputs), []
        for image, of_image in enumerate(tokens):
            norms = parts[[image]].norms(of_image.shape[1])[0]
            evidence.append(of_image @ (norms / norms.sum(-1, keepdim=True)))
        return evidence, list(tokens)

    def by_rollout(self, batch_size: int):
        """The same with attention multiplied through the layers, which includes attention by way of other tokens."""
        return self.by_attention(batch_size, rolled_out=True)

    def by_occlusion(self, batch_size: int, window: int = WINDOW):
        """The drop in each word's log-probability if a window around a patch is grey, averaged over the windows that contain a patch.
        Each window takes a forward pass of the whole model."""
        reach, grid = window // 2, torch.arange(self.images.side, device=self.ids.device)
        near = (grid[:, None] - grid).abs() <= reach
        covered = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)  # (windows, patches)
        share = covered.float() / covered.sum(0)
        before, evidence = self.log_probs_without(0, torch.zeros_like(covered[:1]), 1), []
        for image in range(len(self.counts)):
            lost = before - self.log_probs_without(image, covered, batch_size)
            evidence.append(lost.T @ share)
        return evidence, None

    @torch.no_grad()
    def log_probs_without(self, image: int, covered: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The words' log-probabilities, `(rows, num_words)`, with the patches in `covered`, bool of shape `(rows, num_patches)`, in grey."""
        pixels, m, results = self.images.pixel_values[image], self.counts[image], []
        size = pixels.shape[-1] // self.images.side  # pixels left over at the right and the bottom belong to no patch
        first = sum(self.counts[:image])
        for rows in covered.unflatten(-1, (self.images.side, self.images.side)).split(batch_size):
            mask = rows.repeat_interleave(size, 1).repeat_interleave(size, 2)
            mask = torch.nn.functional.pad(mask, (0, pixels.shape[-1] - mask.shape[-1]) * 2)
            altered = torch.where(mask[:, None], self.images.grey, pixels)
            tokens = self.visual_tokens.repeat(len(rows), 1, 1)
            tokens[:, first : first + m] = torch.stack(self.model.get_image_features(altered, m).pooler_output)
            results.append(self.log_probs(tokens))
        return torch.cat(results)


def text_of(message: dict) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def flat_list(image_processor, images) -> list:
    images = make_flat_list_of_images(image_processor.fetch_images(images))
    if not images:
        raise ValueError("At least one image is needed.")
    return images


def split_words(tokenizer, ids: list[int]) -> tuple[str, list[str], list[int]]:
    """The text of an answer, its words, and for each token the index of its word, the last one if it spans several."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    words = text.split()
    word_of = [max(0, len(words) - 1)] * len(ids)
    for end in range(len(ids) - 1, 0, -1):
        so_far = tokenizer.decode(ids[:end], skip_special_tokens=True)
        # A token with only a part of a character belongs to the word of the token that completes it
        is_whole = not so_far.endswith("\ufffd")
        word_of[end - 1] = max(0, len(so_far.split()) - 1) if is_whole else word_of[end]
    return text, words, word_of


def padding_colour(image_processor) -> tuple[int, ...]:
    """The mean colour, which pads images and fills covered patches."""
    return tuple(int(255 * mean) for mean in image_processor.image_mean)


def lay_out(image_processor, image, pixel_values: torch.Tensor) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The picture that the grid of patches covers, and the image's box in it: the image padded to a square, or the vision tower's
    input if the processor does not pad."""
    if not image_processor.do_pad or image_processor.do_center_crop:
        levels = pixel_values.float()
        if image_processor.do_normalize:
            mean, std = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
            levels = levels * std[:, None, None] + mean[:, None, None]
        levels = (255 * levels).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        picture = Image.fromarray(levels.numpy())
        return picture, (0, 0, *picture.size)
    picture = to_rgb(image).copy()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    longest = max(picture.size)
    left, top = ((longest - length) // 2 for length in picture.size)
    square = Image.new("RGB", (longest, longest), padding_colour(image_processor))
    square.paste(picture, (left, top))
    return square, (left, top, left + picture.width, top + picture.height)


@contextlib.contextmanager
def checkpointing(language_model):
    """Gradient checkpointing. transformers' own needs a model in training mode, which would turn on dropout."""
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    own = [layer.__dict__.get("forward") for layer in layers]  # set by accelerate
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextlib.contextmanager
def eager_attention(model):
    """Switch the language model to eager attention, which returns attention weights."""
    text_model = model.base_model.language_model
    before = text_model.config._attn_implementation
    text_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        text_model.set_attn_implementation(before)


def extra_bytes(
    costs,
    num_visual_tokens: int,
    num_words: int = 1,
    method: str = METHODS[0],
    batch_size: int = 16,
    num_text_tokens: int = 60,
    num_new_tokens: int = 64,
    num_images: int = 1,
    dtype: torch.dtype | str = torch.bfloat16,
) -> int:
    """
    Estimate the peak memory of [`explain`] in bytes, without the weights.

    Args:
        costs (`CostModel`): the model's.
        num_visual_tokens (`int`): m.
        num_words (`int`, *optional*, defaults to 1): number of words that are explained; 1 for the whole answer.
        method, batch_size: as for [`explain`].
        num_text_tokens, num_new_tokens, num_images, dtype: as for [`CostModel`].
    """
    text = costs.config.text_config
    itemsize, length = resolve_dtype(dtype).itemsize, num_text_tokens + num_images * num_visual_tokens + num_new_tokens
    rows = {"integrated_gradients": num_words * NUM_STEPS, "gradient": num_words, "occlusion": costs.num_patches}.get(
        method, 1
    )
    rows = min(rows, batch_size)
    layer = 2 * length * costs.text_width * itemsize
    logits = 3 * num_new_tokens * text.vocab_size * 4
    if method == "occlusion":
        return rows * max(costs.num_patches * costs.vision_width * itemsize, layer + logits)
    heads = costs.config.query_transformer_num_attention_heads
    parts = (num_images + 1) * costs.num_patches * heads * text.hidden_size * (4 + 2 * itemsize)
    if method in ("attention", "rollout"):
        weights = text.num_hidden_layers * text.num_attention_heads * length**2 * itemsize
        return max(weights + layer, parts)
    kept = text.num_hidden_layers * length * text.hidden_size * itemsize
    along = (num_words * num_visual_tokens * heads * costs.num_patches) * 4
    return max(rows * (kept + layer + logits), parts + along)


def sheet(explanations: list[Explanation], max_words: int = 7):
    """
    Draw a figure with the heat maps of an answer, and the importance of each visual token below. A single explanation is shown for
    the answer and its first words, several side by side for their answers.

    Args:
        explanations (`list[Explanation]`): of the same images, such as for several numbers of visual tokens.
        max_words (`int`, *optional*, defaults to 7): the maximum number of words to show.

    Returns:
        `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    first, single = explanations[0], len(explanations) == 1
    words = range(min(len(first.words), max_words)) if single and len(first.words) > 1 else []
    panels = [(one, None) for one in explanations] + [(first, word) for word in words]
    width, columns, titles = 2.4, 1 + len(panels), [title(*panel) for panel in panels]
    heights = [width * (box[3] - box[1]) / (box[2] - box[0]) for box in first.boxes]
    height_of_titles = 0.2 * max(text.count("\n") + 1 for text in titles)
    has_bars = first.tokens is not None
    figure = Figure(
        figsize=(width * columns, sum(heights) + height_of_titles + 0.6 + 1.3 * has_bars), layout="constrained"
    )
    figure.suptitle(first.question, parse_math=False)
    grid = figure.add_gridspec(len(heights) + has_bars, columns, height_ratios=[*heights, *[1.2] * has_bars])
    for image, (picture, box) in enumerate(zip(first.pictures, first.boxes)):
        shown = [picture.crop(box), *(one.draw(word, image) for one, word in panels)]
        for column, picture in enumerate(shown):
            axes = figure.add_subplot(grid[image, column])
            axes.imshow(picture)
            axes.set_axis_off()
            if image == 0 and column > 0:
                axes.set_title(titles[column - 1], fontsize=9, parse_math=False)
    for column, (one, word) in enumerate(panels if has_bars else [], 1):
        axes, tokens = figure.add_subplot(grid[-1, column]), one.importance(word) or []
        for of_image in tokens:  # several images overlap
            axes.bar(range(1, len(of_image) + 1), of_image.tolist(), width=1.0, alpha=1 / len(tokens) ** 0.5)
        num_visual_tokens = max(one.visual_token_counts)
        axes.set(xlim=(0.25, num_visual_tokens + 0.75), xticks=sorted({1, num_visual_tokens}))
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("visual token", fontsize=8)
        if column == 1:
            axes.set_ylabel("attention" if first.method in ("attention", "rollout") else "evidence, nats", fontsize=8)
    return figure


def title(explanation: Explanation, word: int | None) -> str:
    """The title of a panel: a word with its probability, or m and the answer, wrapped to the panel's width."""
    if word is not None:
        return f"{explanation.words[word]} ({100 * math.exp(explanation.log_probs[word]):.0f} %)"
    counts = sorted(set(explanation.visual_token_counts))
    text = f"m = {', '.join(map(str, counts))}: {explanation.answer}"
    return "\n".join(textwrap.wrap(text, 30, max_lines=4, placeholder=" ..."))
