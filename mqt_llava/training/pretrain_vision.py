"""Pretrain the vision tower of `mqt-llava-tiny` from scratch: name what covers every patch of synthetic pictures.

LLaVA starts from CLIP, which was pretrained on captioned pictures from the web. Here nothing is downloaded, so the
tower learns from scenes: every patch says which object or digit covers it and the colour of the background.

    python -m mqt_llava.training.pretrain_vision --output_dir runs/vision
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.trainer_utils import get_last_checkpoint

from . import scenes


EVALUATION_SEED = 10_000_000  # seeds from here on are never trained on


class PatchDataset(Dataset):
    """Scenes of seeds `start` to `start + length`, with the label of every patch and of the background.

    Pictures are drawn when first asked for and kept (28 kB each at 96 pixels), so that later epochs cost nothing.
    """

    def __init__(self, length, image_size, grid, start=0):
        self.length, self.image_size, self.grid, self.start = length, image_size, grid, start
        self.drawn = {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index not in self.drawn:
            scene = scenes.make_scene(self.start + index)
            picture, patches = scenes.draw(scene, self.image_size, self.grid)
            self.drawn[index] = np.asarray(picture), patches.reshape(-1), scenes.COLOURS.index(scene.colour)
        return self.drawn[index]


def collate(samples):
    """Stack samples; pixels are normalised as CLIP's image processor does."""
    pictures, patches, colours = (np.stack(column) for column in zip(*samples))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return {
        "pixel_values": (pixels - mean) / std,
        "patch_labels": torch.from_numpy(patches),
        "colour_labels": torch.from_numpy(colours),
    }


class PatchNamer(nn.Module):
    """A vision tower with two linear readouts of every patch feature. Background patches count less in the loss,
    since there are eight of them for each one that shows something."""

    def __init__(self, config):
        super().__init__()
        self.vision_tower = CLIPVisionModel(config)
        names = 1 + len(scenes.KINDS) + len(scenes.DIGITS)
        self.readout = nn.Linear(config.hidden_size, names + len(scenes.COLOURS))
        self.register_buffer("weight", torch.tensor([0.2] + [1.0] * (names - 1)), persistent=False)

    def forward(self, pixel_values, patch_labels, colour_labels):
        features = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        logits = self.readout(nn.functional.layer_norm(features, features.shape[-1:])).float()
        names, colours = logits.split([len(self.weight), len(scenes.COLOURS)], dim=-1)
        loss = nn.functional.cross_entropy(names.flatten(0, 1), patch_labels.flatten(), self.weight)
        patches = names.shape[1]
        loss = loss + 0.3 * nn.functional.cross_entropy(
            colours.flatten(0, 1), colour_labels.repeat_interleave(patches)
        )
        return {"loss": loss, "names": names.argmax(-1), "colours": colours.argmax(-1)}


def compute_metrics(prediction):
    names, colours = prediction.predictions
    patches, backgrounds = prediction.label_ids
    shown = patches > 0
    return {
        "object_patches": (names == patches)[shown].mean(),
        "background_patches": (names == patches)[~shown].mean(),
        "colours": (colours == backgrounds[:, None]).mean(),
    }


@dataclass
class VisionArguments:
    """The tower and how long it learns. Defaults made the tower of `mqt-llava-tiny`."""

    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    image_size: int = 96
    patch_size: int = 12
    num_pictures: int = field(default=120_000, metadata={"help": "Different pictures in an epoch."})


def main():
    arguments, training = HfArgumentParser((VisionArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    config = CLIPVisionConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_act="gelu",
        attn_implementation="eager",  # on CPUs in bfloat16, the backward pass of sdpa is slower than eager
    )
    grid = config.image_size // config.patch_size
    training.label_names = ["patch_labels", "colour_labels"]
    trainer = Trainer(
        PatchNamer(config),
        training,
        data_collator=collate,
        train_dataset=PatchDataset(arguments.num_pictures, config.image_size, grid),
        eval_dataset=PatchDataset(1000, config.image_size, grid, start=EVALUATION_SEED),
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.model.vision_tower.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
