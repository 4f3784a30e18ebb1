"""The shipped checkpoint answers by looking: right about pictures it never saw, at a loss without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import mqt_llava
from mqt_llava.modeling.configuration_mqt_llava import AUTO_MAP
from mqt_llava.modeling.processing_mqt_llava import CHAT_TEMPLATE, SYSTEM_PROMPT
from mqt_llava.update import CODE
from recipes.tiny.evaluate import about_nothing, accuracy_by_type, evaluation_set, is_right
from recipes.tiny.scenes import FONTS


CHECKPOINT = Path(mqt_llava.TINY_CHECKPOINT)
ACCURACY = CHECKPOINT / "accuracy.json"
needs_fonts = pytest.mark.skipif(
    not all(map(os.path.exists, FONTS)), reason="needs fonts-noto-color-emoji, fonts-symbola"
)


@pytest.fixture(scope="module")
def parts():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def samples():
    """Pictures that the checkpoint was not trained on, by the generator that drew its training data."""
    return evaluation_set(40)


def overall(parts, samples, m=64):
    return accuracy_by_type(samples, is_right(*parts, samples, m))


def test_is_small_and_ordinary(parts):
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= 25e6
    assert sum(parameter.numel() for parameter in parts[0].parameters()) <= 12e6
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert parts[0].generation_config.use_cache and parts[0].config.text_config.use_cache
    assert json.loads((CHECKPOINT / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_carries_the_code_of_the_package():
    """So that it loads where the package is not imported: there is one copy in the repository, and links to it."""
    assert {path.name: path.read_bytes() for path in CHECKPOINT.glob("*.py")} == {
        name: path.read_bytes() for name, path in CODE.items()
    }
    code = """
import sys
sys.modules["mqt_llava"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto_class in (AutoProcessor, AutoModelForImageTextToText):
    print(type(auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
    try:
        print(type(auto_class.from_pretrained(sys.argv[1], trust_remote_code=False)))
    except ValueError as error:
        print("trust_remote_code=True" in str(error))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, CHECKPOINT], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.split() == ["MQTLlavaProcessor", "True", "MQTLlavaForConditionalGeneration", "True"], (
        result.stderr
    )


def test_chat_template_is_that_of_the_code(parts):
    """But for the system prompt, which this model was not trained with."""
    assert parts[1].chat_template == CHAT_TEMPLATE.replace(SYSTEM_PROMPT.replace("'", "\\'"), "")


def test_batches_of_different_questions(parts):
    """With the defaults of `apply_chat_template`: padding is on the left, and there is one BOS."""
    model, processor = parts
    scene = str(Path(__file__).parents[2] / "examples" / "scene.png")
    questions = ["List everything.", "Is there a number?", "What colour is the background?"]
    contents = [[{"type": "image", "path": scene}, {"type": "text", "text": question}] for question in questions]
    chats = [[{"role": "user", "content": content}] for content in contents]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def answer(chats):
        inputs = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **settings)
        assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == len(chats)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert answer(chats) == [answer([chat])[0] for chat in chats]


@needs_fonts
def test_answers_about_new_pictures(parts, samples):
    """Within what chance does to 40 pictures of the accuracy reported for 1,000."""
    reported = json.loads(ACCURACY.read_text())
    for m in (64, 1):
        assert abs(overall(parts, samples, m)["all"] - reported[str(m)]["all"]) < 7


@needs_fonts
def test_no_leak(parts, samples):
    """Blank pictures and other scenes' pictures leave what can be guessed from the question alone."""
    samples = [sample for sample in samples if sample[1] != "pair"]
    true = overall(parts, samples)
    blank = Image.new("RGB", (128, 128), (128, 128, 128))
    guesses = [([blank], *rest) for _, *rest in samples]
    shuffled = [(samples[i - len(samples) // 2][0], *rest) for i, (_, *rest) in enumerate(samples)]
    for control in (guesses, shuffled):
        guessed = overall(parts, control)
        assert guessed["all"] < true["all"] - 35
        assert guessed["list"] < 15 and guessed["colour"] < 40
    assert overall(parts, [about_nothing(sample, blank) for sample in samples])["all"] > 90
