"""LLaVA's conversation JSON as training batches."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils.chat_template_utils import render_jinja_template


class LlavaDataset(Dataset):
    """Samples of a LLaVA JSON file as chat messages: `{"messages": [...], "images": [PIL.Image, ...]}`.

    `image` of a sample, where it has one, is a file in `image_folder`. `<image>` stays where the text has it.
    """

    def __init__(self, data_path, image_folder=None):
        self.samples = json.loads(Path(data_path).read_text(encoding="utf-8"))
        self.image_folder = Path(image_folder) if image_folder else None

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]]
        images = []
        if "image" in sample:
            with Image.open(self.image_folder / sample["image"]) as image:
                images.append(image.convert("RGB"))
        return {"messages": messages, "images": images}


class LlavaCollator:
    """Batches of `LlavaDataset` samples as inputs of the model, answers and their end-of-sequence as labels.

    Prompts have one placeholder for each image, whatever the budget: `forward(num_visual_tokens=m)` makes m of it.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples):
        tokenizer = self.processor.tokenizer
        texts, answers = render_jinja_template(
            conversations=[sample["messages"] for sample in samples],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        images = [image for sample in samples for image in sample["images"]]
        batch = self.processor(
            images=images or None,
            text=texts,
            num_visual_tokens=1 if images else None,  # `<image>` keeps its width, so answers keep their places
            padding=True,
            padding_side="right",
            add_special_tokens=False,  # the template writes the BOS
            return_tensors="pt",
        )
        begin = self.processor.begin_chunks
        encoding = tokenizer([begin(text) for text in texts], add_special_tokens=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (text, spans) in enumerate(zip(texts, answers)):
            for start, end in spans:
                # where the answer begins and ends in the text that the processor tokenized
                start, end = len(begin(text[:start])), len(begin(text[:end]))
                first, last = encoding.char_to_token(row, start), encoding.char_to_token(row, end - 1)
                labels[row, first : last + 1] = batch["input_ids"][row, first : last + 1]
        batch["labels"] = labels
        return dict(batch)
