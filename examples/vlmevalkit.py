"""VLMEvalKit with an MQT-LLaVA model. This script adds the model to VLMEvalKit's registry; the other options are VLMEvalKit's own.

    pip install ms-vlmeval==0.0.20 mqt-llava
    python examples/vlmevalkit.py --pretrained MODEL --num-visual-tokens 1 16 256 --data MMBench_DEV_EN --judge exact_matching \
        --work-dir results

Prompts are those of VLMEvalKit for LLaVA 1.5, in the chat template of the checkpoint, with all images before the text. With
`--judge exact_matching`, answers are not sent to GPT. Data of your own is a TSV in the folder that the environment variable `LMUData`
names.
"""

import argparse
import re
import sys
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from vlmeval import run
from vlmeval.config import supported_VLM
from vlmeval.vlm import LLaVA

import mqt_llava  # noqa: F401  (registers the model)
from mqt_llava.training.data import open_image


class MQTLlava(LLaVA):
    """LLaVA's prompts, another model."""

    INSTALL_REQ = False

    def __init__(self, pretrained, num_visual_tokens, max_new_tokens):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "auto" if device == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, device_map=device).eval()
        self.num_visual_tokens, self.max_new_tokens = num_visual_tokens, max_new_tokens

    def generate_inner(self, message, dataset=None):
        images = [open_image(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        text = text.replace(self.processor.image_token, "")  # some questions say where their images belong
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options = {"num_visual_tokens": self.num_visual_tokens, "add_special_tokens": False, "return_tensors": "pt"}
        inputs = self.processor(images=images or None, text=prompt, **options).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="a folder or a repository")
    parser.add_argument("--num-visual-tokens", type=int, nargs="+", required=True, help="one or more values of m")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--data", nargs="+", required=True, help="names of VLMEvalKit's data sets")
    arguments, others = parser.parse_known_args()
    # VLMEvalKit goes on where a model fails
    try:
        num_query_tokens = AutoConfig.from_pretrained(arguments.pretrained).num_query_tokens
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"{arguments.pretrained} is not an MQT-LLaVA model: {error}")
    for m in arguments.num_visual_tokens:
        if not 1 <= m <= num_query_tokens:
            parser.error(f"--num-visual-tokens must be from 1 to {num_query_tokens}; got {m}")
    # VLMEvalKit takes over results that it finds under this name
    name = re.sub(r"[^\w.-]+", "_", arguments.pretrained).strip("_")
    names = []
    for m in arguments.num_visual_tokens:
        names.append(f"{name}_{m}_visual_tokens_{arguments.max_new_tokens}_new")
        supported_VLM[names[-1]] = partial(MQTLlava, arguments.pretrained, m, arguments.max_new_tokens)
    sys.argv = [sys.argv[0], "--model", *names, "--data", *arguments.data, *others]
    run.load_env()
    run.main()


if __name__ == "__main__":
    main()
