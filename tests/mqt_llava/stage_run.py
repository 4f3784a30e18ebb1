"""A run of `mqt-llava train` that notes what a process did: in a test, or by itself under `accelerate launch`.

python stage_run.py NOTES_FOLDER ARGUMENTS...
python stage_run.py finetune ARGUMENTS...       (`mqt-llava finetune`, no notes)
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from mqt_llava.cli import main
from mqt_llava.training.arguments import parse_arguments
from mqt_llava.training.train import train


class Notes(TrainerCallback):
    """m and number of images of every batch, the gradients of the first step, and the losses."""

    def __init__(self):
        self.batches, self.gradients, self.losses = [], {}, []

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_pre_hook(self.note_batch, with_kwargs=True)

    def note_batch(self, module, args, kwargs):
        if kwargs.get("pixel_values") is not None:  # not the second pass of distillation, over the same images
            self.batches.append(kwargs["visual_token_counts"].tolist())

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    whole = getattr(parameter.grad, "full_tensor", lambda: parameter.grad)()  # FSDP has a part of each
                    self.gradients[name] = whole.clone()

    def on_train_end(self, args, state, control, **kwargs):
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]


def run(*arguments) -> Notes:
    notes = Notes()
    train(*parse_arguments([str(argument) for argument in arguments]), callbacks=[notes])
    return notes


def let_accelerate_shard_on_cpus():
    """It leaves FSDP out where there are CPUs only. To it they are accelerators of some kind now; to torch they are CPUs."""
    init = AcceleratorState.__init__

    def pretend(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = pretend


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_cpus()
    if sys.argv[1] == "finetune":
        main()
    notes = run(*sys.argv[2:])
    torch.save(vars(notes), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
