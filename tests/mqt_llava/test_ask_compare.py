"""`mqt-llava ask --compare M,M,...`"""

import json
import re

import pytest
import torch

from mqt_llava.cli.ask import print_table
from tests.commands import QUESTION
from tests.mqt_llava.answers import expected_answer
from tests.small_model import make_images


pytestmark = pytest.mark.usefixtures("restore_global_settings")


def flops_of_products(m, length, num_cached=0):
    """Floating point operations of the small model's prefill, by hand: 2 for each multiply-add."""
    width, inner, patches, layers = 32, 64, 36, 2  # of three layers: the last one is not used
    tower = 2 * patches * 3 * 25 * width  # patch embedding: 5 x 5 pixels of 3 colours
    tokens = patches + 1
    tower += layers * 2 * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)
    query = 2 * (m * width**2 + 2 * patches * width**2 + 2 * m * patches * width + 2 * m * width**2)
    each, pair = width * (2 * width + 2 * 16) + 3 * width * inner, 2 * width
    text = 2 * 2 * (each * (length - num_cached) + pair * (length**2 - num_cached**2))
    return tower + query + text + 2 * width * 264


def test_compare_has_one_answer_for_each_m(ask, files):
    num_visual_tokens = [1, 4, 16]
    result = ask(files[0], QUESTION, "--compare", "1,4, 16", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    rows = record["compare"]
    assert record["question"] == QUESTION
    assert [row["num_visual_tokens"] for row in rows] == num_visual_tokens
    for row, m in zip(rows, num_visual_tokens):
        assert row["answer"] == expected_answer(make_images(1), [QUESTION], m)
        assert row["seconds"] > 0
        # rotary positions are a product too, so a little more than by hand
        by_hand = flops_of_products(m, row["prompt_tokens"], row["cached_tokens"])
        assert by_hand <= row["flops"] < 1.01 * by_hand


def test_compare_computes_what_is_shared_once(ask, files):
    """The images, and the prompt up to the first image, are computed once for all m."""
    batches, prefills = [], []

    def count(module, args, kwargs, output):
        if type(module).__name__ == "CLIPVisionEmbeddings" and not output.is_meta:
            batches.append(len(output))
        embeds = kwargs["inputs_embeds"] if type(module).__name__ == "LlamaModel" else None
        if embeds is not None and embeds.shape[1] > 1 and not embeds.is_meta:
            prefills.append(embeds.shape[1])

    hook = torch.nn.modules.module.register_module_forward_hook(count, with_kwargs=True)
    rows = json.loads(ask(*files, QUESTION, "--compare", "1,4,16", "--json").stdout)["compare"]
    hook.remove()
    shared = rows[0]["cached_tokens"]
    assert batches == [2] and shared > 10
    assert prefills == [shared, *(row["prompt_tokens"] - shared for row in rows)]


def test_compare_prints_a_table(ask, files):
    result = ask(files[0], QUESTION, "--compare", "1,16")
    assert result.exit_code == 0 and result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == ["m", "answer", "time", "compute"]
    assert [line[0] for line in lines[2:]] == ["1", "16"]
    for line, m in zip(lines[2:], (1, 16)):
        assert expected_answer(make_images(1), [QUESTION], m)[-3:] in " ".join(line)
        assert line[-1] == "GFLOP" and float(line[-2]) > 0
        assert line[-3] == "s" and float(line[-4]) >= 0


def test_table_shows_brackets_of_an_answer(capsys):
    print_table([{"num_visual_tokens": 4, "answer": "[red] [/b]", "seconds": 1.5, "flops": 4.25e12}])
    assert re.search(r"4 +\[red\] \[/b\] +1\.50 s +4,250\.00 GFLOP", capsys.readouterr().out)
