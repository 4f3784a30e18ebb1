"""Lengths of samples, so that a `Trainer` can make batches of samples that are about as long."""

from collections.abc import Callable

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(Sampler):
    """
    A [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order depends on seed and epoch alone, with its batches
    shuffled. By itself it draws from torch's global generator, so a run that is resumed in mid-epoch would go on with
    other samples; and its batches come from the longest to the shortest, so the model sees one kind of question after the other.

    Args:
        sampler (`LengthGroupedSampler`): groups the samples. The first batch, with the longest sample, stays the first, so that a
            run that needs too much memory fails at once.
        batch_size (`int`): of all processes together.
        seed (`int`): the same on all ranks.
        epoch (`Callable[[], int]`): asked for the number of the epoch whenever one begins.
    """

    def __init__(self, sampler: LengthGroupedSampler, batch_size: int, seed: int, epoch: Callable[[], int]):
        self.sampler, self.batch_size, self.seed, self.epoch = sampler, batch_size, seed, epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        generator = self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        first, *others = torch.tensor(list(self.sampler)).split(self.batch_size)
        last = [others.pop()] if others else []  # may be a smaller one
        shuffled = [others[i] for i in torch.randperm(len(others), generator=generator)]
        return iter(torch.cat([first, *shuffled, *last]).tolist())


def with_lengths(dataset, processor, num_visual_tokens: int):
    """
    The same rows with a column `length`, for `TrainingArguments(train_sampling_strategy="group_by_length")`: the tokens of
    all turns, and m for each image. What the chat template adds, about the same for all, is left out. Images are not
    opened, and `datasets` keeps the result for the next run.

    Args:
        dataset (`datasets.Dataset`): rows from [`load_conversations`].
        processor (`MQTLlavaProcessor`): whose tokenizer counts.
        num_visual_tokens (`int`): m. With one that is drawn, the largest.
    """
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()  # a string has the same fingerprint in every process
    return dataset.map(
        _count_tokens,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "num_visual_tokens": num_visual_tokens},
        desc="Counting tokens",
    )


def _count_tokens(rows, tokenizer: str, num_visual_tokens: int):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = ["".join(turn["content"] for turn in turns) for turns in rows["messages"]]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    # `<image>` is a token already
    more = (len(images) * (num_visual_tokens - 1) for images in rows["images"])
    return {"length": [len(encoding) + extra for encoding, extra in zip(encodings, more)]}
