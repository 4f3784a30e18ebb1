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
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling.budget_mqt_llava import resolve_visual_token_counts
from .modeling.image_processing_mqt_llava import to_rgb


METHODS = ("integrated", "gradient", "attention", "rollout", "occlusion")
NUM_STEPS = 8  # of integrated gradients
WINDOW = 3  # patches in a row that occlusion covers at once
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
        maps = [(of_image.sum(0) if word is None else of_image[word]).clamp(min=0) for of_image in self.evidence]
        total = sum(float(one.sum()) for one in maps)
        return [one / total if total > 0 else one for one in maps]

    def importance(self, word: int | None = None) -> list[torch.Tensor] | None:
        """What each visual token did for a word, or for the whole answer: for each image a tensor of shape `(m,)`; None by
        occlusion, which does not know."""
        return self.tokens and [of_image.sum(0) if word is None else of_image[word] for of_image in self.tokens]

    def draw(self, word: int | None = None, image: int = 0) -> Image.Image:
        """An image with the heat map of a word, or of the whole answer, over it: the hottest patch of all images is red, what has
        no part in it shows the picture in grey."""
        heat = self.heat(word)
        hottest = max(float(one.max()) for one in heat) or 1.0
        picture, box = self.pictures[image], self.boxes[image]
        levels = (255 * heat[image] / hottest).round().to(torch.uint8).numpy()
        mask = Image.fromarray(levels).resize(picture.size, Image.Resampling.BICUBIC)
        return overlay(picture, mask).crop(box)


def overlay(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture in grey, coloured where an 8-bit mask of its size is not 0: yellow, then red."""
    colours = [(255, max(0, 230 - level * 230 // 255), 0) for level in range(256)]
    heat = mask.copy()
    heat.putpalette([channel for colour in colours for channel in colour])
    grey = picture.convert("L").convert("RGB")
    return Image.composite(heat.convert("RGB"), grey, mask.point(lambda level: level * 3 // 4))


def base_model(model):
    """The [`MQTLlavaForConditionalGeneration`] of a model that PEFT may have wrapped; adapters stay where they are in it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(model, "get_image_features") or not hasattr(model.base_model, "query_transformer"):
        raise ValueError(f"Only an MQT-LLaVA model can be explained; got {type(model).__name__}.")
    return model


def token_maps(model) -> torch.Tensor:
    """
    Which patches each visual token reads, whatever the picture shows: the attention of the query transformer.

    Args:
        model ([`MQTLlavaForConditionalGeneration`]): or a `PeftModel` of one.

    Returns:
        `torch.Tensor` of shape `(M, num_heads, num_patches)`, float32. It sums to 1 over the patches, which lie on a square grid
        in raster order: `maps.mean(1).unflatten(-1, (side, side))` are pictures.
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
    """What the query transformer reads, `(num_images, num_patches, vision_hidden_size)`."""
    first_patch = int(model.config.vision_feature_select_strategy == "default")  # behind the class token
    return image_outputs.last_hidden_state[:, first_patch:]


class PatchParts:
    """Visual tokens as sums over patches.

    The query transformer is linear behind the values, so visual token i is `constant + sum over patches of part(i, patch)`, where
    `part(i, patch)` is `sum over heads of maps[i, head, patch] * values[patch, head]`. The values are what the picture adds,
    through value, output and text projection. All biases, that of the values' layer norm too, are in `constant`, which is the
    same for every picture and every token, since attention sums to 1.

    Args:
        maps (`torch.Tensor` of shape `(m, num_heads, num_patches)`).
        values (`torch.Tensor` of shape `(num_images, num_patches, num_heads, hidden_size)`), float32.
        constant (`torch.Tensor` of shape `(hidden_size,)`), float32.
    """

    def __init__(self, maps: torch.Tensor, values: torch.Tensor, constant: torch.Tensor):
        self.maps, self.values, self.constant = maps, values, constant

    @classmethod
    @torch.no_grad()
    def of(cls, model, image_outputs) -> "PatchParts":
        """Those of images that `get_image_features` has encoded."""
        model, features = base_model(model), _patch_features(base_model(model), image_outputs)
        part = model.base_model.query_transformer
        nothing = torch.zeros_like(features[0, 0])
        offset = part.v_proj(part.value_norm(nothing))  # layer norm makes its bias of zeros
        values = part.v_proj(part.value_norm(features)) - offset
        num_heads = values.shape[-1] // part.head_dim
        # Each head alone, the others 0, through projections that may be adapted or quantized
        alone = torch.eye(num_heads, dtype=values.dtype, device=values.device).repeat_interleave(part.head_dim, 1)
        projected = part.text_proj(part.out_proj(values[:, :, None] * alone))
        bias = part.text_proj(part.out_proj(nothing))
        constant = part.text_proj(part.out_proj(offset))
        return cls(_maps(model, features.shape[1]), (projected - bias).float(), constant.float())

    def __getitem__(self, images) -> "PatchParts":
        return PatchParts(self.maps, self.values[images], self.constant)

    def vectors(self, num_visual_tokens: int) -> torch.Tensor:
        """The parts themselves, `(num_images, m, num_patches, hidden_size)`. At 7B, 256 tokens of one image are 2.4 GB."""
        return torch.einsum("ihp,nphd->nipd", self.maps[:num_visual_tokens], self.values)

    def norms(self, num_visual_tokens: int) -> torch.Tensor:
        """Their lengths, `(num_images, m, num_patches)`, from the products of the heads with each other."""
        maps, products = self.maps[:num_visual_tokens], self.values @ self.values.mT
        return torch.einsum("ihp,nphg,igp->nip", maps, products, maps).clamp(min=0).sqrt()

    def along(self, directions: torch.Tensor) -> torch.Tensor:
        """The products of one image's parts with directions of shape `(rows, m, hidden_size)`: `(rows, m, num_patches)`."""
        projected = torch.einsum("rid,phd->riph", directions, self.values[0])
        return torch.einsum("riph,ihp->rip", projected, self.maps[: directions.shape[1]])


def contribution(model, pixel_values: torch.Tensor, num_visual_tokens: int | None = None) -> torch.Tensor:
    """
    How much each patch adds to each visual token: the norm of its part of the sum that the token is; see [`PatchParts`].

    Args:
        model ([`MQTLlavaForConditionalGeneration`]): or a `PeftModel` of one.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): as the processor makes them.
        num_visual_tokens (`int`, *optional*): m. Defaults to M.

    Returns:
        `torch.Tensor` of shape `(num_images, m, num_patches)`, float32, in units of the language model's embeddings.
    """
    model = base_model(model)
    m = resolve_visual_token_counts(num_visual_tokens, 1, model.config.num_query_tokens)[0]
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values.to(model.device), 1)
    return PatchParts.of(model, outputs).norms(m)


