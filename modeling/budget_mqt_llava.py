"""The number of visual tokens per image. `num_visual_tokens` is what the caller asks for, `visual_token_counts` what it resolves
to, one integer per image. A prompt has a run of that many placeholders for each image; [`rebudget`] changes their number."""

from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral

import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling


# The installed transformers' name for the key-value cache: `past_key_values` before 5.24, `cache` since
CACHE_NAME = next(
    field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)


def resolve_visual_token_counts(num_visual_tokens, num_images: int, num_query_tokens: int) -> list[int]:
    """Expand `num_visual_tokens` to one number per image.

    Args:
        num_visual_tokens (`int`, `Iterable[int]` or `None`):
            One number for all images, or one per image. `None` means `num_query_tokens`.
        num_images (`int`):
            The number of images.
        num_query_tokens (`int`):
            M, the largest number of visual tokens per image.

    Returns:
        `list[int]`: the number of visual tokens of each image, of length `num_images`.

    Raises:
        `ValueError`: for anything but integers from 1 to M, and for a list whose length is not `num_images`.
    """
    if num_visual_tokens is None:
        return [num_query_tokens] * num_images
    if hasattr(num_visual_tokens, "tolist"):  # tensors and arrays, 0-dimensional ones too
        num_visual_tokens = num_visual_tokens.tolist()
    if isinstance(num_visual_tokens, Iterable) and not isinstance(num_visual_tokens, (str, bytes, dict)):
        counts = list(num_visual_tokens)
        if len(counts) != num_images:
            raise ValueError(
                f"`num_visual_tokens` must be one integer or a list of them, one per image; got {len(counts)} entries, "
                f"{counts}, for {num_images} images."
            )
    else:
        counts = [num_visual_tokens] * max(num_images, 1)  # checked even if there is no image
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= int(count) <= num_query_tokens:
            raise ValueError(
                f"`num_visual_tokens` must be an integer from 1 to {num_query_tokens}, or a list of them, one per image; "
                f"got {num_visual_tokens!r}."
            )
    return [int(count) for count in counts][:num_images]


