"""A stage of `mqt-llava train`, by Muon: the same arguments. With `--train_vision_tower` the tower trains as well.

python -m recipes.tiny.tune --stage 2 --model runs/stage1 --data_path runs/data/conversations.json --output_dir runs/stage2
"""

import sys

from transformers import TrainerCallback

from mqt_llava.training.arguments import parse_arguments
from mqt_llava.training.train import train

from .optimizer import muon_and_adamw


class UnfreezeVisionTower(TrainerCallback):
    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.model.vision_tower.requires_grad_(True)


def main():
    words = [word for word in sys.argv[1:] if word != "--train_vision_tower"]
    callbacks = [UnfreezeVisionTower()] if len(words) < len(sys.argv) - 1 else []
    arguments, training = parse_arguments(words)
    optimizer = muon_and_adamw(training, vision_tower_lr_factor=0.2)
    train(arguments, training, callbacks, optimizer_cls_and_kwargs=optimizer)


if __name__ == "__main__":
    main()