def explain(
    model,
    processor,
    images,
    question: str | list[dict],
    num_visual_tokens: int | list[int] | None = None,
    method: str = "integrated",
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
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    asked = AskedQuestion(model, processor, images, question, num_visual_tokens, answer, max_new_tokens)
    return asked.explain(method, batch_size)


class AskedQuestion:
    """A question with its answer, the images encoded: what all methods start from. See [`explain`]."""

    def __init__(self, model, processor, images, question, num_visual_tokens=None, answer=None, max_new_tokens=64):
        self.model = model = base_model(model)
        images = make_flat_list_of_images(processor.image_processor.fetch_images(images))
        messages = question
        if isinstance(question, str):
            if not question.strip():
                raise ValueError("The question is empty.")
            parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
            messages = [{"role": "user", "content": parts}]
        self.question = question if isinstance(question, str) else _last_text(messages)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        options = {"add_special_tokens": False, "return_tensors": "pt"}  # the template writes the BOS
        inputs = processor(images=images, text=prompt, num_visual_tokens=num_visual_tokens, **options)
        inputs = inputs.to(model.device)
        self.prompt_ids = inputs["input_ids"]
        is_placeholder = self.prompt_ids[0] == model.config.image_token_id
        counts = [num_visual_tokens] * len(images) if not isinstance(num_visual_tokens, list) else num_visual_tokens
        self.counts = [model.config.num_query_tokens if m is None else m for m in counts]
        self.columns = is_placeholder.nonzero()[:, 0]

        # One vision pass, with a grey picture behind the others
        self.pixel_values = inputs["pixel_values"]
        self.grey = grey_pixels(processor, self.pixel_values)
        with torch.no_grad():
            pixel_values = torch.cat([self.pixel_values, self.grey])
            outputs = model.get_image_features(pixel_values, [*self.counts, max(self.counts)])
        *visual_tokens, grey_tokens = outputs.pooler_output
        self.visual_tokens = torch.cat(visual_tokens)
        self.grey_tokens = torch.cat([grey_tokens[:m] for m in self.counts])
        self.image_outputs = outputs
        self.side = math.isqrt(_patch_features(model, outputs).shape[1])

        if answer is None:
            features = BaseModelOutputWithPooling(pooler_output=visual_tokens)
            settings = {"mm_encoder_outputs": {"image": features}, "num_visual_tokens": self.counts}
            settings |= {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            mask = torch.ones_like(self.prompt_ids)
            ids = model.generate(input_ids=self.prompt_ids, attention_mask=mask, **settings)
            ids = ids[:, self.prompt_ids.shape[1] :]
        else:
            told = processor.apply_chat_template([*messages, {"role": "assistant", "content": answer.strip()}])
            told = processor(images=images, text=told, num_visual_tokens=num_visual_tokens, **options)
            ids = told["input_ids"].to(model.device)[:, self.prompt_ids.shape[1] :]
        special = torch.tensor(processor.tokenizer.all_special_ids, device=ids.device)
        self.answer_ids = ids[:, ~torch.isin(ids[0], special)]
        self.answer, self.words, word_of = split_words(processor.tokenizer, self.answer_ids[0].tolist())
        if not self.words:
            raise ValueError("The answer is empty, so there is nothing to explain.")
        # Sums over the tokens of each word
        self.in_word = torch.zeros(len(self.words), len(word_of), device=ids.device)
        self.in_word[word_of, range(len(word_of))] = 1
        self.ids = torch.cat([self.prompt_ids, self.answer_ids], 1)
        self.pictures, self.boxes = zip(*(lay_out(processor.image_processor, image) for image in images))

    def explain(self, method: str, batch_size: int = 16) -> Explanation:
        """By one method; see [`explain`]."""
        with torch.no_grad():
            log_probs = self.log_probs(self.visual_tokens[None])[0]
        evidence, tokens = getattr(self, f"by_{method}")(batch_size)
        return Explanation(
            question=self.question,
            answer=self.answer,
            words=self.words,
            log_probs=log_probs.cpu(),
            evidence=[of_image.unflatten(-1, (self.side, self.side)).cpu() for of_image in evidence],
            tokens=tokens and [of_image.cpu() for of_image in tokens],
            pictures=list(self.pictures),
            boxes=list(self.boxes),
            method=method,
        )

    def run(self, visual_tokens: torch.Tensor, **options):
        """The language model's outputs on the prompt and its answer, for rows of visual tokens `(rows, all tokens, hidden_size)`."""
        rows = len(visual_tokens)
        counts = self.counts * rows
        features = BaseModelOutputWithPooling(pooler_output=list(visual_tokens.flatten(0, 1).split(counts)))
        ids = self.ids.expand(rows, -1)
        counts = torch.tensor(counts, device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "visual_token_counts": counts}
        return self.model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False, **options)

    def log_probs(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """The words' log-probabilities, `(rows, num_words)`."""
        length = self.answer_ids.shape[1]
        logits = self.run(visual_tokens, logits_to_keep=length + 1).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, self.answer_ids[..., None].expand(len(logits), -1, -1))
        return chosen[..., 0] @ self.in_word.T

    def gradients(self, shares: list[float], batch_size: int) -> torch.Tensor:
        """Of each word's log-probability by the visual tokens, `(num_words, all tokens, hidden_size)`: the mean over places on the way
        from a grey picture's tokens (0) to the own ones (1). In one backward pass, or in several of `batch_size` rows."""
        rows = [(word, share) for word in range(len(self.words)) for share in shares]
        way = self.visual_tokens - self.grey_tokens
        gradients = torch.zeros(len(self.words), *way.shape, device=way.device)
        with LOCK, torch.enable_grad(), checkpointing(self.model.base_model.language_model):
            for start in range(0, len(rows), batch_size):
                words, at = zip(*rows[start : start + batch_size])
                words, at = torch.tensor(words, device=way.device), torch.tensor(at, device=way.device, dtype=way.dtype)
                leaf = (self.grey_tokens + at[:, None, None] * way).detach().requires_grad_()
                total = self.log_probs(leaf).gather(1, words[:, None]).sum()
                gradients.index_add_(0, words, torch.autograd.grad(total, leaf)[0].float())
        return gradients / len(shares)

    def by_gradient(self, batch_size: int, shares=(1.0,)):
        """Gradient times what the picture adds to a grey one's visual tokens, patch by patch."""
        gradients = self.gradients(shares, batch_size).split(self.counts, 1)
        parts = PatchParts.of(self.model, self.image_outputs)
        evidence, tokens = [], []
        for image, of_image in enumerate(gradients):
            added = PatchParts(parts.maps, parts.values[image : image + 1] - parts.values[-1:], parts.constant)
            products = added.along(of_image)
            evidence.append(products.sum(1))
            tokens.append(products.sum(2))
        return evidence, tokens

    def by_integrated(self, batch_size: int):
        """The same with gradients from all along the way from the grey picture's tokens (integrated gradients,
        https://arxiv.org/abs/1703.01365): all patches' evidence sums to what the picture did for the word."""
        return self.by_gradient(batch_size, [(step + 0.5) / NUM_STEPS for step in range(NUM_STEPS)])

    def by_attention(self, batch_size: int, rolled_out: bool = False):
        """Attention of the language model to visual tokens, a mean over layers and heads, times the norms of the patches' parts."""
        with LOCK, torch.no_grad(), eager_attention(self.model):
            layers = self.run(self.visual_tokens[None], output_attentions=True, logits_to_keep=1).attentions
        if not layers or any(layer is None or layer.ndim != 4 for layer in layers):
            raise ValueError("This language model does not tell its attention: take another `method`.")
        layers = [layer[0].float().mean(0) for layer in layers]
        reach = sum(layers) / len(layers)
        if rolled_out:  # https://arxiv.org/abs/2005.00928
            reach = torch.eye(len(reach), device=reach.device)
            for layer in layers:
                reach = (reach + layer.to(reach.device) @ reach) / 2
        predicting = slice(self.prompt_ids.shape[1] - 1, self.ids.shape[1] - 1)
        tokens = (self.in_word @ reach.to(self.ids.device)[predicting, self.columns]).split(self.counts, 1)
        parts, evidence = PatchParts.of(self.model, self.image_outputs), []
        for image, of_image in enumerate(tokens):
            norms = parts[[image]].norms(of_image.shape[1])[0]
            evidence.append(of_image @ (norms / norms.sum(-1, keepdim=True)))
        return evidence, list(tokens)

    def by_rollout(self, batch_size: int):
        """The same with attention multiplied through the layers, which counts what tokens hand on to each other."""
        return self.by_attention(batch_size, rolled_out=True)

    def by_occlusion(self, batch_size: int, window: int = WINDOW):
        """By how much each word's log-probability falls where a window around each patch is grey: a mean over the windows that a
        patch is in. Every window is a vision pass and one of the language model."""
        reach, grid = window // 2, torch.arange(self.side, device=self.ids.device)
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
        """The words' log-probabilities, `(rows, num_words)`, with patches of an image in grey: `covered` is bool, `(rows, num_patches)`."""
        pixels, m, results = self.pixel_values[image], self.counts[image], []
        size = pixels.shape[-1] // self.side  # a rest at the right and the bottom is in no patch
        first = sum(self.counts[:image])
        for rows in covered.unflatten(-1, (self.side, self.side)).split(batch_size):
            mask = rows.repeat_interleave(size, 1).repeat_interleave(size, 2)
            mask = torch.nn.functional.pad(mask, (0, pixels.shape[-1] - mask.shape[-1]) * 2)
            altered = torch.where(mask[:, None], self.grey, pixels)
            tokens = self.visual_tokens.repeat(len(rows), 1, 1)
            tokens[:, first : first + m] = torch.stack(self.model.get_image_features(altered, m).pooler_output)
            results.append(self.log_probs(tokens))
        return torch.cat(results)


def _last_text(messages: list[dict]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def split_words(tokenizer, ids: list[int]) -> tuple[str, list[str], list[int]]:
    """The text of an answer, its words, and to which of them each token belongs: to the last that it has a part in."""
    text = tokenizer.decode(ids)
    word_of, shift = [], len(text) - len(text.lstrip())
    for end in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:end]).rstrip("\ufffd")[shift:]  # a character may come in several tokens
        word_of.append(max(0, len(so_far.split()) - 1))
    return text.strip(), text.split(), word_of


