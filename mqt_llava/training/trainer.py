"""A `Trainer` for MQT-LLaVA: it logs m, and names the samples of a loss that is not finite."""

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
    A [`~transformers.Trainer`] for batches of a [`MQTLlavaDataCollator`]. It

    - adds the collator's sampler to its callbacks, and logs `num_visual_tokens`;
    - adds a blank image to batches without images, so that several processes can train together, whatever their batches;
    - evaluates samples without their own m at the largest m that is drawn, and does not advance the sampler;
    - groups samples by length in an order that continues after a resume;
    - stops at a loss that is not finite with a `FloatingPointError` that names the samples;
    - turns the key-value cache on again after training. `Trainer` turns it off in the model's config.
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
            raise ValueError("`use_liger_kernel` would do nothing: Liger has no kernels for MQT-LLaVA.")
        args.remove_unused_columns = False  # the collator makes the model's inputs
        # FSDP shards these layers one by one, and refuses names of missing layers, such as CLIP's text layers
        layers = {type(module).__name__ for module in model.modules()}
        model._no_split_modules = [name for name in model._no_split_modules or () if name in layers]
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        # `Trainer` sets this only for the whole model, and the language model would keep keys and values in vain
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
        """Make a data loader while the collator has other settings."""
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
                "Look at these, lower the learning rate, or train in bfloat16 or float32 instead of float16."
            )
        return loss

    def _save(self, output_dir=None, state_dict=None):
        if isinstance(self.model, FSDPModule):
            # torch has replaced its class; the code to save is that of the original class
            type(self.model).__module__ = type(self.model).__bases__[-1].__module__
        super()._save(output_dir, state_dict)

    def save_adapter(self, output_dir=None, repo_id=None):
        """Save the trained adapter, by default in `args.output_dir`, and upload it if a repository is given: see
        [`~mqt_llava.training.adapters.save_adapter`]. All processes must call this."""
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
            # The error of a worker is the text of a traceback
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from error
        finally:
            enable_cache(self.model)
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.close()  # so that an error begins a new line


class ShiftingLabelSmoother(LabelSmoother):
    """Label smoothing for causal models. `Trainer` recognizes those by the names of their classes, which FSDP changes."""

    def __call__(self, model_output, labels, shift_labels=True, num_items_in_batch=None):
        return super().__call__(model_output, labels, True, num_items_in_batch)


def enable_cache(model):
    """Turn the key-value cache on again: `Trainer` turns it off in the model's config, which would slow `generate` down."""
    model.config.use_cache = model.config.text_config.use_cache = model.generation_config.use_cache = True
