"""Answer questions about images with several numbers of visual tokens. Each image is encoded once."""

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling.adaptive_mqt_llava import VisualTokenSchedule
from .questions import Question, name_image


NUM_BATCHES = 4  # among which questions are sorted by length; the visual tokens of their images are kept meanwhile


@dataclass
class Answer:
    """
    A model's answer to a question with m visual tokens per image.

    Args:
        index (`int`): index of the question.
        num_visual_tokens (`int`): m; with a schedule, that of the stage whose answer was accepted.
        text (`str`): the answer.
        confidence (`float`): the confidence in the answer, from 0 to 1; see [`VisualTokenSchedule`].
        num_text_tokens (`int`): number of text tokens of the prompt.
        num_new_tokens (`int`): number of tokens of the answer.
        seconds (`float`): the question's share of the time that its batch took with this m, and the time of encoding its images, though
            they were encoded once for all questions.
        error (`str`, *optional*): why there is no answer.
    """

    index: int
    num_visual_tokens: int
    text: str = ""
    confidence: float = 0.0
    num_text_tokens: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


class VisualTokenCache:
    """
    The visual tokens of a few images, so that each is encoded once for successive questions.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model.
        num_visual_tokens (`int`): m of all images.

    Attributes:
        seconds (`dict`): the time that encoding each image took, by its name.
    """

    def __init__(self, model, num_visual_tokens: int):
        self.model, self.num_visual_tokens = model, num_visual_tokens
        self.visual_tokens: dict[Hashable, torch.Tensor] = {}
        self.seconds: dict[Hashable, float] = {}

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, names: Sequence[Hashable]) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): the images. Those that were encoded before are not
                encoded again.
            names (`list`): what identifies each.

        Returns:
            [`BaseModelOutputWithPooling`]: the images for `mm_encoder_outputs`.
        """
        new = {name: i for i, name in enumerate(names) if name not in self.visual_tokens}
        if new:
            begin = time.perf_counter()
            outputs = self.model.get_image_features(
                pixel_values[list(new.values())], self.num_visual_tokens, return_dict=True
            )
            if pixel_values.device.type != "cpu":
                torch.accelerator.synchronize()  # else what follows would wait for the images
            self.visual_tokens.update(zip(new, outputs.pooler_output))
            self.seconds.update(dict.fromkeys(new, (time.perf_counter() - begin) / len(new)))
        visual_tokens: Any = [self.visual_tokens[name] for name in names]
        return BaseModelOutputWithPooling(pooler_output=visual_tokens)

    def keep(self, names):
        """Forget all images but these."""
        for name in self.visual_tokens.keys() - set(names):
            del self.visual_tokens[name], self.seconds[name]


def answer_questions(
    model,
    processor,
    questions: list[Question],
    num_visual_tokens: Sequence[int | VisualTokenSchedule],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    window: int = 32,
) -> Iterator[Answer]:
    """
    Answer every question with every number of visual tokens, by greedy decoding. Prompts of similar length share a batch, and
    answers are yielded batch by batch. Questions about the same image follow each other, and the image is encoded once for all of
    them, with the largest m.

    Args:
        model (`MQTLlavaForConditionalGeneration`): the model.
        processor (`MQTLlavaProcessor`): its processor.
        questions (`list[Question]`): from [`read_questions`].
        num_visual_tokens (`list[int]`): values of m, in any order. A [`VisualTokenSchedule`] among them is used as by `"auto"`.
        max_new_tokens (`int`, *optional*, defaults to 64): the maximum length of an answer.
        batch_size (`int`, *optional*, defaults to 16): number of questions per batch.
        window (`int`, *optional*, defaults to 32): see [`VisualTokenSchedule`].

    Yields:
        [`Answer`]: one for each question and each entry of `num_visual_tokens`. For a question that cannot be answered, such as one
        with a damaged image, it has an `error`.
    """
    prompts = [processor.apply_chat_template(question.messages, add_generation_prompt=True) for question in questions]
    names = [[name_image(image) for image in question.images] for question in questions]
    first_row: dict[Hashable, int] = {}
    for row, of_question in enumerate(names):
        for name in of_question:
            first_row.setdefault(name, row)
    by_image = sorted(range(len(questions)), key=lambda row: [first_row[name] for name in names[row]])
    sizes = [m if isinstance(m, int) else m.num_visual_tokens[-1] for m in num_visual_tokens]
    encoded = VisualTokenCache(model, max(sizes))

    def answer(rows: list[int]) -> list[Answer]:
        asked = [(row, questions[row], prompts[row], names[row]) for row in rows]
        try:
            return _answer_batch(model, processor, asked, encoded, num_visual_tokens, max_new_tokens, window)
        except ValueError as error:  # due to one question: a damaged image, a prompt that is too long
            if len(rows) == 1:
                return [Answer(rows[0], m, error=str(error)) for m in sizes]
            return [one for row in rows for one in answer([row])]

    for start in range(0, len(by_image), NUM_BATCHES * batch_size):
        rows = by_image[start : start + NUM_BATCHES * batch_size]
        encoded.keep(name for row in rows for name in names[row])
        rows.sort(key=lambda row: (len(names[row]), len(prompts[row])))
        for first in range(0, len(rows), batch_size):
            yield from answer(rows[first : first + batch_size])


@torch.no_grad()
def _answer_batch(model, processor, asked, encoded, num_visual_tokens, max_new_tokens, window) -> list[Answer]:
    """All answers to a batch of `(index, question, prompt, names of the images)`."""
    schedules = [VisualTokenSchedule([m], [], window) if isinstance(m, int) else m for m in num_visual_tokens]
    begin = time.perf_counter()
    images = [image for _, question, *_ in asked for image in question.open_images()]
    names = [name for *_, of_question in asked for name in of_question]
    inputs = processor(
        images=images or None,
        text=[prompt for _, _, prompt, _ in asked],
        num_visual_tokens=encoded.num_visual_tokens,
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the chat template writes the BOS
        return_tensors="pt",
    ).to(model.device)
    length, limit = inputs["input_ids"].shape[1], getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise ValueError(f"The prompt has {length} tokens, but the model supports at most {limit}.")
    processing = time.perf_counter() - begin
    if images:
        inputs["mm_encoder_outputs"] = {"image": encoded.encode(inputs.pop("pixel_values"), names)}
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    num_text_tokens, answers = is_text.sum(-1).tolist(), []
    ends = torch.tensor(
        model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else []
    )
    for schedule in schedules:  # a single m is a schedule of one stage, which gives the confidence
        start = time.perf_counter()
        outputs = model.generate(
            **inputs,
            num_visual_tokens=schedule,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
        sequences, confidence = outputs.sequences[:, length:].cpu(), outputs.confidences.tolist()
        seconds = (processing + time.perf_counter() - start) / len(asked)
        texts = processor.batch_decode(sequences, skip_special_tokens=True)
        after_end = torch.isin(sequences, ends).cumsum(-1) - torch.isin(sequences, ends).long()
        num_new_tokens = (after_end == 0).sum(-1).tolist()
        sizes = [schedule.num_visual_tokens[stage] for stage in outputs.stages.tolist()]
        figures = zip(asked, sizes, texts, confidence, num_text_tokens, num_new_tokens)
        for (row, _, _, shown), m, text, product, num_asked, num_said in figures:
            encoding = sum(encoded.seconds[name] for name in shown)
            answers.append(Answer(row, m, text.strip(), product, num_asked, num_said, seconds + encoding))
    return answers
