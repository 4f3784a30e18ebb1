"""Pretrain the vision tower of `mqt-llava-tiny` from scratch: name what every patch of synthetic pictures shows.

LLaVA starts from CLIP, which was pretrained on captioned pictures from the web. Here nothing is downloaded, so the
tower learns from scenes. Every patch tells which object or figure covers it, how many of that kind there are, of which one it
holds the centre (so that two cats side by side are two), where it is in the picture and in the padded square, what colour the
background has and how many things there are. A visual token is a weighted sum of patches, and can hold what each of them tells;
how often it finds the same, a small language model is slow to learn.

    python -m recipes.tiny.pretrain_vision --data_path runs/data --output_dir runs/vision
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.trainer_utils import get_last_checkpoint

from . import make_data, scenes
from .optimizer import muon_and_adamw


EVALUATION_SEED = 10_000_000  # seeds from here on are never trained on
NAMES = scenes.KINDS + scenes.FIGURES
LABELS = ("patches", "centres", "numbers", "places", "colour", "total")


def patch_places(scene, grid):
    """In which of the picture's 3 x 3 cells each patch of the padded square lies, `(grid * grid,)`; 9 is padding."""
    inside = (np.arange(grid) + 0.5) / grid - 0.5
    x, y = inside / scene.width + 0.5, inside / scene.height + 0.5
    cells = 3 * np.floor(3 * y)[:, None] + np.floor(3 * x)[None]
    is_padding = (abs(y - 0.5) > 0.5)[:, None] | (abs(x - 0.5) > 0.5)[None]
    return np.where(is_padding, 9, cells).astype(np.int64).reshape(-1)


def scene_labels(scene, patches):
    """How many there are of the kind that covers each patch (0 where none does), where each patch is, the index of the colour, and
    how many things there are."""
    numbers = np.array([0] + [scene.count(name) if name in scenes.KINDS else 0 for name in NAMES])[patches]
    return numbers, patch_places(scene, make_data.GRID), scenes.COLOURS.index(scene.colour), len(scene.things)


class PatchDataset(Dataset):
    """The pictures that [`make_data`] wrote, as `(pixels, *labels)`. Rows are kept in memory once read, 50 kB each."""

    def __init__(self, folder):
        self.images, self.patches = Path(folder) / "images", np.load(Path(folder) / "patches.npy")
        self.rows = {}

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, seed):
        if seed not in self.rows:
            with Image.open(self.images / f"{seed:07d}.png") as picture:
                pixels = np.asarray(picture)
            patches, centres = self.patches[seed].reshape(2, -1).astype(np.int64)
            self.rows[seed] = pixels, patches, centres, *scene_labels(scenes.make_scene(seed), patches)
        return self.rows[seed]