def placeholder_runs(is_placeholder: torch.Tensor) -> list[int]:
    """Lengths of the runs of consecutive placeholders in a `(batch_size, sequence_length)` mask, row by row."""
    edges = nn.functional.pad(is_placeholder.int(), (1, 1)).diff(dim=-1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def default_num_visual_tokens(*generation_configs):
    """`num_visual_tokens` of the first generation config that sets it, or `None`."""
    settings = (getattr(config, "num_visual_tokens", None) for config in generation_configs)
    return next((num_visual_tokens for num_visual_tokens in settings if num_visual_tokens is not None), None)


def refuse_in_training(num_visual_tokens):
    """Trainers such as GRPO's score answers with the prompt as it was prepared, not as the generation config would change it."""
    raise ValueError(
        f"The generation config sets `num_visual_tokens` to {num_visual_tokens}, but the prompt has another number of placeholders. "
        "A model in training mode refuses this, since trainers score answers with the prompt as it was prepared. Prepare the "
        "prompt with `AutoProcessor.from_pretrained(..., num_visual_tokens=m)`, or call `model.eval()` before `generate`."
    )


def refuse_num_visual_tokens(kwargs: dict, instead: str):
    """An argument that no layer reads, misspelt or not, must not silently fall back to the default."""
    for name in kwargs:
        if name.startswith(("num_visual", "visual_token")):
            raise ValueError(f"`{name}` is not accepted here; pass {instead}. Got {kwargs[name]!r}.")


def count_visual_tokens(is_placeholder: torch.Tensor, num_images: int, visual_token_counts=None) -> list[int]:
    """Count the placeholders of each image in a prompt.

    Args:
        is_placeholder (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Where the prompt has placeholders.
        num_images (`int`):
            The number of images.
        visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
            As returned by the processor. By default, each run of placeholders is one image.

    Returns:
        `list[int]`: of length `num_images`, in the order of the images.

    Raises:
        `ValueError`: if the placeholders don't match the images.
    """
    is_placeholder = is_placeholder.cpu()  # one transfer instead of one per operation below
    if visual_token_counts is not None:
        counts, total = torch.as_tensor(visual_token_counts).tolist(), int(is_placeholder.sum())
        if len(counts) != num_images or sum(counts) != total or min(counts, default=1) < 1:
            raise ValueError(
                f"Image features and image tokens do not match: there are {num_images} images, `visual_token_counts` is "
                f"{counts} and the prompt has {total} image placeholders. Pass all three as returned by the processor; with a "
                "cache, pass the images and counts of the new images only. If the prompt was truncated, raise `max_length` or "
                "lower `num_visual_tokens`."
            )
        return counts
    runs = placeholder_runs(is_placeholder)
    if len(runs) != num_images:
        raise ValueError(
            f"Image features and image tokens do not match: there are {num_images} images, but the prompt has {len(runs)} runs of "
            f"image placeholders, of {runs} tokens. Adjacent images need `visual_token_counts` as returned by the processor."
        )
    return runs


def rows_passed_over(is_placeholder, num_images: int, num_query_tokens: int, visual_token_counts=None) -> torch.Tensor:
    """For each position, how many of the preceding visual tokens have no placeholder, if all images are encoded to M tokens.

    Uses only tensor operations whose shapes don't depend on the counts, for `torch.compile` and `torch.export`.

    Returns:
        `torch.LongTensor` of shape `(batch_size * sequence_length,)`.
    """
    if visual_token_counts is None:  # each run of placeholders is one image
        starts = is_placeholder & ~nn.functional.pad(is_placeholder, (1, 0))[:, :-1]
        image = (starts.flatten().cumsum(0) - 1).clamp(0, num_images - 1)
        visual_token_counts = torch.zeros(num_images, dtype=torch.long, device=image.device)
        visual_token_counts = visual_token_counts.scatter_add(0, image, is_placeholder.flatten().long())
    ends = visual_token_counts.to(is_placeholder.device).cumsum(0)
    image = torch.searchsorted(ends, is_placeholder.flatten().cumsum(0)).clamp(max=num_images - 1)
    starts = nn.functional.pad(ends, (1, 0))[:-1]
    return image * num_query_tokens - starts[image]


def rebudget(inputs, num_visual_tokens, config, padding_side: str = "right", num_cached: int = 0) -> dict:
    """Change the number of visual tokens per image in a prepared prompt.

    Rows are padded again to the new longest row, on the side where the prompt has its padding.

    Args:
        inputs (`Mapping`):
            A prompt as returned by the processor: `input_ids` of shape `(batch_size, sequence_length)`, `pixel_values` or
            `mm_encoder_outputs`, and any of `attention_mask`, `labels`, `position_ids` and `token_type_ids`, each with the
            shape of `input_ids`. It is not modified.
        num_visual_tokens (`int` or `list[int]`):
            m, the new number of visual tokens of every image or of each, from 1 to M.
        config (`MQTLlavaConfig`):
            The model's config.
        padding_side (`"left"` or `"right"`, *optional*, defaults to `"right"`):
            The side to pad on if the prompt has no padding.
        num_cached (`int`, *optional*, defaults to 0):
            The number of positions at the beginning of `input_ids` that are in the cache already. They stay as they are, and
            `inputs` has the images of the other positions only. Leave it at 0 if `input_ids` begins after the cache.

    Returns:
        `dict`: `inputs` with the entries above rewritten, and the new `visual_token_counts` of shape `(num_images,)`.

    Raises:
        `ValueError`: if `num_visual_tokens` is anything but integers from 1 to M, if images and placeholders don't match, or if
            the prompt is given as `inputs_embeds`.

    Example:

    ```python
    >>> inputs = processor(images=image, text="<image>\\nWhat is this?", return_tensors="pt")  # M placeholders
    >>> few = rebudget(inputs, 16, model.config)
    >>> few["visual_token_counts"]
    tensor([16])
    ```"""
    inputs = dict(inputs)
    input_ids, features = inputs.get("input_ids"), (inputs.get("mm_encoder_outputs") or {}).get("image")
    images = inputs.get("pixel_values") if features is None else features.pooler_output
    num_images = 0 if images is None else len(images)
    new_counts = resolve_visual_token_counts(num_visual_tokens, num_images, config.num_query_tokens)
    if num_images == 0:
        if input_ids is not None and (input_ids[:, num_cached:] == config.image_token_id).any():
            raise ValueError(
                "`num_visual_tokens` was passed and the prompt has image placeholders, but there are no images."
            )
        return inputs
    if input_ids is None or inputs.get("inputs_embeds") is not None:
        raise ValueError(
            "`num_visual_tokens` needs `input_ids`: it cannot change a prompt that is given as `inputs_embeds`."
        )
    if features is not None:
        tokens = first_visual_tokens(features.pooler_output, new_counts)
        image_outputs = BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]  # a list, as LLaVA's
        inputs["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "image": image_outputs}

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.ndim != 2 or mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            "`num_visual_tokens` needs an attention mask of shape (batch_size, sequence_length), which includes the cached "
            f"positions if there is a cache; got {tuple(mask.shape)} for `input_ids` of shape {tuple(input_ids.shape)}."
        )
    cached_mask = mask[:, : mask.shape[1] - input_ids.shape[1]]
    mask = mask[:, cached_mask.shape[1] :]
    # One transfer to the host, where the new layout is computed
    is_placeholder, is_attended = torch.stack([input_ids == config.image_token_id, mask != 0])[:, :, num_cached:].cpu()
    old_counts = count_visual_tokens(is_placeholder, num_images, inputs.get("visual_token_counts"))
    inputs["visual_token_counts"] = torch.tensor(new_counts)
    if new_counts == old_counts:
        return inputs

    source = _source_columns(
        is_placeholder, is_attended, old_counts, new_counts, "left" if num_cached else padding_side
    )
    cached = torch.arange(num_cached).expand(len(source), -1)
    source = torch.cat([cached, torch.where(source < 0, source, source + num_cached)], dim=1)
    has_padding = bool((source < 0).any())
    source = source.to(input_ids.device)
    is_padding = source < 0

    def realign(tensor, fill):
        return tensor.gather(1, source.clamp(min=0)).masked_fill(is_padding, fill)

    for name in ("labels", "position_ids", "token_type_ids", "mm_token_type_ids"):
        tensor = inputs.get(name)
        if tensor is None:
            continue
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}; got {tuple(tensor.shape)}."
            )
        if name == "position_ids":  # recounted from the caller's first position of each row
            positions = realign(mask, 0).cumsum(-1) - 1
            inputs[name] = positions.clamp(min=0) + tensor.where(mask != 0, tensor.max()).amin(-1, keepdim=True)
        else:
            inputs[name] = realign(tensor, -100 if name == "labels" else 0)
    if inputs.get("attention_mask") is not None or has_padding:
        inputs["attention_mask"] = torch.cat([cached_mask, realign(mask, 0)], dim=1)
    pad_token_id = config.get_text_config().pad_token_id
    inputs["input_ids"] = realign(
        input_ids, pad_token_id if isinstance(pad_token_id, int) and pad_token_id >= 0 else 0
    )
    return inputs


