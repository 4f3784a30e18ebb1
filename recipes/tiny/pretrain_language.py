"""Pretrain the language model and the query transformer of `mqt-llava-tiny` from scratch, on labels in place of pictures.

LLaVA starts from Vicuna, which can already answer questions about what it is told. Here nothing is downloaded, and the
vision tower of this stage is a table: a patch has the sum of the embeddings of what `patches.npy` says that it shows. That takes no time
and is never wrong, and the model answers from any m visual tokens before it has seen a picture. At the end the values of
the query transformer are fitted to read the same from the features of a pretrained tower.

    python -m recipes.tiny.pretrain_language --data_path runs/data --vision_tower runs/vision --output_dir runs/start
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaImageProcessor, MQTLlavaProcessor
from mqt_llava.modeling.processing_mqt_llava import CHAT_TEMPLATE, SYSTEM_PROMPT
from mqt_llava.training import MQTLlavaDataCollator, VisualTokenSampler
from mqt_llava.training.data import canonical_sample
from mqt_llava.training.sampling import parse_distribution

from . import scenes
from .drills import NO_TOTAL, drill, tell_scene
from .gazes import NUM_COARSE, look_from_coarse_to_fine
from .optimizer import muon_and_adamw
from .pretrain_vision import LABELS, NAMES, PatchDataset, PatchNamer, collate, scene_labels


@dataclass
class LanguageArguments:
    """The language model and the query transformer. Defaults made those of `mqt-llava-tiny`."""

    data_path: str
    vision_tower: str
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    vocab_size: int = 1024
    num_query_tokens: int = 64
    query_transformer_num_attention_heads: int = 8
    drills: int = 24_000  # samples before those about pictures
    elastic_from: int = 56_000  # the sample from which m may be small
    num_visual_tokens: str = "1,1,1,2,2,2,3,4,4,6,8,8,12,16,16,24,32,32,48,64,64,64"
    fit_pictures: int = 3000  # from whose features the values are fitted


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer with Llama's special tokens and `<image>`. Places are one token each: with "top" and "left" for
    two, what is there took a small language model about twice as many steps."""
    tokenizer = Tokenizer(models.BPE())
    # Numbers figure by figure
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(f" {place}", normalized=False) for place in scenes.PLACES if " " in place])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",  # for `generate`; training pads by itself
    )


def make_processor(tokenizer, image_size, num_query_tokens):
    """LLaVA 1.5's preprocessing at a small size, and its chat template without a system prompt of its own."""
    side = {"height": image_size, "width": image_size}
    image_processor = MQTLlavaImageProcessor(size=side, crop_size=side)
    template = CHAT_TEMPLATE.replace(SYSTEM_PROMPT.replace("'", "\\'"), "")
    return MQTLlavaProcessor(image_processor, tokenizer, num_query_tokens=num_query_tokens, chat_template=template)


@torch.no_grad()
def look_for_the_same(language_model):
    """Start half of the heads with keys that are queries, so that they look at tokens like their own (mimetic initialization,
    arXiv 2305.09828)."""
    for layer in language_model.layers:
        attention = layer.self_attn
        half = attention.k_proj.out_features // 2
        attention.k_proj.weight[:half] = attention.q_proj.weight[:half]


def make_model(arguments, processor):
    """An MQT-LLaVA of a pretrained vision tower, a fresh language model and a fresh query transformer."""
    vision_tower, tokenizer = CLIPVisionModel.from_pretrained(arguments.vision_tower), processor.tokenizer
    special_tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=arguments.hidden_size**-0.5,
        **special_tokens,
    )
    config = MQTLlavaConfig(
        vision_config=vision_tower.config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        num_query_tokens=arguments.num_query_tokens,
        query_transformer_num_attention_heads=arguments.query_transformer_num_attention_heads,
        vision_feature_layer=-1,
    )
    # On CPUs in bfloat16, the backward pass of sdpa is slower than eager
    model = MQTLlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    weights = vision_tower.state_dict()
    used = model.model.vision_tower.state_dict().keys()  # not the last norm, which is behind the features
    model.model.vision_tower.load_state_dict({name: weights[name] for name in used})
    look_from_coarse_to_fine(model.model.query_transformer)
    look_for_the_same(model.model.language_model)
    for name, value in special_tokens.items():
        setattr(model.generation_config, name, value)
    return model


