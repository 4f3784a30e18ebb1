"""vLLM's greedy tokens are those of `generate`, for every budget and in every way that vLLM runs a model."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config

from mqt_llava import MQTLlavaForConditionalGeneration
from mqt_llava.conversion import convert
from mqt_llava.training.adapters import save_adapter
from mqt_llava.training.lora import make_lora_config
from tests.conversion.checkpoints import train_tokenizer, write_authors
from tests.serving.common import answer_with_transformers, answer_with_vllm
from tests.small_model import SIGLIP, make_config, make_processor


pytestmark = pytest.mark.vllm
BUDGETS = (1, 2, 7, 16, 64, None)
ONE_BY_ONE, TOGETHER = False, True
COLD = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


def make_requests(pictures, budgets=BUDGETS):
    """One picture at every budget, several, adjacent ones, none, and a conversation that goes on."""
    first, second, third = pictures

    def request(prompt, *images, m=None):
        return {"prompt": f"USER: {prompt} ASSISTANT:", "images": images, "num_visual_tokens": m}

    few, some = budgets[1], budgets[3]
    return [
        *(request("<image>\nList everything.", first, m=m) for m in budgets),
        *(request("<image>\nWhat colour is the background?", second, m=m) for m in (few, some)),
        request("<image>\n<image>\nList everything.", first, second, m=some),
        request("<image><image><image> List everything.", third, first, first, m=few),
        request("What is there?"),
        request("<image>\nIs there a dog? ASSISTANT: Yes.</s>USER: List everything.", first, m=some),
    ]


def rows_of(requests):
    """The visual tokens that the encoder has to make for each image, M where none are said."""
    return [request["num_visual_tokens"] or 64 for request in requests for _ in request["images"]]


@pytest.fixture(scope="module")
def requests(pictures):
    return make_requests(pictures)


@pytest.fixture(scope="module")
def expected(tiny, requests):
    answers = answer_with_transformers(tiny, requests)
    assert len({tuple(answer) for answer in answers[: len(BUDGETS)]}) > 2  # budgets make a difference
    return answers


def test_one_by_one_and_in_a_batch_with_warm_caches(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, ONE_BY_ONE, TOGETHER))
    assert found["passes"] == [expected] * 3
    # Each picture once for each budget it was asked at: nothing is shared between budgets, nothing is made twice
    once = {(image, r["num_visual_tokens"]): r["num_visual_tokens"] or 64 for r in requests for image in r["images"]}
    assert sorted(found["rows"]) == sorted(once.values())


def test_in_one_mixed_batch_with_cold_caches(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(TOGETHER,))
    assert found["passes"] == [expected]


def test_without_caches_and_with_chunked_prefill(tiny, requests, expected):
    """Prompts are cut at 72 tokens, within images too."""
    found = answer_with_vllm(
        tiny, requests, passes=(TOGETHER, ONE_BY_ONE), max_num_batched_tokens=72, max_num_seqs=4, **COLD
    )
    assert found["passes"] == [expected] * 2
    assert set(found["rows"]) == set(
        rows_of(requests)
    )  # no image is encoded with another number of tokens than was asked


def test_server_wide_default(tiny, requests, expected):
    """A request's own budget goes before it."""
    found = answer_with_vllm(tiny, requests, mm_processor_kwargs={"num_visual_tokens": 7})
    assert found["passes"][0][BUDGETS.index(None)] == expected[BUDGETS.index(7)]
    said = [i for i, request in enumerate(requests) if request["num_visual_tokens"] or not request["images"]]
    assert [found["passes"][0][i] for i in said] == [expected[i] for i in said]


def test_compiled(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, TOGETHER), enforce_eager=False)
    assert found["passes"] == [expected] * 2


def test_tensor_parallel(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, TOGETHER), tensor_parallel_size=2)
    assert found["passes"] == [expected] * 2


def test_lora_on_the_language_model(tiny, requests, expected, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, trust_remote_code=True)
    tuned = get_peft_model(model, make_lora_config(model, ["language_model"], r=8, lora_alpha=16))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:  # as if trained
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(tuned, tmp_path)
    adapted = answer_with_transformers(tiny, requests, adapter=tmp_path)
    assert sum(map(list.__ne__, adapted, expected)) > len(requests) // 3
    assert answer_with_vllm(tiny, requests, adapter=tmp_path, enable_lora=True)["passes"] == [adapted]


def test_converted_checkpoint(tmp_path, pictures):
    """The authors' layout, converted: M = 256, a tokenizer made of SentencePiece's, grouped-query attention."""
    train_tokenizer(tmp_path / "tokenizer.model")
    layout = {"hidden": 128, "intermediate": 64, "heads": 4, "kv_heads": 2}  # vLLM on CPU wants heads of 32 or more
    convert(str(write_authors(tmp_path, tmp_path / "tokenizer.model", **layout)), tmp_path / "converted")
    requests = make_requests(pictures, budgets=(1, 2, 16, 100, 256, None))
    found = answer_with_vllm(tmp_path / "converted", requests, passes=(ONE_BY_ONE, TOGETHER))
    assert found["passes"] == [answer_with_transformers(tmp_path / "converted", requests)] * 2
    assert {1, 2, 16, 100, 256} == set(found["rows"])


def test_another_tower_and_language_model(tmp_path, pictures):
    """SigLIP, which has no class token, and Qwen2."""
    torch.manual_seed(0)
    text_config = Qwen2Config(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    MQTLlavaForConditionalGeneration(make_config(text_config=text_config, **SIGLIP)).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).num_query_tokens == 16
    requests = make_requests(pictures, budgets=(1, 2, 7, 9, 16, None))
    found = answer_with_vllm(tmp_path, requests, passes=(ONE_BY_ONE, TOGETHER))
    assert found["passes"] == [answer_with_transformers(tmp_path, requests)] * 2
