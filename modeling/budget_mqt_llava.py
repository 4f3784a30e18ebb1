"""How many visual tokens an image has: `num_visual_tokens` is what is asked for, `visual_token_counts` what was resolved, one
integer per image. A prompt carries its counts as runs of placeholders; [`rebudget`] writes it anew for other ones."""

from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral

import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling


# What the installed transformers calls keys and values: `past_key_values` before 5.24, `cache` since
CACHE_NAME = next(
    field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)


def resolve_visual_token_counts(num_visual_tokens, num_images: int, num_query_tokens: int) -> list[int]:
    """Spell out `num_visual_tokens` as one number of visual tokens per image.

    Args:
        num_visual_tokens (`int`, `Iterable[int]` or `None`):
            One number for all images, or one per image. `None` stands for `num_query_tokens`.
        num_images (`int`):
            How many images there are.
        num_query_tokens (`int`):
            M, as many visual tokens as the model can make of an image.

    Returns:
        `list[int]`: the visual tokens of each image, of length `num_images`.

    Raises:
        `ValueError`: for anything but integers from 1 to M, and for a list whose length is not `num_images`.
    """
    if num_visual_tokens is None:
        return [num_query_tokens] * num_images
    if hasattr(num_visual_tokens, "tolist"):  # tensors and arrays, also those of no dimension
        num_visual_tokens = num_visual_tokens.tolist()
    if isinstance(num_visual_tokens, Iterable) and not isinstance(num_visual_tokens, (str, bytes, dict)):
        counts = list(num_visual_tokens)
        if len(counts) != num_images:
            raise ValueError(
                f"`num_visual_tokens` must be one integer or a list of them, one per image; got {len(counts)} entries, "
                f"{counts}, for {num_images} images."
            )
    else:
        counts = [num_visual_tokens] * max(num_images, 1)  # checked even where there is no image to use it
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= int(count) <= num_query_tokens:
            raise ValueError(
                f"`num_visual_tokens` must be an integer from 1 to {num_query_tokens}, or a list of them, one per image; "
                f"got {num_visual_tokens!r}."
            )
    return [int(count) for count in counts][:num_images]


