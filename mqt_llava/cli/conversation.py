"""A conversation about images, answered token by token."""

import contextlib
import copy
import time
from typing import Any

from .errors import UsageError


class Conversation:
    """
    Questions about the same images, each asked with all earlier turns. The images are encoded once, and what a prompt shares with the
    one before is not computed again.

    Args:
        processor, model: as the Auto classes load them.
        images (`list[PIL.Image.Image]`): placed at the beginning of the first turn.
        num_visual_tokens (`int` or `VisualTokenSchedule`): m for each image, or a schedule that finds it for each question. With a
            schedule nothing is reused from the turns before.
        max_new_tokens (`int`): maximum length of an answer.
        image_features (*optional*): the images as `get_image_features` returns them, with m or more visual tokens.
        prefix ([`PrefixCache`], *optional*): the beginning that all conversations share.
        limit (`Callable`, *optional*): cuts a schedule to a budget, given the schedule and the lengths of prompt and answer.
    """

    def __init__(
        self,
        processor,
        model,
        images,
        num_visual_tokens,
        max_new_tokens: int,
        image_features=None,
        prefix=None,
        limit=None,
    ):
        self.processor = processor
        self.model = model
        self.images = images
        self.schedule, self.limit = None if isinstance(num_visual_tokens, int) else num_visual_tokens, limit
        self.num_visual_tokens = num_visual_tokens if self.schedule is None else self.schedule.num_visual_tokens[-1]
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict] = []
        self.image_features = image_features
        self.cache: Any = None  # keys and values
        self.cached_ids: Any = None  # of the cache's tokens, of shape `(1, length)`
        if prefix is not None:
            self.cache, self.cached_ids = copy.deepcopy(prefix.cache), prefix.input_ids[None]

    def prepare(self, question: str):
        """The messages up to and including the question, and the model's inputs for them."""
        image_token = self.processor.image_token
        if image_token in question:
            raise UsageError(f"the question must not contain {image_token}, which stands for an image")
        if not is_text(question):
            raise UsageError("the question is not text; to read an image from stdin, pass - and a question")
        parts = [{"type": "text", "text": question}]
        if not self.messages:
            parts = [{"type": "image"}] * len(self.images) + parts
        messages = [*self.messages, {"role": "user", "content": parts}]
        inputs = self.processor(
            images=self.images,
            text=self.processor.apply_chat_template(messages, add_generation_prompt=True),
            num_visual_tokens=self.num_visual_tokens,
            return_tensors="pt",
            add_special_tokens=False,  # the template writes the BOS
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        limit = self.context_length()
        if length >= limit:
            raise UsageError(
                f"the prompt has {length} tokens, the model takes {limit}: use fewer images or visual tokens, or a "
                "shorter conversation"
            )
        return messages, inputs

    def context_length(self):
        return getattr(self.model.config.text_config, "max_position_embeddings", None) or float("inf")

    def ask(self, question: str, write=None) -> dict:
        """Answer a question and remember both; `write` is called with each piece of the answer as it is made. An exception that it
        raises ends the answer, as if the question had not been asked."""
        from ..modeling.budget_mqt_llava import CACHE_NAME

        messages, inputs = self.prepare(question)
        streamer = AnswerStreamer(self.processor.tokenizer, write)
        start = time.perf_counter()
        self.encode(inputs["pixel_values"])
        input_ids = inputs["input_ids"]
        length = input_ids.shape[1]
        options = {
            "input_ids": input_ids,
            "attention_mask": inputs["attention_mask"],
            "max_new_tokens": min(self.max_new_tokens, self.context_length() - length),
            "do_sample": False,
            "num_beams": 1,  # more cannot stream
            "streamer": streamer,
        }
        features = {"mm_encoder_outputs": {"image": self.image_features}}
        if self.schedule is None:
            cache, num_cached = self.cache_for(input_ids)
            self.cache = None  # not to be reused if this is interrupted
            has_images = bool((input_ids[:, num_cached:] == self.processor.image_token_id).any())
            options |= {CACHE_NAME: cache, **(features if has_images else {})}
            # That of the prompt, not the checkpoint's default
            sequences = self.model.generate(**options, num_visual_tokens=self.num_visual_tokens)
            self.cache, self.cached_ids = cache, sequences[:, : cache.get_seq_length()]
            found = {"num_visual_tokens": self.num_visual_tokens}
        else:
            schedule, num_text_tokens = self.schedule, length - len(self.images) * self.num_visual_tokens
            if self.limit is not None:
                schedule = self.limit(schedule, num_text_tokens, options["max_new_tokens"])
            options |= features | {"return_dict_in_generate": True}
            outputs = self.model.generate(**options, num_visual_tokens=schedule)
            found = {"num_visual_tokens": int(outputs.visual_token_counts[0])}
            found |= {"stage": int(outputs.stages[0]), "confidence": round(float(outputs.confidences[0]), 4)}
            length += len(self.images) * (found["num_visual_tokens"] - self.num_visual_tokens)
        seconds = time.perf_counter() - start

        # a token that spells the placeholder would stand for an image in the next prompt
        remembered = streamer.text.replace(self.processor.image_token, "")
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": remembered}]}]
        return {
            "answer": streamer.text,
            **found,
            "prompt_tokens": length,
            "new_tokens": len(streamer.ids),
            "seconds": round(seconds, 4),
        }

    def encode(self, pixel_values):
        import torch

        if self.image_features is None:
            with torch.no_grad():
                self.image_features = self.model.get_image_features(pixel_values, self.num_visual_tokens)

    def prefill(self):
        """Compute what is known before the first question: the images and the beginning of the prompt."""
        import torch
        from transformers import DynamicCache

        from ..modeling.budget_mqt_llava import CACHE_NAME

        (_, inputs), (_, other) = self.prepare("1"), self.prepare("a")
        self.encode(inputs["pixel_values"])
        num_known = count_common(inputs["input_ids"], other["input_ids"])
        if not num_known or self.schedule is not None:
            return
        self.cached_ids = inputs["input_ids"][:, :num_known]
        has_images = bool((self.cached_ids == self.processor.image_token_id).any())
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        with torch.no_grad():
            self.model(
                input_ids=self.cached_ids,
                **({"mm_encoder_outputs": {"image": self.image_features}} if has_images else {}),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_NAME: self.cache},
            )

    def cache_for(self, input_ids):
        """A cache for this prompt, and the number of its tokens that the cache holds already."""
        from transformers import DynamicCache

        if self.cache is not None:
            num_common = count_common(self.cached_ids, input_ids[:, :-1])  # at least one token must be computed
            is_image = input_ids[0] == self.processor.image_token_id
            # images are reused together or not at all
            images_match = not is_image[num_common:].any() or not is_image[:num_common].any()
            with contextlib.suppress(RuntimeError, ValueError):  # a cache with a sliding window cannot be cropped
                if images_match and num_common:
                    if num_common < self.cached_ids.shape[1]:
                        self.cache.crop(num_common - self.cached_ids.shape[1])
                    return self.cache, num_common
        return DynamicCache(config=self.model.config.get_text_config()), 0


