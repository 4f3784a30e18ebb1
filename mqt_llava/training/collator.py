"""A data collator that turns conversations about images into batches with labels, drawing m for each batch."""

import re
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..modeling.budget_mqt_llava import resolve_visual_token_counts
from .data import SampleError, canonical_sample, open_image
from .sampling import VisualTokenSampler


logger = logging.get_logger(__name__)


class MQTLlavaDataCollator:
    r"""
    Data collator for MQT-LLaVA, for a `Trainer`, TRL's `SFTTrainer` or a plain loop. Answers and their end-of-sequence
    tokens are the labels; system text, questions, visual tokens and padding are masked with -100.

    Samples are rows from [`load_conversations`], or have one of the formats that it reads. A sample may have its own m as
    `num_visual_tokens`; all others in a batch share one m. A `Trainer` needs `remove_unused_columns=False`.

    Args:
        processor (`MQTLlavaProcessor`):
            A processor with a fast tokenizer.
        num_visual_tokens (`int` or `VisualTokenSampler`, *optional*):
            m, or a sampler that draws it for each batch. Defaults to the processor's M. A sampler must also be passed to the
            trainer as one of its `callbacks`.
        max_length (`int`, *optional*):
            Maximum length of a sample in tokens, including visual ones. Lengths are counted at the largest m that the
            sampler draws, so that a sample is accepted at all steps or at none.
        truncate (`bool`, *optional*, defaults to `False`):
            Shorten longer samples: drop their last turns, with their images; if the first turn alone is too long, cut the
            end of its answer. A sample that would be left without labels counts as broken.
        on_error (`"raise"` or `"skip"`, *optional*, defaults to `"raise"`):
            What to do with broken samples: those with a missing or damaged image, with images and `<image>` that don't match,
            without an answer, or too long. `"skip"` warns, counts them in `num_skipped` and makes the batch smaller. A batch
            without any valid sample repeats the last one that was valid.
        return_sample_ids (`bool`, *optional*, defaults to `False`):
            Add `sample_ids`, a list of strings, to the batch. The model doesn't accept it, so the trainer must remove it.
        always_image (`bool`, *optional*, defaults to `False`):
            Add a blank image to a batch without images, as one visual token after the end of its first row: with several
            processes, each must use all parts of the model in every step. [`MQTLlavaTrainer`] sets it.

    Raises:
        `ValueError`: if `num_visual_tokens` is not from 1 to M, and for other invalid arguments.
    """

    def __init__(
        self,
        processor,
        num_visual_tokens=None,
        max_length=None,
        truncate=False,
        on_error="raise",
        return_sample_ids=False,
        always_image=False,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip"; got {on_error!r}.')
        if not re.search(r"{%-?\s*generation\b", processor.chat_template):
            raise ValueError(
                "The processor's chat template does not mark answers with `{% generation %}` and `{% endgeneration %}`, so "
                "there would be no labels."
            )
        m = num_visual_tokens
        if isinstance(num_visual_tokens, VisualTokenSampler):
            m = num_visual_tokens.max_num_visual_tokens
        (self.max_num_visual_tokens,) = resolve_visual_token_counts(m, 1, processor.num_query_tokens)
        self.processor = processor
        self.num_visual_tokens = num_visual_tokens
        self.max_length = max_length
        self.truncate = truncate
        self.on_error = on_error
        self.return_sample_ids = return_sample_ids
        self.always_image = always_image
        self.num_skipped = 0  # by this process
        self.last_good = None

    def __call__(self, samples) -> dict:
        """
        Args:
            samples (`list[dict]`): rows from [`load_conversations`], or in one of the formats that it reads.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`, padded on the right. With
            images, also `pixel_values` of shape `(num_images, 3, height, width)` and `visual_token_counts` of shape
            `(num_images,)`.

        Raises:
            `ValueError`: for a broken sample, unless `on_error="skip"`.
        """
        m = self.max_num_visual_tokens
        if isinstance(self.num_visual_tokens, VisualTokenSampler):
            if any(sample.get("num_visual_tokens") is None for sample in samples):
                m = self.num_visual_tokens.next()
        rows = []
        for index, sample in enumerate(samples):
            name = f"{index} of a batch" if sample.get("id") is None else str(sample["id"])
            try:
                rows.append(self.prepare(sample, name, m))
            except SampleError as error:
                problem = f"Sample {name} cannot be trained on: {error}."
                if self.on_error == "raise":
                    raise ValueError(problem) from None
                self.num_skipped += 1
                logger.warning("%s Skipped, number %d of this process.", problem, self.num_skipped)
        if not rows:
            if self.last_good is None:
                raise ValueError(
                    f"All {len(samples)} samples of a batch are broken, and there is no earlier one to repeat: see the warnings."
                )
            rows = [{**self.last_good, "num_visual_tokens": m}]
        self.last_good = rows[-1]
        return self.collate(rows)

    def prepare(self, sample, name, num_visual_tokens) -> dict:
        """Ids and labels of a sample, with one placeholder for each image, and its opened images."""
        if sample.get("error"):
            raise SampleError(sample["error"])
        own = sample.get("num_visual_tokens")
        canonical = canonical_sample(sample)
        input_ids, labels = self.tokenize(canonical["messages"])
        max_num_visual_tokens = self.max_num_visual_tokens
        if own is not None:
            (num_visual_tokens,) = resolve_visual_token_counts(own, 1, self.processor.num_query_tokens)
            max_num_visual_tokens = num_visual_tokens
        length = self.fit(input_ids, labels, max_num_visual_tokens)
        input_ids, labels = input_ids[:length], labels[:length]
        images = canonical["images"][: input_ids.count(self.processor.image_token_id)]
        return {
            "id": name,
            "input_ids": input_ids,
            "labels": labels,
            "images": [open_image(image) for image in images],
            "num_visual_tokens": num_visual_tokens,
        }

    def tokenize(self, messages) -> tuple[list[int], list[int]]:
        """Ids with one placeholder for each image, and labels: the answers, and -100 elsewhere."""
        tokenizer, begin = self.processor.tokenizer, self.processor.begin_chunks
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        (text,), (answers,) = rendered
        encoding = tokenizer(begin(text), add_special_tokens=False)  # the template writes the BOS
        input_ids = encoding["input_ids"]
        labels = [-100] * len(input_ids)
        trained = [message.get("train", True) for message in messages if message["role"] == "assistant"]
        if len(trained) != len(answers):
            if not all(trained):
                raise SampleError("the chat template does not mark each answer, so none can be excluded")
            trained = [True] * len(answers)
        for start, end in (span for span, train in zip(answers, trained) if train):
            # start and end of the answer in the tokenized text
            start, end = len(begin(text[:start])), len(begin(text[:end]))
            first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
            labels[first : last + 1] = input_ids[first : last + 1]
        return input_ids, labels

    def fit(self, input_ids, labels, num_visual_tokens) -> int:
        """The number of ids to keep: all, or those within `max_length` with `truncate`."""
        widths = [num_visual_tokens if i == self.processor.image_token_id else 1 for i in input_ids]
        if self.max_length is None or sum(widths) <= self.max_length:
            return len(input_ids)
        room = sum(length <= self.max_length for length in accumulate(widths))
        if self.truncate:
            is_answer = [label != -100 for label in labels]
            goes_on = [*is_answer[1:], False]
            ends = [i + 1 for i in range(room) if is_answer[i] and not goes_on[i]]
            if ends:
                return ends[-1]
            if any(is_answer[:room]):
                return room
        num_images = input_ids.count(self.processor.image_token_id)
        raise SampleError(
            f"it has {sum(widths)} tokens, including {num_images} x {num_visual_tokens} visual tokens, and `max_length` is "
            f"{self.max_length}: raise `max_length`, lower `num_visual_tokens` or shorten the "
            + ("question, which leaves no room for an answer" if self.truncate else "sample, as `truncate=True` does")
        )

    def collate(self, rows) -> dict:
        """Collate prepared samples: expand each placeholder to m, pad the rows and process the images."""
        image_token_id = self.processor.image_token_id
        if self.always_image and not any(row["images"] for row in rows):
            longer = {"input_ids": [*rows[0]["input_ids"], image_token_id], "labels": [*rows[0]["labels"], -100]}
            rows = [rows[0] | longer | {"images": [Image.new("RGB", (8, 8))], "num_visual_tokens": 1}, *rows[1:]]
        input_ids, labels = [], []
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            repeats = torch.where(ids == image_token_id, row["num_visual_tokens"], 1)
            input_ids.append(ids.repeat_interleave(repeats))
            labels.append(torch.tensor(row["labels"]).repeat_interleave(repeats))
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(input_ids, True, self.processor.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True, 0),
            "labels": pad_sequence(labels, True, -100),
        }
        images = [image for row in rows for image in row["images"]]
        if images:
            counts = [row["num_visual_tokens"] for row in rows for _ in row["images"]]
            batch |= self.processor(images=images, num_visual_tokens=counts, return_tensors="pt")
        if self.return_sample_ids:
            batch["sample_ids"] = [row["id"] for row in rows]
        return batch
