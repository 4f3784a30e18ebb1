"""Processor class for MQT-LLaVA"""

# isort: off
from .configuration_mqt_llava import AUTO_MAP  # before all others: it says so where transformers is too old
# isort: on

# No `from __future__ import annotations` here: vLLM reads the annotation of `__call__` to learn which keyword arguments a
# request may set.
from typing import Any, cast

import torch
from transformers import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput

from .budget_mqt_llava import placeholder_runs, resolve_visual_token_counts
from .image_processing_mqt_llava import MQTLlavaImageProcessor, MQTLlavaImageProcessorKwargs


SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)

# Vicuna v1, as LLaVA 1.5 prompts it: images first in a turn, no space between an answer's `</s>` and the next turn. It
# writes the BOS itself, since vLLM's chat adds no special tokens. Where content comes in parts, an `<image>` in a text would
# stand for no image: servers tokenize what the template writes and never ask the processor whether the numbers fit.
CHAT_TEMPLATE = (
    "{% macro text_of(content) %}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% endmacro %}"
    "{% for message in messages if message['content'] is not string %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' and '<image>' in part['text'] %}"
    "{{ raise_exception('A text must not contain <image>, which stands for an image: send images as parts') }}"
    "{% elif part['type'] == 'image' and message['role'] != 'user' %}"
    "{{ raise_exception('Images belong to turns of the user; got one of the ' + message['role']) }}"
    "{% elif part['type'] not in ('text', 'image') %}"
    "{{ raise_exception('Parts of a turn are of type text or image; got ' + part['type']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endfor %}"
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = text_of(messages[0]['content']) %}"
    "{% set messages = messages[1:] %}"
    "{% else %}"
    "{% set system = '" + SYSTEM_PROMPT.replace("'", "\\'") + "' %}"
    "{% endif %}"
    "{{ system + ' ' if system else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "USER: "
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list if message['content'] is not string %}"
    "{{ '<image>\n' * images | length + text_of(message['content']) | trim if images else text_of(message['content']) }}"
    " ASSISTANT:"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + text_of(message['content']) + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ raise_exception('Roles are system (first), user and assistant; got ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)


class MQTLlavaProcessorKwargs(ProcessingKwargs, total=False):
    # As all of transformers' own processors have it, which are not checked. 5.19 cannot do without `_defaults`
    _defaults = {}  # type: ignore[misc]
    images_kwargs: MQTLlavaImageProcessorKwargs  # type: ignore[misc]


class MQTLlavaProcessor(ProcessorMixin):
    r"""
    Turns images and text into inputs for MQT-LLaVA: an image processor and a tokenizer in one.

    Args:
        image_processor (`BaseImageProcessor`):
            A [`MQTLlavaImageProcessor`], or any whose `pixel_values` fit the vision tower. That of transformers' LLaVA, which
            older checkpoints name, becomes ours.
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer that has `image_token` as a token of its own.
        num_query_tokens (`int`, *optional*, defaults to 256):
            M, the number of queries of the model.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to that of Vicuna v1 with images, as in LLaVA 1.5.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The placeholder of an image.
    """

    valid_processor_kwargs = MQTLlavaProcessorKwargs  # type: ignore[assignment]  # as above

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_query_tokens=256,
        chat_template=None,
        image_token="<image>",
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know the image token {self.image_token!r}. Add it first: "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{self.image_token!r}]}})`."
            )
        if type(image_processor).__name__ in ("LlavaImageProcessor", "LlavaImageProcessorPil"):
            settings = image_processor.to_dict()
            known = MQTLlavaImageProcessor.valid_kwargs.__annotations__
            image_processor = MQTLlavaImageProcessor(**{name: settings[name] for name in settings if name in known})
        # `save_pretrained` would add it: a processor is the same before and after
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        alone, after_image, after_space = (
            tokenizer.tokenize(sample, add_special_tokens=False)
            for sample in ("a", self.image_token + "a", self.image_token + " a")
        )
        self._chunks_need_space = alone != after_image[1:] and alone == after_space[1:]
        spaced, later = (tokenizer.tokenize(sample, add_special_tokens=False) for sample in (" a", "a a"))
        self._begins_with_space = later == alone * 2 and spaced != alone

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        **kwargs: Unpack[MQTLlavaProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images (`ImageInput`, *optional*):
                The images of all texts in the order of their `<image>`, or one list for each text. Any PIL mode.
            text (`str` or `list[str]`, *optional*):
                Prompts with one `<image>` for each image. Where all of them begin with the BOS, as those of the chat template
                do, no other is added, unless `add_special_tokens` says so.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m, the number of visual tokens of every image or of each, from 1 to M. Defaults to
                `image_processor.num_visual_tokens`, where that is set, or M.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)` with m
            placeholders for each image, and `pixel_values` of shape `(num_images, 3, height, width)`. Where placeholders
            of two images are adjacent, or no text says where they stand, `visual_token_counts` of shape `(num_images,)`
            tells m for each image.

        Raises:
            `ValueError`: for anything but integers from 1 to M, images and `<image>` that differ in number,
            unknown keyword arguments, and arguments that give images a shape which the vision tower cannot take.
        """
        self._check_kwargs(kwargs)
        # Resolved here, before any work, and not where transformers checks types, whose errors are no `ValueError`
        nested = kwargs.get("images_kwargs") or {}
        if "num_visual_tokens" in nested:
            kwargs["images_kwargs"] = {name: nested[name] for name in nested if name != "num_visual_tokens"}
            kwargs.setdefault("num_visual_tokens", nested["num_visual_tokens"])
        texts: Any = [text] if isinstance(text, str) else text
        bos = self.tokenizer.bos_token
        if bos and texts and all(isinstance(sample, str) and sample.startswith(bos) for sample in texts):
            if "add_special_tokens" not in (kwargs.get("text_kwargs") or {}):
                kwargs.setdefault("add_special_tokens", False)
        images = _without_none(images)
        num_images = _count_images(images)
        if self._begins_with_space and text is not None and not num_images:
            if kwargs.get("add_special_tokens", (kwargs.get("text_kwargs") or {}).get("add_special_tokens")) is False:
                text = [self.go_on(sample) if isinstance(sample, str) else sample for sample in texts]
        is_served = kwargs.get("return_text_replacement_offsets")
        if is_served:
            self._check_serving_kwargs(kwargs)
        if kwargs.get("num_visual_tokens") is None:
            kwargs["num_visual_tokens"] = getattr(self.image_processor, "num_visual_tokens", None)
        kwargs["num_visual_tokens"] = resolve_visual_token_counts(
            kwargs["num_visual_tokens"], num_images, self.num_query_tokens
        )
        inputs = super().__call__(images=images if num_images else None, text=text, **kwargs)
        if num_images and text is not None and not is_served:
            # Not to be handed on where the placeholders say the same: trainers such as TRL's know the names of tensors
            rows = (torch.as_tensor(row) == self.image_token_id for row in inputs["input_ids"])
            if sum(len(placeholder_runs(row[None])) for row in rows) == num_images:
                inputs.pop("visual_token_counts")
        return inputs

    def _check_kwargs(self, kwargs):
        """Refuse what transformers would drop with a warning: a misspelt `num_visual_tokens` must not become the default."""
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self).__name__} takes images and text, no `{name}`.")
        structured = self.valid_processor_kwargs.__annotations__
        known = {"common_kwargs", "videos", "audio", "text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs"}
        for name, kwargs_class in structured.items():
            known |= {name, *getattr(kwargs_class, "__annotations__", {})}
        for part in (self.image_processor, self.tokenizer):
            known |= set(getattr(getattr(part, "valid_kwargs", None), "__annotations__", {}))
        known |= {"sanitize_control_tokens", "return_mm_token_type_ids", "return_text_replacement_offsets"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} got unknown keyword arguments: {', '.join(unknown)}. For images it takes "
                f"{', '.join(sorted(structured['images_kwargs'].__annotations__))}."
            )

    def _check_serving_kwargs(self, kwargs):
        """vLLM, which asks for offsets, caches each image under the arguments of its request: with a list as `num_visual_tokens`
        the same images in another order would get those of the first. And it slices tensors."""
        if kwargs.get("num_visual_tokens") is not None and not isinstance(kwargs["num_visual_tokens"], int):
            raise ValueError(
                "`num_visual_tokens` must be one integer for all images of a request; got "
                f"{kwargs['num_visual_tokens']!r}."
            )
        if kwargs.get("return_tensors") not in (None, "pt"):
            raise ValueError(f'`return_tensors` must be "pt" for serving; got {kwargs["return_tensors"]!r}.')

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As many images as `<image>`: in every text if there is one list of images for each, else in all together."""
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is None:
            return
        wanted = [sample.count(self.image_token) for sample in text]
        if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
            given: Any = [len(row) if isinstance(row, (list, tuple)) else 1 for row in images]
            fit = given == wanted or (len(given) != len(wanted) and sum(given) == sum(wanted))
        else:
            given = 0 if images is None else len(cast(list, make_flat_list_of_images(images)))
            fit = given == sum(wanted)
        if not fit:
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of images: the "
                f"texts have {wanted}, and there are {given} images."
            )

    def _process_images(self, images, num_visual_tokens=None, **kwargs):
        images = make_flat_list_of_images(images)
        # Resolved by `__call__`; tools that come here on another way may leave the default
        counts = resolve_visual_token_counts(num_visual_tokens, len(images), self.num_query_tokens)
        processed = self.image_processor(images, **kwargs)
        processed["visual_token_counts"] = counts
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * image_inputs["visual_token_counts"][image_idx]

    def get_text_with_replacements(self, text, *args, **kwargs):
        return super().get_text_with_replacements([self.begin_chunks(sample) for sample in text], *args, **kwargs)

    def begin_chunks(self, text: str) -> str:
        """Let the text after every image begin as a text does, with `▁` in Llama's tokenizer.

        The reference tokenizes the text around images in chunks of their own. Where the tokenizer does not begin a
        chunk so by itself (Llama's with `legacy=False`), a space in front comes to the same.
        """
        if not self._chunks_need_space:
            return text
        bos = self.tokenizer.bos_token
        start = bos if bos and text.startswith(bos) else ""
        first, *others = text[len(start) :].split(self.image_token)
        if start and first:
            first = " " + first
        return start + self.image_token.join([first, *(" " + chunk if chunk else "" for chunk in others)])

    def go_on(self, text: str) -> str:
        """An answer as the chat template writes it, so that its ids are those that it has behind its prompt.

        TRL tokenizes prompts and answers apart, and Llama's tokenizer begins every text with a space of its own.
        """
        eos = self.tokenizer.eos_token or ""
        is_answer = text.startswith(" ") and text.endswith(eos) and text[1:].removesuffix(eos).strip()
        return text[1:] if is_answer else text

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """M placeholders for each image, whatever it will have: vLLM sizes its buffers by this.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image.
        """
        if image_sizes is None:
            return MultiModalData()
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_query_tokens] * num_images, num_image_patches=[1] * num_images
        )


def _count_images(images):
    """How many images there are in one image, a list or nested lists of them, or a batched array; None has none."""
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(map(_count_images, images))
    return images.shape[0] if getattr(images, "ndim", 3) == 4 else 1


def _without_none(images):
    """Images without the `None` that stands for no image in rows of mixed data; `None` where that leaves nothing."""
    if not isinstance(images, (list, tuple)):
        return images
    rows = [_without_none(row) for row in images]
    if any(isinstance(row, (list, tuple)) for row in images):  # one entry for each text
        return [[] if row is None else row for row in rows]
    return [image for image in rows if image is not None]


MQTLlavaProcessor.register_for_auto_class()

__all__ = ["MQTLlavaProcessor"]