def count_common(ids, others) -> int:
    """Length of the common beginning of two prompts, each of shape `(1, length)`."""
    shorter = min(ids.shape[1], others.shape[1])
    return int((ids[0, :shorter] == others[0, :shorter]).cumprod(0).sum())


def is_text(question: str) -> bool:
    """Whether all bytes could be decoded. Python represents the others by surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in question)


def print_now(text: str):
    print(text, end="", flush=True)


class AnswerStreamer:
    """Streams tokens from `generate` as text, and ends it with a newline. `text` is the answer so far.

    transformers' `TextStreamer` does not keep the text, and prints the space before an answer.

    Args:
        write (`Callable`, *optional*): takes each piece.
    """

    def __init__(self, tokenizer, write=print_now):
        self.tokenizer = tokenizer
        self.write = write or (lambda text: None)
        self.ids = []
        self.text = ""
        self.written = 0
        self.prompt_is_next = True

    def put(self, ids):
        if self.prompt_is_next:  # `generate` hands over the prompt first
            self.prompt_is_next = False
            return
        self.ids += ids.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        if not self.text.endswith("\ufffd"):  # the next token may complete this character
            self.write_new()

    def end(self):
        self.write_new()
        self.write("\n")

    def write_new(self):
        self.write(self.text[self.written :])
        self.written = len(self.text)
