"""Matryoshka sampling: the number m of visual tokens per image, drawn for each training step."""

import re
from numbers import Integral
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..modeling.budget_mqt_llava import resolve_visual_token_counts


logger = logging.get_logger(__name__)

DISTRIBUTIONS = ("even", "uniform", "log-uniform", "fixed")


class VisualTokenSampler(TrainerCallback):
    r"""
    Draws m, the number of visual tokens per image, for every training step.

    m depends only on the seed and the step, so it is the same on all ranks and after resuming. A collator doesn't know the step:
    it counts its batches, starting from the epoch and step that this object, as one of the `callbacks` of a `Trainer`, provides.
    This is exact with gradient accumulation (one m for all batches of a step), with workers, persistent or not, and after
    resuming in mid-epoch. m is logged as `num_visual_tokens`.

    In a plain loop, each batch is one step. Call [`VisualTokenSampler.set_step`] to resume and, with workers, before each epoch.

    Args:
        distribution (`str`, `int` or `list[int]`, *optional*, defaults to `"even"`):
            - `"even"`: 2, 4, ..., M with equal probability (the paper's, arXiv 2405.19315, section 3);
            - `"uniform"`: 1, 2, ..., M with equal probability;
            - `"log-uniform"`: 1 to M with probabilities proportional to log(1 + 1 / m), so that each doubling of m has about the
              same probability;
            - `"fixed"`: always M; or an integer: always that number;
            - a list: its entries with equal probability. Entries may repeat.
        num_query_tokens (`int`, *optional*, defaults to 256):
            M, the model's number of queries.
        seed (`int`, *optional*, defaults to 0):
            Seed that determines m of every step.

    Raises:
        `ValueError`: for an unknown distribution, an empty list, and numbers that are not integers from 1 to M.

    Example:

    ```python
    >>> from mqt_llava.training.sampling import VisualTokenSampler

    >>> sampler = VisualTokenSampler("even", num_query_tokens=64)
    >>> [sampler.sample(step) for step in range(5)]
    [56, 34, 64, 34, 30]

    ```"""

    def __init__(self, distribution="even", num_query_tokens=256, seed=0):
        self.seed = seed
        self.weights = None
        if isinstance(distribution, str):
            if distribution not in DISTRIBUTIONS:
                raise ValueError(
                    f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}, an integer or a list of integers; got "
                    f"{distribution!r}."
                )
            numbers: Any = np.arange(1, num_query_tokens + 1)
            if distribution == "log-uniform":
                self.weights = np.log1p(1 / numbers) / np.log1p(num_query_tokens)
            elif distribution == "even":
                numbers = numbers[1::2] if num_query_tokens > 1 else numbers
            elif distribution == "fixed":
                numbers = numbers[-1:]
        else:
            numbers = [distribution] if isinstance(distribution, (Integral, float)) else list(distribution)
            if not numbers:
                raise ValueError("`distribution` must not be an empty list.")
            resolve_visual_token_counts(numbers, len(numbers), num_query_tokens)
        self.num_visual_tokens = [int(number) for number in numbers]
        # The epoch's serial number, its first step and the batches per step, in shared memory for the workers that collate
        self.shared = torch.tensor([0, 0, 1]).share_memory_()
        self.epoch = self.count = 0  # of the collating process

    @property
    def max_num_visual_tokens(self) -> int:
        """The largest m that can be drawn."""
        return max(self.num_visual_tokens)

    def sample(self, step: int) -> int:
        """m of a training step, by its index from 0."""
        return int(np.random.default_rng([self.seed, step]).choice(self.num_visual_tokens, p=self.weights))

    def sample_below(self, step: int, m: int) -> int:
        """A second, smaller m for a step, drawn from the smaller numbers of the distribution, or from 1 to m - 1 if there are none."""
        smaller = [number for number in self.num_visual_tokens if number < m] or range(1, m)
        return int(np.random.default_rng([self.seed, step, 1]).choice(smaller))

    def set_step(self, step: int, gradient_accumulation_steps: int = 1):
        """Let the next batch be the first one of a step.

        Args:
            step (`int`): index of the step from 0.
            gradient_accumulation_steps (`int`, *optional*, defaults to 1): number of batches per step, which share one m.
        """
        epoch = int(self.shared[0]) + 1
        self.shared.copy_(torch.tensor([epoch, step, gradient_accumulation_steps]))

    def next(self) -> int:
        """m of the next batch in this process. The collator calls it once per batch."""
        epoch, first_step, batches_per_step = self.shared.tolist()
        if epoch != self.epoch:
            self.epoch, self.count = epoch, 0
        batch, worker = self.count, get_worker_info()
        if worker is not None:  # workers take turns
            batch = worker.id + self.count * _num_active_workers(worker)
        self.count += 1
        return self.sample(first_step + batch // batches_per_step)

    # ------------------------------------------------------------------------------------ events of a `Trainer`

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.is_first_epoch = True
        if args.auto_find_batch_size and len(set(self.num_visual_tokens)) > 1:
            raise ValueError(
                "`auto_find_batch_size` restarts with smaller batches and the current weights when memory runs out, which may "
                "be long after the first step if m is drawn at every step. Set `per_device_train_batch_size` to a size that "
                f"fits in memory at m = {self.max_num_visual_tokens}."
            )
        if args.dataloader_num_workers and not args.dataloader_in_order:
            raise ValueError(
                "`dataloader_in_order=False` is not supported: batches would be used in steps for which another m was drawn."
            )
        if isinstance(train_dataloader, DataLoaderDispatcher):
            raise ValueError(
                "With a streamed dataset accelerate splits batches by rows, which separates images from their "
                'prompts: pass `accelerator_config={"dispatch_batches": False}` to `TrainingArguments`.'
            )

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        step = state.global_step
        if self.is_first_epoch and not args.ignore_data_skip and _is_stream(train_dataloader.dataset):
            # A resumed stream is collated from the beginning of its epoch, and batches of earlier steps are dropped
            batches_per_step = args.gradient_accumulation_steps
            has_end = has_length(train_dataloader)
            step -= step % (-(-len(train_dataloader) // batches_per_step) if has_end else state.max_steps)
        self.is_first_epoch = False
        self.set_step(step, args.gradient_accumulation_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        _, first_step, batches_per_step = self.shared.tolist()
        expected = (state.global_step - first_step + 1) * batches_per_step + 1  # accelerate fetches one batch ahead
        if self.epoch == int(self.shared[0]) and self.count > expected:
            logger.warning_once(
                "Evaluation took its numbers of visual tokens from the sampler, and changed m of the next training step. "
                "Give evaluation samples their own, see `mqt_llava.training.data.with_num_visual_tokens`."
            )
            self.count = expected

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and "num_visual_tokens" not in logs:
            logs["num_visual_tokens"] = self.sample(state.global_step - 1)
            state.log_history[-1]["num_visual_tokens"] = logs["num_visual_tokens"]


def parse_distribution(text: str) -> str | list[int]:
    """A distribution from a command line: `"1,4,16"` as numbers, other words unchanged."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else text


def evaluation_num_visual_tokens(text: str | None, num_query_tokens: int) -> list[int]:
    """Numbers of visual tokens to evaluate at: `"1,4,16"` as a list. Defaults to 1, a quarter of M, and M.

    Raises:
        `ValueError`: as for [`VisualTokenSampler`], but about `eval_num_visual_tokens`.
    """
    distribution = parse_distribution(text) if text else sorted({1, max(num_query_tokens // 4, 1), num_query_tokens})
    try:
        return VisualTokenSampler(distribution, num_query_tokens).num_visual_tokens
    except ValueError as error:
        raise ValueError(
            re.sub("`(distribution|num_visual_tokens)`", "`eval_num_visual_tokens`", str(error))
        ) from None


def _is_stream(dataset) -> bool:
    return isinstance(dataset, IterableDataset)


def _num_active_workers(worker) -> int:
    """The number of workers that have data: a stream from `datasets` has at most one worker per shard."""
    if not _is_stream(worker.dataset):
        return worker.num_workers
    dataset = getattr(worker.dataset, "dataset", worker.dataset)  # accelerate wraps it
    return min(worker.num_workers, getattr(dataset, "num_shards", worker.num_workers))