class LabelTower(nn.Module):
    """For each patch the sum of what its labels say, in place of the values of what a vision tower sees. Nothing says nothing: of
    a picture that is empty but for one thing, even the mean over all patches tells of that thing."""

    def __init__(self, width):
        super().__init__()
        numbers, places = 1 + scenes.MAX_THINGS, len(scenes.PLACES)
        sizes = (1 + len(NAMES), 1 + len(NAMES), numbers, 1 + places, len(scenes.COLOURS), 1 + numbers)
        nothing = (0, 0, 0, places, None, NO_TOTAL)
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, width, padding_idx=index) for size, index in zip(sizes, nothing)
        )

    @torch.no_grad()
    def speak(self, model, tokenizer):
        """Begin with visual tokens that are like the words for what they show."""
        words = model.get_input_embeddings().weight @ model.model.query_transformer.text_proj.weight  # a rotation
        names = (NAMES, NAMES, scenes.NUMBER_WORDS[1:], scenes.PLACES, scenes.COLOURS)
        for embedding, first, texts, factor in zip(self.embeddings, (1, 1, 1, 0, 0), names, (1, 1, 0.5, 0.5, 0.5)):
            for i, text in enumerate(texts):
                ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
                embedding.weight[first + i] = factor * words[ids].mean(0)
        self.embeddings[-1].weight *= words.std()  # not the words for how many there are of a kind

    def forward(self, patches, centres, numbers, places, colour, total):
        labels = (patches, centres, numbers, places, *(label[:, None].expand_as(patches) for label in (colour, total)))
        return sum(embedding(label) for embedding, label in zip(self.embeddings, labels))


class LabelReader(nn.Module):
    """The model with a label tower in place of its vision tower, and of the layers that make values of features."""

    def __init__(self, model, label_tower):
        super().__init__()
        self.label_tower = label_tower
        self.query_transformer = model.model.query_transformer
        self.query_transformer.value_norm = self.query_transformer.v_proj = nn.Identity()
        self.language_model = model.model.language_model
        self.image_token_id = model.config.image_token_id

    def forward(
        self,
        input_ids,
        attention_mask,
        labels,
        num_visual_tokens,
        patches,
        centres,
        numbers,
        places,
        colour,
        total,
    ):
        values = self.label_tower(patches, centres, numbers, places, colour, total)
        visual = self.query_transformer(values, num_visual_tokens)
        words = self.language_model.get_input_embeddings()  # tied to the output's
        embeds = words(input_ids)
        embeds = embeds.masked_scatter((input_ids == self.image_token_id)[..., None], visual.to(embeds.dtype))
        outputs = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False)
        is_answer = labels[:, 1:] != -100
        logits = F.linear(outputs.last_hidden_state[:, :-1][is_answer], words.weight).float()
        return {"loss": F.cross_entropy(logits, labels[:, 1:][is_answer])}


class LabelDataset(Dataset):
    """Drills, then what is asked about pictures, or told of them in the words of the drills, or a description. Samples before
    `elastic_from` have as many visual tokens at least as it takes to look at each cell alone."""

    def __init__(self, folder, drills, elastic_from):
        self.drills, self.elastic_from = drills, elastic_from
        self.patches = np.load(Path(folder) / "patches.npy")
        captions, conversations = (
            json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("captions", "conversations")
        )
        self.turns = []  # of pairs of pictures none: they have no labels
        for seed, (caption, conversation) in enumerate(zip(captions, conversations)):
            told = tell_scene(scenes.make_scene(seed)) if seed % 4 == 1 else None
            self.turns.append(told or (caption if seed % 8 == 0 else conversation)["conversations"])
        self.order = by_length(self.turns)

    def __len__(self):
        return self.drills + len(self.turns)

    def __getitem__(self, index):
        if index < self.drills:
            turns, labels = drill(index)
        else:
            seed = self.order[index - self.drills]
            patches, centres = self.patches[seed].reshape(2, -1).astype(np.int64)
            turns, labels = self.turns[seed], (patches, centres, *scene_labels(scenes.make_scene(seed), patches))
        least = NUM_COARSE if index < self.elastic_from else 1
        return {"conversations": turns, "labels": labels, "min_num_visual_tokens": least}