def _source_columns(is_placeholder, is_attended, old_counts, new_counts, padding_side: str) -> torch.Tensor:
    """For each column of the new prompt, the column of the old one to copy, `(batch_size, new_length)`; -1 is padding."""
    batch_size, length = is_placeholder.shape
    # Zeros at the ends of the mask are padding, those in between belong to the sequence
    is_real = (is_attended.cumsum(-1) > 0) & (is_attended.flip(-1).cumsum(-1).flip(-1) > 0)
    if not is_real[:, :1].all():
        padding_side = "left"
    elif not is_real[:, -1:].all():
        padding_side = "right"
    # Each text token is copied once, and the first placeholder of an image as often as its new count
    repeats = (is_real & ~is_placeholder).long()
    ends = torch.tensor(old_counts).cumsum(0)
    first = is_placeholder.flatten().nonzero()[:, 0][ends - torch.tensor(old_counts)]
    repeats.view(-1)[first] = torch.tensor(new_counts)
    lengths = repeats.sum(-1)
    new_length = int(lengths.max())
    row = torch.arange(batch_size).repeat_interleave(lengths)
    column = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    if padding_side == "left":
        column += (new_length - lengths)[row]
    source = torch.full((batch_size, new_length), -1)
    source[row, column] = torch.arange(length).repeat(batch_size).repeat_interleave(repeats.flatten())
    return source


