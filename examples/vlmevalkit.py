"""VLMEvalKit with an MQT-LLaVA model: what is said here adds the model to its registry, all else is its own command line.

    python examples/vlmevalkit.py --pretrained MODEL --num-visual-tokens 16 --data MMBench_DEV_EN --work-dir results

Questions are put as for LLaVA-1.5 there. **Not run**: written by the source of `ms-vlmeval` 0.0.20, whose some eighty
dependencies were not installed.
"""

import argparse
import sys
from functools import partial

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval import run
from vlmeval.config import supported_VLM
from vlmeval.vlm import LLaVA

import mqt_llava  # noqa: F401  (registers the model)
from mqt_llava.training.data import open_image


class MQTLlava(LLaVA):
    """LLaVA's prompts, another model."""

    INSTALL_REQ = False

    def __init__(self, pretrained, num_visual_tokens=None, max_new_tokens=512):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "auto" if device == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, device_map=device).eval()
        self.num_visual_tokens, self.max_new_tokens = num_visual_tokens, max_new_tokens

    def generate_inner(self, message, dataset=None):
        images = [open_image(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(
            images=images or None, text=prompt, num_visual_tokens=self.num_visual_tokens, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="a folder or a repository")
    parser.add_argument("--num-visual-tokens", type=int, help="of each image; M by default")
    arguments, others = parser.parse_known_args()
    name = f"mqt-llava-{arguments.num_visual_tokens or 'all'}"  # results of each m have their own name
    supported_VLM[name] = partial(MQTLlava, arguments.pretrained, arguments.num_visual_tokens)
    sys.argv = [sys.argv[0], "--model", name, *others]
    run.load_env()
    run.main()


if __name__ == "__main__":
    main()