def by_length(rows, chunk=1280, batch=64):
    """An order in which rows of like length stand beside each other, so that batches need little padding; the batches of a chunk
    are shuffled."""
    rng, order = np.random.default_rng(0), []
    for start in range(0, len(rows), chunk):
        part = sorted(range(start, min(start + chunk, len(rows))), key=lambda row: len(str(rows[row])))
        batches = [part[i : i + batch] for i in range(0, len(part), batch)]
        order += [row for i in rng.permutation(len(batches)) for row in batches[i]]
    return order


class LabelCollator(MQTLlavaDataCollator):
    """Batches with labels of patches in place of pixels."""

    def __call__(self, samples):
        m = max(self.num_visual_tokens.next(), *(sample["min_num_visual_tokens"] for sample in samples))
        rows = []
        for sample in samples:
            canonical = canonical_sample({"image": "none", "conversations": sample["conversations"]})
            input_ids, labels = self.tokenize(canonical["messages"])
            rows.append({"input_ids": input_ids, "labels": labels, "images": [], "num_visual_tokens": m})
        patch_labels = [
            torch.from_numpy(np.stack(column)) for column in zip(*(sample["labels"] for sample in samples))
        ]
        return {**self.collate(rows), **dict(zip(LABELS, patch_labels)), "num_visual_tokens": m}


@torch.no_grad()
def fit_values(model, label_tower, dataset):
    """
    Give the query transformer the layers that make of the vision tower's features the values that it had from labels.

    Ridge regression over the patches of `dataset`; those that show something count four times as much as background.
    """
    width = model.config.vision_config.hidden_size
    namer = PatchNamer(model.model.vision_tower).eval()
    products, targets = 0, 0
    for rows in DataLoader(dataset, batch_size=100, collate_fn=collate):
        features = F.pad(namer.features(rows.pop("pixel_values")), (0, 1), value=1.0).flatten(0, 1).double()
        weighted = torch.where(rows["patches"].flatten() > 0, 1.0, 0.25)[:, None] * features
        products = products + weighted.T @ features
        targets = targets + weighted.T @ label_tower(**rows).flatten(0, 1).double()
    ridge = 1e-4 * products.diagonal().mean() * torch.eye(width + 1, dtype=torch.float64)
    weight = torch.linalg.solve(products + ridge, targets).float()
    transformer = model.model.query_transformer
    transformer.value_norm = nn.LayerNorm(width, eps=model.config.query_transformer_layer_norm_eps)
    transformer.v_proj = nn.Linear(width, width)
    transformer.v_proj.weight.copy_(weight[:-1].T)
    transformer.v_proj.bias.copy_(weight[-1])


def main():
    arguments, training = HfArgumentParser((LanguageArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    os.makedirs(training.output_dir, exist_ok=True)
    dataset = LabelDataset(arguments.data_path, arguments.drills, arguments.elastic_from)
    texts = (f" {turn['value']} ASSISTANT: USER:" for turns in dataset.turns for turn in turns)
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    image_size = CLIPVisionConfig.from_pretrained(arguments.vision_tower).image_size
    processor = make_processor(tokenizer, image_size, arguments.num_query_tokens)
    model = make_model(arguments, processor)
    label_tower = LabelTower(model.config.vision_config.hidden_size)
    label_tower.speak(model, tokenizer)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)  # takes a third off a step
    sampler = VisualTokenSampler(parse_distribution(arguments.num_visual_tokens), arguments.num_query_tokens)
    training.train_sampling_strategy = "sequential"  # drills first
    training.remove_unused_columns = False
    trainer = Trainer(
        LabelReader(model, label_tower),
        training,
        data_collator=LabelCollator(processor, sampler),
        train_dataset=dataset,
        callbacks=[sampler],
        optimizer_cls_and_kwargs=muon_and_adamw(training),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    if trainer.is_world_process_zero():
        pictures = PatchDataset(arguments.data_path)
        fit_values(model, label_tower, Subset(pictures, range(min(arguments.fit_pictures, len(pictures)))))
        model.save_pretrained(training.output_dir)
        processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
