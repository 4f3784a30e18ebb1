"""A `Trainer` for MQT-LLaVA, which logs m and names the samples of a loss that is not finite."""

import copy
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler

from .collator import MQTLlavaDataCollator
from .lengths import SeededLengthGroupedSampler
from .sampling import VisualTokenSampler


class MQTLlavaTrainer(Trainer):
    """
    A [`~transformers.Trainer`] for batches from a [`MQTLlavaDataCollator`]. It

    - adds the collator's sampler to its callbacks, and logs `num_visual_tokens`;
    - adds a blank image to batches without images, so that all processes use all parts of the model;
    - evaluates samples without their own m at the largest m that is drawn, and does not advance the sampler;
    - groups samples by length in an order that is the same after resuming;
    - stops at a loss that is not finite, with a `FloatingPointError` that names the samples;
    - turns the key-value cache on again after training. `Trainer` turns it off in the model's config.

    Args:
        model (`MQTLlavaForConditionalGeneration` or `PeftModel`): the model.
        args (`TrainingArguments`): `remove_unused_columns` is set to `False`.
        data_collator (`MQTLlavaDataCollator`): makes the batches, and may hold a [`VisualTokenSampler`].
        kwargs: as for [`~transformers.Trainer`].

    Raises:
        `ValueError`: for several GPUs in one process, and for `use_liger_kernel`.
    """

    model: Any  # `Trainer` allows for `None` here, and for collators without an m
    data_collator: Any

    def __init__(self, model, args, data_collator: MQTLlavaDataCollator, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"One process cannot train on {args.n_gpu} GPUs: batches would be split by rows, which separates images from "
                "their prompts. Start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if args.use_liger_kernel:
            raise ValueError("`use_liger_kernel` is not supported: Liger has no kernels for MQT-LLaVA.")
        args.remove_unused_columns = False  # the collator needs all columns
        # FSDP wraps these classes, and refuses names of classes that the model doesn't have, such as CLIP's text layers
        layers = {type(module).__name__ for module in model.modules()}
        model._no_split_modules = [name for name in model._no_split_modules or () if name in layers]
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        # `Trainer` sets this only at the top level, and the language model would fill a cache that nothing reads
        model.config.text_config.use_cache = args.use_cache
        if self.label_smoother is not None:
            self.label_smoother = ShiftingLabelSmoother(self.label_smoother.epsilon)
        self.sampler = data_collator.num_visual_tokens
        if not isinstance(self.sampler, VisualTokenSampler):
            self.sampler = None
        elif self.sampler not in self.callback_handler.callbacks:
            self.add_callback(self.sampler)

    def get_train_dataloader(self):
        return self._with_collator(super().get_train_dataloader, return_sample_ids=True, always_image=True)

    def get_eval_dataloader(self, eval_dataset=None):
        fixed = None if self.sampler is not None else self.data_collator.num_visual_tokens
        get_dataloader = super().get_eval_dataloader
        return self._with_collator(lambda: get_dataloader(eval_dataset), num_visual_tokens=fixed, always_image=True)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler.lengths = sampler.lengths[:]  # as a list: a column of `datasets` is slow row by row
        batch_size = sampler.batch_size * self.args.world_size
        return SeededLengthGroupedSampler(sampler, batch_size, seed, lambda: int(self.state.epoch or 0))

    def _with_collator(self, get_dataloader, **settings):
        """Make a data loader with a copy of the collator that has other settings."""
        own, self.data_collator = self.data_collator, copy.copy(self.data_collator)
        try:
            vars(self.data_collator).update(settings)
            return get_dataloader()
        finally:
            self.data_collator = own

    def training_step(self, model, inputs, *args, **kwargs):
        sample_ids = inputs.pop("sample_ids", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step}, for the samples {', '.join(sample_ids)}. "
                "Check these samples, lower the learning rate, or train in bfloat16 or float32 instead of float16."
            )
        return loss

    def _save(self, output_dir=None, state_dict=None):
        if isinstance(self.model, FSDPModule):
            # torch has replaced the class; the code to save is that of the original one
            type(self.model).__module__ = type(self.model).__bases__[-1].__module__
        super()._save(output_dir, state_dict)

    def save_adapter(self, output_dir=None, repo_id=None):
        """Save the trained adapter with [`~mqt_llava.training.adapters.save_adapter`]. All processes must call this.

        Args:
            output_dir (`str` or `Path`, *optional*): the folder. Defaults to `args.output_dir`.
            repo_id (`str`, *optional*): a repository on the Hub to upload the adapter to.

        Raises:
            `ValueError`: if `repo_id` is given and the base model is a local folder.
        """
        from .adapters import save_adapter  # training without an adapter does not need peft

        state_dict = None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all processes gather the shards
            state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_world_process_zero():
            save_adapter(self.model, output_dir or self.args.output_dir, repo_id, state_dict)
        self.accelerator.wait_for_everyone()

    def log(self, logs, *args, **kwargs):
        if self.sampler is not None and "loss" in logs:
            logs["num_visual_tokens"] = self.sampler.sample(self.state.global_step - 1)
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except ValueError as error:
            if not str(error).startswith("Caught ValueError in DataLoader worker"):
                raise
            # A worker's error is the text of a traceback
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error
        finally:
            enable_cache(self.model)
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.close()  # so that an error message starts on a new line


class ShiftingLabelSmoother(LabelSmoother):
    """Label smoothing for causal models, which `Trainer` recognizes by their class names. FSDP changes those."""

    def __call__(self, model_output, labels, shift_labels=True, num_items_in_batch=None):
        return super().__call__(model_output, labels, True, num_items_in_batch)


def enable_cache(model):
    """Turn the key-value cache on again. `Trainer` turns it off in the model's config, which would slow down `generate`."""
    model.config.use_cache = model.config.text_config.use_cache = model.generation_config.use_cache = True
