"""A cache of the prefix that all prompts share, prefilled once."""

import copy

import torch
from transformers import DynamicCache

from .modeling.budget_mqt_llava import CACHE_NAME


class PrefixCache:
    """Keys and values of the prefix that prompts share, computed once and reused in every call of `generate`.

    ```python
    prefix = PrefixCache(model, processor)  # by default, the chat template's system prompt
    model.generate(**prefix(inputs), num_visual_tokens=16)
    ```

    It doesn't change the answers, as long as the model's weights and dtype stay the same. The cache is a `DynamicCache`, so it cannot
    be combined with a static cache or assisted decoding. It saves most if m and the question are short: at m = 16, LLaVA 1.5's
    system prompt is about half of a prompt with one image.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model.
        processor (`MQTLlavaProcessor`): its processor.
        text (`str`, *optional*): the shared prefix. Defaults to what the chat template puts before the first image or question.

    Raises:
        `ValueError`: if the prompts have no prefix in common.
    """

    @torch.no_grad()
    def __init__(self, model, processor, text: str | None = None):
        tokenizer = processor.tokenizer
        if text is None:
            contents = processor.image_token, "1", "a"
            samples = [_as_prompt(processor, content) for content in contents]
            if samples[1] == samples[2]:  # a template that only accepts lists of parts
                parts = {"type": "image"}, {"type": "text", "text": "1"}, {"type": "text", "text": "a"}
                samples = [_as_prompt(processor, [part]) for part in parts]
        else:
            bos = tokenizer.bos_token or ""
            samples = [bos + text.removeprefix(bos) + end for end in (processor.image_token, "1", " a")]
        ids = [tokenizer(sample, add_special_tokens=False)["input_ids"] for sample in samples]
        # The text that follows can change the last tokens of the prefix, so only tokens that stay the same are shared
        shared = next((i for i, tokens in enumerate(zip(*ids)) if len(set(tokens)) > 1), 0)
        if shared == 0:
            raise ValueError(f"the prompts have no prefix in common: {samples[0]!r} and {samples[1]!r}")
        self.input_ids = torch.tensor(ids[0][:shared], device=model.device)
        self.cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=self.input_ids[None], use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache})

    def __len__(self) -> int:
        """The number of shared tokens."""
        return len(self.input_ids)

    def __call__(self, inputs, num_sequences: int = 1) -> dict:
        """
        Args:
            inputs (`dict`): the processor's output, with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`.
                Left padding is moved after the shared tokens.
            num_sequences (`int`, *optional*, defaults to 1): `num_beams` or `num_return_sequences` of `generate`.

        Returns:
            `dict`: the inputs for `generate`, with a copy of the cache as `past_key_values`, or `cache` since transformers 5.24.

        Raises:
            `ValueError`: for a prompt that does not begin with the shared tokens, or has nothing after them.
        """
        input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        batch_size, length = input_ids.shape
        padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        column = torch.arange(length, device=input_ids.device).expand(batch_size, -1)
        moved = torch.where(column < len(self) + padding, column - len(self), column)
        source = torch.where(column < len(self), column + padding, moved).clamp(max=length - 1)
        input_ids, mask = input_ids.gather(1, source), mask.gather(1, source)
        fits = (length - padding[:, 0] > len(self)) & (input_ids[:, : len(self)] == self.input_ids[:length]).all(-1)
        if not fits.all():
            row = int(fits.int().argmin())
            raise ValueError(
                f"row {row} does not begin with the {len(self)} shared tokens and continue after them; it has "
                f"{int(length - padding[row])} tokens that begin with {input_ids[row, :8].tolist()}, the shared ones begin with "
                f"{self.input_ids[:8].tolist()}..."
            )
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(batch_size * num_sequences)
        return {**inputs, "input_ids": input_ids, "attention_mask": mask, CACHE_NAME: cache}


def _as_prompt(processor, content) -> str:
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