def grey_pixels(processor, pixel_values: torch.Tensor) -> torch.Tensor:
    """A picture of the padding's colour as the processor prepares it, `(1, num_channels, height, width)`."""
    colour = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    blank = Image.new("RGB", (pixel_values.shape[-1], pixel_values.shape[-2]), colour)
    pixels = processor.image_processor(blank, return_tensors="pt")["pixel_values"]
    return pixels.to(pixel_values.device, pixel_values.dtype)


def lay_out(image_processor, image) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A picture as the patches lie on it, a square where it is padded, and where in it the image is."""
    picture = to_rgb(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    if image_processor.do_center_crop:
        shortest, side = min(picture.size), image_processor.side
        scale = shortest / (image_processor.size.get("shortest_edge") or side)
        left, top = ((length - side * scale) / 2 for length in picture.size)
        picture = picture.crop([round(at) for at in (left, top, left + side * scale, top + side * scale)])
    if not image_processor.do_pad:
        return picture, (0, 0, *picture.size)
    longest = max(picture.size)
    left, top = ((longest - length) // 2 for length in picture.size)
    square = Image.new("RGB", (longest, longest), tuple(int(255 * mean) for mean in image_processor.image_mean))
    square.paste(picture, (left, top))
    return square, (left, top, left + picture.width, top + picture.height)


@contextlib.contextmanager
def checkpointing(language_model):
    """Layers keep their inputs alone for the backward pass, and are computed again in it. transformers has that for models in
    training, whose dropout is not wanted here."""
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    own = [layer.__dict__.get("forward") for layer in layers]  # as accelerate sets it
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
    """The language model computes attention in the way that can tell it."""
    text_model = model.base_model.language_model
    before = text_model.config._attn_implementation
    text_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        text_model.set_attn_implementation(before)
