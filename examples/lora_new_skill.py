"""Teach mqt-llava-tiny ten kinds of objects that it has never seen, by LoRA, and look at every number of visual tokens.

Tunes adapters that differ in how m is drawn: anew at every step ("elastic"), or fixed at 1, 4, 16 or 64. The elastic one
takes more steps than each of the four others, and fewer than all of those that it replaces. Prints how many questions about
the new kinds are answered rightly, and how many about the old ones, before and after.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m examples.lora_new_skill --output_dir runs/new-skill

One process for each CPU core; plain `python` does as well. Called again, the script goes on with the next adapter. Needs
Debian's fonts-noto-color-emoji.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed

import mqt_llava
from mqt_llava.training.adapters import load_adapter
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.lora import make_lora_config
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer
from recipes.tiny import make_data, scenes
from recipes.tiny.evaluate import evaluation_set, is_right
from recipes.tiny.pretrain_vision import EVALUATION_SEED


NEW_OBJECTS = {
    "lion": "🦁", "koala": "🐨", "duck": "🦆", "dolphin": "🐬", "cherry": "🍒",
    "grape": "🍇", "truck": "🚚", "plane": "✈️", "bell": "🔔", "crown": "👑",
}  # fmt: skip
NEW_KINDS = tuple(NEW_OBJECTS)
NEW_SEED = 7_000_000  # scenes of the training data have others, and evaluation too
NUM_VISUAL_TOKENS = (1, 4, 16, 64)
DISTRIBUTIONS = {
    "elastic": [1, 1, 1, 2, 4, 4, 4, 8, 16, 16, 32, 64, 64, 64],
    **{f"m = {m}": m for m in NUM_VISUAL_TOKENS},
}
scenes.OBJECTS.update(NEW_OBJECTS)  # drawn like the others, but `make_scene` does not know them
scenes.PLURALS["cherry"] = "cherries"


def new_scene(seed):
    """A scene in which one object or more is of a new kind."""
    scene, rng = scenes.make_scene(seed), np.random.default_rng([seed, 5])
    while not scene.things:  # some have nothing on them
        seed += 100_000_000  # which no other scene has
        scene = scenes.make_scene(seed)
    things = list(scene.things)
    for i in rng.permutation(len(things))[: rng.integers(1, len(things) + 1)]:
        things[i] = dataclasses.replace(things[i], name=NEW_KINDS[rng.integers(len(NEW_KINDS))], is_line_drawing=False)
    return dataclasses.replace(scene, things=tuple(things))


def ask_about_new(scene, rng):
    """A `(type, question, answer)` whose question or answer has a new kind."""
    while True:
        kind = str(rng.choice(["exists", "count", "at", "at", "beside", "list", "list"]))
        question = scenes.ask(scene, kind, rng)
        if kind == "exists" and rng.random() < 0.5:
            absent = [name for name in NEW_KINDS if name not in [thing.name for thing in scene.things]]
            question = (f"Is there a {absent[rng.integers(len(absent))]}?", "No.")
        if question and any(name in " ".join(question).lower().replace("cherries", "cherry") for name in NEW_KINDS):
            return kind, *question


class NewSkill(torch.utils.data.Dataset):
    """Chats about pictures with new kinds, drawn when they are asked for; among them a share of chats about old ones."""

    def __init__(self, num_samples, rehearsal=0.5, questions=5):
        self.num_samples, self.rehearsal, self.questions = num_samples, rehearsal, questions

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        seed = NEW_SEED + index
        rng = np.random.default_rng([seed, 6])
        if rng.random() < self.rehearsal:
            scene = scenes.make_scene(seed)
            kinds = rng.choice(scenes.QUESTION_TYPES, self.questions, replace=False)
            turns = [turn for kind in kinds if (turn := scenes.ask(scene, str(kind), rng))]
            turns = turns or [scenes.ask(scene, "list", rng)]
        else:
            scene = new_scene(seed)
            turns = [ask_about_new(scene, rng)[1:] for _ in range(self.questions)]
            turns = list(dict.fromkeys(turns))
        messages = [
            {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)
        ]
        messages[0]["content"] = f"<image>\n{messages[0]['content']}"
        return {"id": f"seed {seed}", "messages": messages, "images": [make_data.paint(scene, make_data.IMAGE_SIZE)]}


def evaluation_of_new(num_pictures, first_seed=EVALUATION_SEED):
    """`[(pictures, type, question, answer), ...]`: two questions about each picture, seeds never trained on."""
    samples = []
    for seed in range(first_seed, first_seed + num_pictures):
        scene, rng = new_scene(seed), np.random.default_rng([seed, 8])
        pictures = [make_data.prepare(scenes.draw(scene), make_data.IMAGE_SIZE)]
        samples += [(pictures, *ask_about_new(scene, rng)) for _ in range(2)]
    return samples


def accuracy(model, processor, samples):
    """`{m: percentage}` of exact answers. Each process asks its share of the questions."""
    state = PartialState()
    share = samples[state.process_index :: state.num_processes]
    return {m: 100 * float(np.mean(gather_object(is_right(model, processor, share, m)))) for m in NUM_VISUAL_TOKENS}


def tune(model, processor, name, arguments, folder):
    """The adapter of this name, trained with m drawn as `DISTRIBUTIONS` says."""
    set_seed(0)
    # The tokenizer has only the old names as words. The pieces that spell new ones were never seen: they train too
    names = [f" {scenes.PLURALS.get(name, name + end)}" for name in NEW_KINDS for end in ("", "s")] + [" cherry"]
    pieces = sorted({i for ids in processor.tokenizer(names, add_special_tokens=False)["input_ids"] for i in ids})
    config = make_lora_config(
        model,
        ["language_model", "query_transformer"],
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0,
        trainable_token_indices=pieces,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    max_steps = arguments.elastic_steps if name == "elastic" else arguments.steps
    trainer = MQTLlavaTrainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            per_device_train_batch_size=arguments.batch_size // PartialState().num_processes,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
        ),
        data_collator=MQTLlavaDataCollator(
            processor, VisualTokenSampler(DISTRIBUTIONS[name], model.config.num_query_tokens)
        ),
        train_dataset=NewSkill(max_steps * arguments.batch_size, arguments.rehearsal),
    )
    trainer.train()
    trainer.save_adapter()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mqt_llava.TINY_CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument("--elastic_steps", type=int, default=1250)
    parser.add_argument("--steps", type=int, default=450, help="of each of the others")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--rehearsal", type=float, default=0.5, help="share of pictures and questions of the old kinds"
    )
    parser.add_argument(
        "--pictures", type=int, default=500, help="to evaluate the new skill on; half as many for the old"
    )
    arguments = parser.parse_args()

    state = PartialState(cpu=not torch.cuda.is_available())
    processor = AutoProcessor.from_pretrained(arguments.model)
    new, old = evaluation_of_new(arguments.pictures), evaluation_set(arguments.pictures // 2)
    results = {
        name: arguments.output_dir / name.replace(" ", "") / "result.json" for name in ["before", *arguments.adapters]
    }
    missing = [name for name, result in results.items() if not result.exists()]
    state.wait_for_everyone()  # so that all find the same ones missing
    for name in missing:
        folder = results[name].parent
        folder.mkdir(parents=True, exist_ok=True)
        # eager attention: on a CPU, and at this size, a backward pass of SDPA takes twice as long
        load = partial(AutoModelForImageTextToText.from_pretrained, arguments.model, dtype=torch.float32)
        base = load(attn_implementation="eager")
        row = {}
        if name != "before":
            start = time.perf_counter()
            tune(base, processor, name, arguments, folder)
            row["minutes"] = (time.perf_counter() - start) / 60
            row["MB"] = (folder / "adapter_model.safetensors").stat().st_size / 1e6
            base = load_adapter(load(), folder).merge_and_unload()
        row |= {"new": accuracy(base, processor, new), "old": accuracy(base, processor, old)}
        if state.is_main_process:
            results[name].write_text(json.dumps(row) + "\n")
    if not state.is_main_process:
        return

    rows = {name: json.loads(result.read_text()) for name, result in results.items()}
    columns = [f"{skill}, m = {m}" for skill in ("new", "old") for m in NUM_VISUAL_TOKENS]
    lines = ["| tuned at | " + " | ".join(columns) + " | MB | minutes |", "| --- |" + " ---: |" * (len(columns) + 2)]
    for name, row in rows.items():
        cells = [f"{row[skill][str(m)]:.1f}" for skill in ("new", "old") for m in NUM_VISUAL_TOKENS]
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("MB", "minutes")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    (arguments.output_dir / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
