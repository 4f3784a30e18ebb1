"""Muon for the matrices of hidden layers, AdamW for all else: fewer steps than AdamW alone at this size."""

import re

import torch


HIDDEN = re.compile(r"layers\.\d+\..*weight|query_transformer\.\w+_proj\.weight")
MUON_LR_FACTOR = 2


class MuonAndAdamW(torch.optim.Optimizer):
    """
    [`torch.optim.Muon`](https://kellerjordan.github.io/posts/muon/) takes matrices alone, and `Trainer` one optimizer.

    Args:
        model (`nn.Module`): its parameters that require gradients.
        lr (`float`): of AdamW. Muon's is twice that, by updates whose size is that of AdamW's (arXiv 2502.16982).
        weight_decay (`float`): of matrices.
    """

    def __init__(self, model, lr, weight_decay=0.0):
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decay = weight_decay if parameter.ndim > 1 else 0
                is_hidden = parameter.ndim == 2 and bool(HIDDEN.search(name))
                groups.setdefault((is_hidden, decay), []).append(parameter)
        muon, adamw = (
            [
                {"params": parameters, "lr": lr * (MUON_LR_FACTOR if for_muon else 1), "weight_decay": decay}
                for (is_hidden, decay), parameters in groups.items()
                if is_hidden == for_muon
            ]
            for for_muon in (True, False)
        )
        super().__init__([parameter for parameters in groups.values() for parameter in parameters], {})
        self.optimizers = (
            torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adamw, betas=(0.9, 0.98), fused=True),
        )
        self._share_groups()

    def _share_groups(self):
        """A learning rate scheduler writes to these."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict):
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"]):
            optimizer.load_state_dict(state)
        self._share_groups()


def muon_and_adamw(training):
    """For `Trainer(optimizer_cls_and_kwargs=...)`, which calls a factory with the model."""
    return lambda: MuonAndAdamW, {"lr": training.learning_rate, "weight_decay": training.weight_decay}