class EvaluationDataset(Dataset):
    """The same of scenes never trained on."""

    def __init__(self, length, image_size, grid):
        self.rows = []
        for seed in range(EVALUATION_SEED, EVALUATION_SEED + length):
            scene = scenes.make_scene(seed)
            picture, *labels = make_data.paint(scene, image_size, grid=grid)
            pixels = np.asarray(make_data.prepare(picture, image_size))
            patches, centres = (label.reshape(-1) for label in labels)
            self.rows.append((pixels, patches, centres, *scene_labels(scene, patches)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(samples):
    """Stack samples. Pixels stay integers, a quarter of the memory, and are normalised by the model."""
    pictures, *labels = (torch.from_numpy(np.stack(column)) for column in zip(*samples))
    return {"pixel_values": pictures, **dict(zip(LABELS, labels))}


class PatchNamer(nn.Module):
    """A vision tower with linear readouts of every patch feature."""

    def __init__(self, vision_tower):
        super().__init__()
        self.vision_tower = vision_tower
        width = vision_tower.config.hidden_size
        grid = make_data.GRID
        numbers = 1 + scenes.MAX_THINGS
        self.of_patches = [
            1 + len(NAMES),
            1 + len(NAMES),
            numbers,
            1 + len(scenes.PLACES),
            2 * grid,
            len(scenes.COLOURS),
            numbers,
        ]
        self.patch_readout = nn.Linear(width, sum(self.of_patches))
        # For each patch that shows something eight do not, and for each centre twenty
        for name, background in (("cover_weight", 0.2), ("centre_weight", 0.1)):
            self.register_buffer(name, torch.tensor([background] + [1.0] * len(NAMES)), persistent=False)
        row, column = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        # Four of five kinds are there once
        self.register_buffer("number_weight", torch.tensor([0.1, 0.3] + [1.0] * (numbers - 2)), persistent=False)
        self.register_buffer("lines", torch.stack([row, column], dim=1).flatten(), persistent=False)
        for name, values in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def features(self, pixel_values):
        pixels = (pixel_values.permute(0, 3, 1, 2).float() - self.mean) / self.std
        features = self.vision_tower(pixels).last_hidden_state[:, 1:]
        return F.layer_norm(features, features.shape[-1:])

    def forward(self, pixel_values, patches, centres, numbers, places, colour, total):
        features = self.features(pixel_values)
        covers, middles, counts, cells, lines, colours, totals = (
            self.patch_readout(features).float().flatten(0, 1).split(self.of_patches, -1)
        )
        loss = (
            F.cross_entropy(covers, patches.flatten(), self.cover_weight)
            + 0.5 * F.cross_entropy(middles, centres.flatten(), self.centre_weight)
            + 0.5 * F.cross_entropy(counts, numbers.flatten(), self.number_weight)
            + 0.5 * F.cross_entropy(cells, places.flatten())
            + 0.2 * F.cross_entropy(lines.unflatten(-1, (2, -1)).flatten(0, 1), self.lines.repeat(len(places)))
            + 0.2 * F.cross_entropy(colours, colour.repeat_interleave(patches.shape[1]))
            + 0.5 * F.cross_entropy(totals, total.repeat_interleave(patches.shape[1]))
        )
        return {
            "loss": loss,
            "covers": covers.argmax(-1).view_as(patches),
            "middles": middles.argmax(-1).view_as(centres),
            "counts": counts.argmax(-1).view_as(numbers),
            "cells": cells.argmax(-1).view_as(places),
            "totals": totals.argmax(-1).view_as(patches),
        }


def compute_metrics(prediction):
    covers, middles, counts, cells, totals = prediction.predictions
    labels = dict(zip(LABELS, prediction.label_ids))
    shown, held = labels["patches"] > 0, labels["centres"] > 0
    return {
        "object_patches": (covers == labels["patches"])[shown].mean(),
        "background_patches": (covers == labels["patches"])[~shown].mean(),
        "centres": (middles == labels["centres"])[held].mean(),
        "all_centres": ((middles == labels["centres"]) | ~held).all(-1).mean(),
        "several": (counts == labels["numbers"])[labels["numbers"] > 1].mean(),
        "totals": (totals == labels["total"][:, None]).mean(),
        "places": (cells == labels["places"]).mean(),
    }


@dataclass
class VisionArguments:
    """The tower. Defaults made that of `mqt-llava-tiny`."""

    data_path: str
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    image_size: int = make_data.IMAGE_SIZE
    patch_size: int = make_data.IMAGE_SIZE // make_data.GRID
    vision_tower: str | None = field(default=None, metadata={"help": "To go on with, instead of one from scratch."})


def main():
    arguments, training = HfArgumentParser((VisionArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    os.makedirs(training.output_dir, exist_ok=True)
    attention = "eager"  # on CPUs in bfloat16, the backward pass of sdpa is slower
    if arguments.vision_tower:
        tower = CLIPVisionModel.from_pretrained(arguments.vision_tower, attn_implementation=attention)
    else:
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=arguments.hidden_size,
                intermediate_size=4 * arguments.hidden_size,
                num_hidden_layers=arguments.num_hidden_layers,
                num_attention_heads=arguments.num_attention_heads,
                image_size=arguments.image_size,
                patch_size=arguments.patch_size,
                hidden_act="gelu",
                attn_implementation=attention,
            )
        )
    training.label_names = list(LABELS)
    trainer = Trainer(
        PatchNamer(tower),
        training,
        data_collator=collate,
        train_dataset=PatchDataset(arguments.data_path),
        eval_dataset=EvaluationDataset(1000, tower.config.image_size, make_data.GRID),
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=muon_and_adamw(training),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.log_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        trainer.model.vision_tower.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
