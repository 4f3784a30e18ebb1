"""Answer questions about images with several numbers of visual tokens. Each image is encoded once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..modeling.adaptive_mqt_llava import VisualTokenSchedule
from .questions import Question


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
        seconds (`float`): the question's share of the time that its batch took, without encoding images.
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
    answers are yielded batch by batch.

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
    order = sorted(range(len(prompts)), key=lambda i: (len(questions[i].images), len(prompts[i])))

    def answer(rows: list[int]) -> list[Answer]:
        asked = [(row, questions[row], prompts[row]) for row in rows]
        try:
            return _answer_batch(model, processor, asked, num_visual_tokens, max_new_tokens, window)
        except ValueError as error:  # due to one question: a damaged image, a prompt that is too long
            if len(rows) == 1:
                sizes = [m if isinstance(m, int) else m.num_visual_tokens[-1] for m in num_visual_tokens]
                return [Answer(rows[0], m, error=str(error)) for m in sizes]
            return [one for row in rows for one in answer([row])]

    for start in range(0, len(order), batch_size):
        yield from answer(order[start : start + batch_size])


@torch.no_grad()
def _answer_batch(model, processor, asked, num_visual_tokens, max_new_tokens, window) -> list[Answer]:
    """All answers to a batch of `(index, question, prompt)`."""
    schedules = [VisualTokenSchedule([m], [], window) if isinstance(m, int) else m for m in num_visual_tokens]
    max_num_visual_tokens = max(schedule.num_visual_tokens[-1] for schedule in schedules)
    images = [image for _, question, _ in asked for image in question.open_images()]
    inputs = processor(
        images=images or None,
        text=[prompt for *_, prompt in asked],
        num_visual_tokens=max_num_visual_tokens,
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the chat template writes the BOS
        return_tensors="pt",
    ).to(model.device)
    length, limit = inputs["input_ids"].shape[1], getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise ValueError(f"The prompt has {length} tokens, but the model supports at most {limit}.")
    if images:
        features = model.get_image_features(inputs.pop("pixel_values"), max_num_visual_tokens, return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": features}
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
        seconds = (time.perf_counter() - start) / len(asked)
        texts = processor.batch_decode(sequences, skip_special_tokens=True)
        after_end = torch.isin(sequences, ends).cumsum(-1) - torch.isin(sequences, ends).long()
        num_new_tokens = (after_end == 0).sum(-1).tolist()
        sizes = [schedule.num_visual_tokens[stage] for stage in outputs.stages.tolist()]
        figures = zip(asked, sizes, texts, confidence, num_text_tokens, num_new_tokens)
        for (row, *_), m, text, product, num_asked, num_said in figures:
            answers.append(Answer(row, m, text.strip(), product, num_asked, num_said, seconds))
    return answers
