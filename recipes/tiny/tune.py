"""A stage of `mqt-llava train`, by Muon: the same arguments.

python -m recipes.tiny.tune --stage 2 --model runs/start --data_path runs/data/conversations.json --output_dir runs/stage2
"""

from mqt_llava.training.arguments import parse_arguments
from mqt_llava.training.train import train

from .optimizer import muon_and_adamw


def main():
    arguments, training = parse_arguments()
    train(arguments, training, optimizer_cls_and_kwargs=muon_and_adamw(training))


if __name__ == "__main__":
    main()
