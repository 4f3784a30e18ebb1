"""4 and 8 bits on a CPU, by real libraries."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from mqt_llava import TINY_CHECKPOINT, cli
from mqt_llava.cli.conversation import Conversation
from mqt_llava.quantization import quantization_config
from mqt_llava.training.adapters import load_adapter
from mqt_llava.training.lora import load_quantized, make_lora_config
from tests.commands import assert_refused


pytestmark = pytest.mark.usefixtures("restore_global_settings")
SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
LIBRARIES = {8: "torchao", 4: "bitsandbytes"}


@pytest.fixture(params=LIBRARIES)
def num_bits(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


def ask(*options):
    return CliRunner().invoke(cli.app, ["ask", str(SCENE), "List everything.", "--json", *map(str, options)])


def test_the_language_model_is_quantized_and_nothing_else(num_bits):
    config = quantization_config(num_bits, "cpu")
    model = AutoModelForImageTextToText.from_pretrained(
        TINY_CHECKPOINT, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    kinds = {name: type(layer.weight) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    changed = {name for name, kind in kinds.items() if kind is not nn.Parameter}
    assert changed == {name for name in kinds if name.startswith("model.language_model.")} != set()


def test_answers_are_those_of_the_model(num_bits):
    """And those of a large m are still right, of a picture that was not trained on."""
    for m in (16, 64):
        exact, found = ask("--num-visual-tokens", m), ask("--num-visual-tokens", m, f"--load-in-{num_bits}bit")
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["answer"] == json.loads(exact.stdout)["answer"]


def test_what_cannot_be():
    assert_refused(ask("--load-in-4bit", "--load-in-8bit"), "--load-in-4bit and --load-in-8bit are mutually exclusive")
    with pytest.raises(ValueError, match="`num_bits` must be 4 or 8; got 3"):
        quantization_config(3, "cpu")


@pytest.mark.parametrize("bits", LIBRARIES)
def test_missing_libraries_are_named(monkeypatch, bits):
    for name in [name for name in sys.modules if name.partition(".")[0] == LIBRARIES[bits]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, LIBRARIES[bits], None)
    monkeypatch.setitem(sys.modules, f"{LIBRARIES[bits]}.quantization", None)
    result = ask(f"--load-in-{bits}bit")
    assert_refused(result, f"{LIBRARIES[bits]}", "is missing: pip install 'mqt-llava[quantize]'")


def test_adapter_goes_on_a_quantized_model(tmp_path):
    """It is not merged into it: rounded anew, its weights would be lost."""
    pytest.importorskip("bitsandbytes")
    base = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    torch.manual_seed(0)
    get_peft_model(base, make_lora_config(base, r=4, init_lora_weights=False)).save_pretrained(tmp_path)
    found = ask("--load-in-4bit", "--adapter", tmp_path, "--model", TINY_CHECKPOINT)
    assert found.exit_code == 0, found.output
    model = load_adapter(load_quantized(TINY_CHECKPOINT, device_map="cpu"), tmp_path).eval()
    chat = Conversation(AutoProcessor.from_pretrained(TINY_CHECKPOINT), model, [Image.open(SCENE)], 64, 512)
    without = ask("--load-in-4bit")
    answers = [json.loads(result.stdout)["answer"] for result in (found, without)]
    assert answers[0] == chat.ask("List everything.")["answer"] != answers[1]
