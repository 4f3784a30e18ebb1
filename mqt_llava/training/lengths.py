"""Lengths of samples, so that a `Trainer` can group samples of similar length."""

from collections.abc import Callable

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(Sampler):
    """
    A [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order depends only on seed and epoch, with its batches
    shuffled. The original draws from torch's global generator, so that a run resumed in mid-epoch would continue with other
    samples, and sorts batches from the longest to the shortest, so that the model sees one kind of question after another.

    Args:
        sampler (`LengthGroupedSampler`): groups the samples. Its first batch, with the longest sample, stays first, so that a run
            that needs too much memory fails at once.
        batch_size (`int`): samples per batch, of all processes together.
        seed (`int`): the same on all ranks.
        epoch (`Callable[[], int]`): returns the index of the epoch that begins.
    """

    def __init__(self, sampler: LengthGroupedSampler, batch_size: int, seed: int, epoch: Callable[[], int]):
        self.sampler, self.batch_size, self.seed, self.epoch = sampler, batch_size, seed, epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        generator = self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        first, *others = torch.tensor(list(self.sampler)).split(self.batch_size)
        last = [others.pop()] if others else []  # may be smaller
        shuffled = [others[i] for i in torch.randperm(len(others), generator=generator)]
        return iter(torch.cat([first, *shuffled, *last]).tolist())


def with_lengths(dataset, processor, num_visual_tokens: int):
    """
    Add a column `length` for `TrainingArguments(train_sampling_strategy="group_by_length")`: the number of tokens of all
    turns, and m for each image. Tokens of the chat template are not counted, since they are about the same for all rows. Images
    are not opened, and `datasets` caches the result.

    Args:
        dataset (`datasets.Dataset`): rows from [`load_conversations`].
        processor (`MQTLlavaProcessor`): a processor with a fast tokenizer.
        num_visual_tokens (`int`): m, or the largest m that is drawn.
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

    counter = Tokenizer.from_str(tokenizer)
    counter.no_padding()
    counter.no_truncation()
    texts = ["".join(turn["content"] for turn in turns) for turns in rows["messages"]]
    encodings = counter.encode_batch_fast(texts, add_special_tokens=False)
    # `<image>` is already one token
    more = (len(images) * (num_visual_tokens - 1) for images in rows["images"])
    return {"length": [len(encoding) + extra for encoding, extra in zip(encodings, more)]}
