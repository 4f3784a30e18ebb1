"""Processor class for MQT-LLaVA"""

# isort: off
from .configuration_mqt_llava import AUTO_MAP  # first, since it checks the version of transformers
# isort: on

# No `from __future__ import annotations` here: vLLM reads the annotations of `__call__` to find the keyword arguments that a
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

# The Vicuna v1 format as used by LLaVA 1.5: images come first in a turn, and there is no space between an answer's `</s>` and the
# next turn. The template writes the BOS itself, since vLLM's chat adds no special tokens. It refuses `<image>` in text parts:
# servers tokenize the rendered prompt without the processor's check that images and placeholders match.
CHAT_TEMPLATE = (
    "{% macro text_of(content) %}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% endmacro %}"
    "{% for message in messages if message['content'] is not string %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' and '<image>' in part['text'] %}"
    "{{ raise_exception('Text must not contain <image>, the placeholder of an image: send images as parts of type image') }}"
    "{% elif part['type'] == 'image' and message['role'] != 'user' %}"
    "{{ raise_exception('Only user turns may have images; got one from role ' + message['role']) }}"
    "{% elif part['type'] not in ('text', 'image') %}"
    "{{ raise_exception('The type of a part must be text or image; got ' + part['type']) }}"
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
    "{{ raise_exception('Roles must be system (first turn only), user or assistant; got ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)


class MQTLlavaProcessorKwargs(ProcessingKwargs, total=False):
    # As in transformers' own processors, which are not type-checked. 5.19 needs `_defaults`
    _defaults = {}  # type: ignore[misc]
    images_kwargs: MQTLlavaImageProcessorKwargs  # type: ignore[misc]


class MQTLlavaProcessor(ProcessorMixin):
    r"""
    Prepares images and text for MQT-LLaVA: combines an image processor and a tokenizer.

    Args:
        image_processor (`BaseImageProcessor`):
            A [`MQTLlavaImageProcessor`], or any other whose `pixel_values` fit the vision tower. transformers' LLaVA image
            processor, which older checkpoints have, is replaced with a [`MQTLlavaImageProcessor`].
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with `image_token` in its vocabulary.
        num_query_tokens (`int`, *optional*, defaults to 256):
            M, the model's number of queries.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to the Vicuna v1 format with images, as in LLaVA 1.5.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The placeholder of an image.

    Raises:
        `ValueError`: if the tokenizer doesn't know `image_token`.
    """

    valid_processor_kwargs = MQTLlavaProcessorKwargs  # type: ignore[assignment]

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
        # Set here, so that `save_pretrained`, which adds it, doesn't change the processor
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
                The images of all texts in the order of their `<image>` placeholders, or one list per text: PIL images, arrays,
                tensors, paths, URLs or base64.
            text (`str` or `list[str]`, *optional*):
                Prompts with one `<image>` per image. If all of them begin with the BOS token, as after `apply_chat_template`,
                `add_special_tokens` defaults to `False`.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m, the number of visual tokens of every image or of each, from 1 to M. Defaults to
                `image_processor.num_visual_tokens` if that is set, else to M.
            kwargs:
                As for any [`~transformers.ProcessorMixin`], such as `return_tensors`, `padding` and `draft`.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)` with m
            placeholders for each image, and `pixel_values` of shape `(num_images, 3, height, width)`. If two images are
            adjacent, or if there is no text, also `visual_token_counts` of shape `(num_images,)`, with m of each image.

        Raises:
            `ValueError`: if `num_visual_tokens` is anything but integers from 1 to M, if the numbers of images and of `<image>`
                differ, for unknown keyword arguments, and for arguments that lead to another image size than the vision tower's.
        """
        self._check_kwargs(kwargs)
        # Taken out before transformers checks types, whose errors are not a `ValueError`
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
            # Dropped if the placeholders already determine the counts: trainers such as TRL's know only certain tensor names
            rows = (torch.as_tensor(row) == self.image_token_id for row in inputs["input_ids"])
            if sum(len(placeholder_runs(row[None])) for row in rows) == num_images:
                inputs.pop("visual_token_counts")
        return inputs

    def _check_kwargs(self, kwargs):
        """Refuse arguments that transformers would drop with a warning: a misspelt `num_visual_tokens` must not be ignored."""
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self).__name__} takes images and text, but no `{name}`.")
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
                f"{type(self).__name__} got unknown keyword arguments: {', '.join(unknown)}. Those for images are "
                f"{', '.join(sorted(structured['images_kwargs'].__annotations__))}."
            )

    def _check_serving_kwargs(self, kwargs):
        """For vLLM, which asks for offsets. It caches images by the arguments of their request, so with a list as
        `num_visual_tokens`, the same images in another order would get wrong counts. And it slices tensors."""
        if kwargs.get("num_visual_tokens") is not None and not isinstance(kwargs["num_visual_tokens"], int):
            raise ValueError(
                "`num_visual_tokens` must be one integer for all images of a request; got "
                f"{kwargs['num_visual_tokens']!r}."
            )
        if kwargs.get("return_tensors") not in (None, "pt"):
            raise ValueError(f'`return_tensors` must be "pt" for serving; got {kwargs["return_tensors"]!r}.')

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Check that there are as many images as `<image>`: per text for nested lists of images, else in total."""
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
        # Resolved in `__call__` already, unless another tool calls this method
        counts = resolve_visual_token_counts(num_visual_tokens, len(images), self.num_query_tokens)
        processed = self.image_processor(images, **kwargs)
        processed["visual_token_counts"] = counts
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * image_inputs["visual_token_counts"][image_idx]

    def get_text_with_replacements(self, text, *args, **kwargs):
        return super().get_text_with_replacements([self.begin_chunks(sample) for sample in text], *args, **kwargs)

    def begin_chunks(self, text: str) -> str:
        """Make the text after an image tokenize like the beginning of a text, with a `▁` in Llama's tokenizer.

        The reference tokenizes the chunks of text between images separately. If the tokenizer doesn't add the `▁` itself
        (Llama's with `legacy=False`), a leading space has the same effect.
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
        """Remove an answer's leading space, so that its ids are the same as after its prompt.

        TRL tokenizes prompts and answers separately, and Llama's tokenizer adds a space to the beginning of every text.
        """
        eos = self.tokenizer.eos_token or ""
        is_answer = text.startswith(" ") and text.endswith(eos) and text[1:].removesuffix(eos).strip()
        return text[1:] if is_answer else text

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """The largest number of placeholders per image, M, by which vLLM sizes its buffers.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image in pixels.
        """
        if image_sizes is None:
            return MultiModalData()
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_query_tokens] * num_images, num_image_patches=[1] * num_images
        )


def _count_images(images):
    """The number of images in an image, a (nested) list of images, a batched array or `None`."""
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(map(_count_images, images))
    return images.shape[0] if getattr(images, "ndim", 3) == 4 else 1


def _without_none(images):
    """`images` without the `None` entries that rows without an image have in mixed data. `None` for `None`."""
    if not isinstance(images, (list, tuple)):
        return images
    rows = [_without_none(row) for row in images]
    if any(isinstance(row, (list, tuple)) for row in images):  # one entry for each text
        return [[] if row is None else row for row in rows]
    return [image for image in rows if image is not None]


MQTLlavaProcessor.register_for_auto_class()

__all__ = ["MQTLlavaProcessor"]