def placeholder_runs(is_placeholder: torch.Tensor) -> list[int]:
    """Lengths of the runs of consecutive placeholders in a `(batch_size, sequence_length)` mask, row after row."""
    edges = nn.functional.pad(is_placeholder.int(), (1, 1)).diff(dim=-1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def default_num_visual_tokens(*generation_configs):
    """What the first generation config that has `num_visual_tokens` says; `None` where none has it."""
    settings = (getattr(config, "num_visual_tokens", None) for config in generation_configs)
    return next((num_visual_tokens for num_visual_tokens in settings if num_visual_tokens is not None), None)


def refuse_in_training(num_visual_tokens):
    """A trainer such as GRPO's scores answers with the prompt as it is, not as a generation config would have it."""
    raise ValueError(
        f"The generation config asks for {num_visual_tokens} visual tokens, and the prompt has another number of placeholders. "
        "In training that would be wrong: answers are scored with the prompt as it is. Prepare the prompt with as many, by "
        "`AutoProcessor.from_pretrained(..., num_visual_tokens=m)`; or call `model.eval()` before `generate`."
    )


def refuse_num_visual_tokens(kwargs: dict, instead: str):
    """What no layer would read must not become the default, misspelt or not."""
    for name in kwargs:
        if name.startswith(("num_visual", "visual_token")):
            raise ValueError(f"`{name}` is not taken here; pass {instead}. Got {kwargs[name]!r}.")


def count_visual_tokens(is_placeholder: torch.Tensor, num_images: int, visual_token_counts=None) -> list[int]:
    """How many placeholders stand for each image of a prompt.

    Args:
        is_placeholder (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Where the prompt has placeholders.
        num_images (`int`):
            How many images stand behind them.
        visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
            As the processor returns it. Where it is missing, one run of placeholders is one image.

    Returns:
        `list[int]`: of length `num_images`, in the order of the images.

    Raises:
        `ValueError`: when the placeholders do not fit the images.
    """
    is_placeholder = is_placeholder.cpu()  # the one transfer; what follows would be one each
    if visual_token_counts is not None:
        counts, total = torch.as_tensor(visual_token_counts).tolist(), int(is_placeholder.sum())
        if len(counts) != num_images or sum(counts) != total or min(counts, default=1) < 1:
            raise ValueError(
                f"Image features and image tokens do not match: there are {num_images} images, `visual_token_counts` is "
                f"{counts} and the prompt has {total} image placeholders. Pass all three as the processor made them, to go "
                "on from a cache those of its new images alone; if the prompt was truncated, raise `max_length` or lower "
                "`num_visual_tokens`."
            )
        return counts
    runs = placeholder_runs(is_placeholder)
    if len(runs) != num_images:
        raise ValueError(
            f"Image features and image tokens do not match: there are {num_images} images, the prompt has {len(runs)} runs of "
            f"image placeholders, of {runs} tokens. Adjacent images need `visual_token_counts` as the processor returns it."
        )
    return runs


def rows_passed_over(is_placeholder, num_images: int, num_query_tokens: int, visual_token_counts=None) -> torch.Tensor:
    """How many visual tokens that have no placeholder stand before that of each position, where every image has M of them.

    Tensor operations alone, whose shapes do not depend on the counts, for `torch.compile` and `torch.export`.

    Returns:
        `torch.LongTensor` of shape `(batch_size * sequence_length,)`.
    """
    if visual_token_counts is None:  # one run of placeholders is one image
        starts = is_placeholder & ~nn.functional.pad(is_placeholder, (1, 0))[:, :-1]
        image = (starts.flatten().cumsum(0) - 1).clamp(0, num_images - 1)
        visual_token_counts = torch.zeros(num_images, dtype=torch.long, device=image.device)
        visual_token_counts = visual_token_counts.scatter_add(0, image, is_placeholder.flatten().long())
    ends = visual_token_counts.to(is_placeholder.device).cumsum(0)
    image = torch.searchsorted(ends, is_placeholder.flatten().cumsum(0)).clamp(max=num_images - 1)
    starts = nn.functional.pad(ends, (1, 0))[:-1]
    return image * num_query_tokens - starts[image]


def rebudget(inputs, num_visual_tokens, config, padding_side: str = "right", num_cached: int = 0) -> dict:
    """Write a prepared prompt anew, so that its images have other numbers of visual tokens.

    Padding is removed and put back, as short as the new lengths allow, on the side where the prompt has it.

    Args:
        inputs (`Mapping`):
            A prompt as the processor returns it, with `mm_encoder_outputs` instead of `pixel_values` if need be, and what
            is aligned with `input_ids`: `attention_mask`, `labels`, `position_ids`, `token_type_ids`. It is not changed.
        num_visual_tokens (`int` or `list[int]`):
            m, for all images or for each, from 1 to M.
        config (`MQTLlavaConfig`):
            Of the model.
        padding_side (`"left"` or `"right"`, *optional*, defaults to `"right"`):
            Where to pad rows that had no padding and become unequal.
        num_cached (`int`, *optional*, defaults to 0):
            So many positions at the beginning of `input_ids` are in a cache already and stay as they are; the images are
            those of the others. (Where `input_ids` only have what follows a cache, and the mask has all, this is 0.)

    Returns:
        `dict`: `inputs`, of which those named above are rewritten, and `visual_token_counts`, which are the new ones.

    Raises:
        `ValueError`: for anything but integers from 1 to M, when images and placeholders do not match, and for a prompt
        given as `inputs_embeds`.

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
                "`num_visual_tokens` is asked for, but no images stand behind the placeholders of the prompt."
            )
        return inputs
    if input_ids is None or inputs.get("inputs_embeds") is not None:
        raise ValueError(
            "`num_visual_tokens` needs `input_ids`: in a prompt given as `inputs_embeds` images have theirs."
        )
    if features is not None:
        tokens = first_visual_tokens(features.pooler_output, new_counts)
        image_outputs = BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]  # a list, as LLaVA's
        inputs["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "image": image_outputs}

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.ndim != 2 or mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            "`num_visual_tokens` needs an attention mask of shape (batch_size, sequence_length), with the cached positions if "
            f"`input_ids` follow a cache; got {tuple(mask.shape)} for `input_ids` of shape {tuple(input_ids.shape)}."
        )
    cached_mask = mask[:, : mask.shape[1] - input_ids.shape[1]]
    mask = mask[:, cached_mask.shape[1] :]
    # To the host at once: where tokens go is worked out there, without asking the device again
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
        if name == "position_ids":  # counted on from where the caller has each row begin
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
    """Which column of the old prompt each column of the new one is taken from, `(batch_size, new_length)`; -1 is padding."""
    batch_size, length = is_placeholder.shape
    # Zeros within the mask belong to the sequence, those around it are padding
    is_real = (is_attended.cumsum(-1) > 0) & (is_attended.flip(-1).cumsum(-1).flip(-1) > 0)
    if not is_real[:, :1].all():
        padding_side = "left"
    elif not is_real[:, -1:].all():
        padding_side = "right"
    # Text is repeated once, padding never, an image's first placeholder as often as the image shall have them
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
    """The caller's own prompt, where `generate` uses another one: what goes to the caller begins with it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the caller's.
        used_length (`int`): of the prompt that is used.
    """

    def __init__(self, input_ids: torch.Tensor, used_length: int):
        self.input_ids, self.used_length = input_ids, used_length

    def before(self, sequences: torch.Tensor) -> torch.Tensor:
        """Sequences, of beams and samples too, with this prompt for the one that was used."""
        prompts = self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)
        return torch.cat([prompts, sequences[:, self.used_length :]], dim=1)

    def wrap(self, logits_processor, stopping_criteria, prefix_allowed_tokens_fn) -> tuple:
        """What the caller passes to `generate`, to be called with rows that begin with this prompt."""

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
        """What `generate` returns, with this prompt; the cache, which has the other one, is marked for [`check_cache`]."""
        if isinstance(outputs, torch.Tensor):
            outputs = self.before(outputs)
        else:
            outputs.sequences = self.before(outputs.sequences)
            cache = outputs.get(CACHE_NAME)
        if cache is not None:
            cache.is_of_other_input_ids = True
        return outputs


def first_visual_tokens(visual_tokens: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    """The first `counts[i]` visual tokens of image i, which are what the image has with fewer: token i is the same whatever m.

    Raises:
        `ValueError`: where there are too few.
    """
    lengths = [len(tokens) for tokens in visual_tokens]
    if any(count > length for count, length in zip(counts, lengths)):
        raise ValueError(
            f"`mm_encoder_outputs` holds {lengths} visual tokens for the images, `num_visual_tokens` asks for {counts}. "
            "Make the features with as many as will be asked for."
        )
    return [tokens[:count] for tokens, count in zip(visual_tokens, counts)]


def check_cache(cache, inputs: dict) -> int:
    """How many positions of the prompt that is passed to `generate` are in the cache already.

    Raises:
        `ValueError`: where transformers would go on from the cache wrongly.
    """
    cache_length = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if not cache_length:
        return 0
    wrong = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if inputs.get(name) is not None]
    wrong += ["use_cache=False"] if inputs.get("use_cache") is False else []
    if wrong:
        raise ValueError(f"`generate` cannot go on from a cache with {wrong[0]}: answers would be wrong.")
    prompt, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    prompt = inputs.get("input_ids") if prompt is None else prompt
    if prompt is None or (mask is not None and mask.shape[1] > prompt.shape[1]):
        return 0  # the prompt is what follows
    if prompt.shape[1] <= cache_length:
        raise ValueError(
            f"The cache holds {cache_length} positions and the prompt has {prompt.shape[1]}, so there is nothing to go on with. "
            "Pass the whole conversation, or what follows the cached positions with an `attention_mask` of the whole; or a "
            "new cache, if this one has been used for the prompt before."
        )
    if getattr(cache, "is_of_other_input_ids", False):
        raise ValueError(
            "The cache was filled by `generate(num_visual_tokens=...)`, so its images have other numbers of visual tokens than "
            "`input_ids` has placeholders, and those of cached images cannot be changed. Pass what follows the cached positions "
            "alone, with an `attention_mask` of the whole; or prepare conversations by `processor(..., num_visual_tokens=m)`."
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