class OwnPrompt:
    """Puts the caller's prompt back in place of the rewritten one that `generate` runs with.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the caller's prompt.
        used_length (`int`): the length of the rewritten prompt.
    """

    def __init__(self, input_ids: torch.Tensor, used_length: int):
        self.input_ids, self.used_length = input_ids, used_length

    def before(self, sequences: torch.Tensor) -> torch.Tensor:
        """`sequences`, with the caller's prompt in place of the rewritten one. There may be several per row (beams, samples)."""
        prompts = self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)
        return torch.cat([prompts, sequences[:, self.used_length :]], dim=1)

    def wrap(self, logits_processor, stopping_criteria, prefix_allowed_tokens_fn) -> tuple:
        """The caller's callbacks, wrapped so that they see the caller's prompt."""

        def with_own_rows(function):
            return lambda rows, *args, **kwargs: function(self.before(rows), *args, **kwargs)

        def allowed_tokens(row_index, ids):
            return prefix_allowed_tokens_fn(row_index, torch.cat([self.input_ids[row_index], ids[self.used_length :]]))

        return (
            LogitsProcessorList(map(with_own_rows, logits_processor or ())),
            StoppingCriteriaList(map(with_own_rows, stopping_criteria or ())),
            None if prefix_allowed_tokens_fn is None else allowed_tokens,
        )

    def restore(self, outputs, cache):
        """The outputs of `generate` with the caller's prompt. The cache holds the rewritten one and is marked so for
        [`check_cache`]."""
        if isinstance(outputs, torch.Tensor):
            outputs = self.before(outputs)
        else:
            outputs.sequences = self.before(outputs.sequences)
            cache = outputs.get(CACHE_NAME)
        if cache is not None:
            cache.is_of_other_input_ids = True
        return outputs


def first_visual_tokens(visual_tokens: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    """The first `counts[i]` visual tokens of image i. They are what the model would compute for m = `counts[i]`.

    Raises:
        `ValueError`: if an image has fewer.
    """
    lengths = [len(tokens) for tokens in visual_tokens]
    if any(count > length for count, length in zip(counts, lengths)):
        raise ValueError(
            f"`mm_encoder_outputs` has {lengths} visual tokens for the images, but `num_visual_tokens` asks for {counts}. "
            "Compute the features with the largest number that will be asked for."
        )
    return [tokens[:count] for tokens, count in zip(visual_tokens, counts)]


def check_cache(cache, inputs: dict) -> int:
    """The number of positions of the prompt passed to `generate` that are in the cache already.

    Raises:
        `ValueError`: if transformers would continue from the cache incorrectly.
    """
    cache_length = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if not cache_length:
        return 0
    wrong = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if inputs.get(name) is not None]
    wrong += ["use_cache=False"] if inputs.get("use_cache") is False else []
    if wrong:
        raise ValueError(f"`generate` cannot continue from a cache with {wrong[0]}: answers would be wrong.")
    prompt, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    prompt = inputs.get("input_ids") if prompt is None else prompt
    if prompt is None or (mask is not None and mask.shape[1] > prompt.shape[1]):
        return 0  # the prompt begins after the cache
    if prompt.shape[1] <= cache_length:
        raise ValueError(
            f"The cache holds {cache_length} positions and the prompt has {prompt.shape[1]}, so there is nothing new to process. "
            "Pass the whole conversation; or only what follows the cached positions, with an `attention_mask` of the whole; or a "
            "new cache, if this one was already used with this prompt."
        )
    if getattr(cache, "is_of_other_input_ids", False):
        raise ValueError(
            "The cache was filled by `generate(num_visual_tokens=...)`, so its images don't have as many visual tokens as "
            "`input_ids` has placeholders, and cached images cannot be changed. Pass only what follows the cached positions, with "
            "an `attention_mask` of the whole; or prepare the conversation with `processor(..., num_visual_tokens=m)`."
        )
    return cache_length


__all__ = [
    "CACHE_NAME",
    "OwnPrompt",
    "check_cache",
    "count_visual_tokens",
    "default_num_visual_tokens",
    "first_visual_tokens",
    "placeholder_runs",
    "rebudget",
    "refuse_in_training",
    "refuse_num_visual_tokens",
    "resolve_visual_token_counts",
    "rows_passed_over",
]
