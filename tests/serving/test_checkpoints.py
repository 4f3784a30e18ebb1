"""Other checkpoints than the shipped one: tuned, converted, of other parts."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config

from mqt_llava import MQTLlavaForConditionalGeneration
from mqt_llava.conversion import convert
from mqt_llava.training.adapters import save_adapter
from mqt_llava.training.lora import make_lora_config
from tests.conversion.checkpoints import train_tokenizer, write_authors
from tests.serving.common import answer_with_transformers, answer_with_vllm, make_requests
from tests.small_model import SIGLIP, make_config, make_processor


pytestmark = pytest.mark.vllm
ONE_BY_ONE, TOGETHER = "one by one", "together"


def test_lora_on_the_language_model(tiny, pictures, tmp_path):
    requests = make_requests(pictures, (1, 2, 7, 16, 64, None))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, trust_remote_code=True)
    tuned = get_peft_model(model, make_lora_config(model, ["language_model"], r=8, lora_alpha=16))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:  # as if trained
            torch.nn.init.normal_(weight, std=0.4)
    save_adapter(tuned, tmp_path)
    adapted = answer_with_transformers(tiny, requests, adapter=tmp_path)
    assert sum(map(list.__ne__, adapted, answer_with_transformers(tiny, requests))) > len(requests) // 3
    assert answer_with_vllm(tiny, requests, adapter=tmp_path, enable_lora=True)["passes"] == [adapted]


def test_converted_checkpoint(tmp_path, pictures):
    """The authors' layout, converted: M = 256, a tokenizer made of SentencePiece's, grouped-query attention."""
    train_tokenizer(tmp_path / "tokenizer.model")
    layout = {"hidden": 128, "intermediate": 64, "heads": 4, "kv_heads": 2}  # vLLM on CPU wants heads of 32 or more
    convert(str(write_authors(tmp_path, tmp_path / "tokenizer.model", **layout)), tmp_path / "converted")
    requests = make_requests(pictures, num_visual_tokens=(1, 2, 16, 100, 256, None))
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
    requests = make_requests(pictures, num_visual_tokens=(1, 2, 7, 9, 16, None))
    found = answer_with_vllm(tmp_path, requests, passes=(ONE_BY_ONE, TOGETHER))
    assert found["passes"] == [answer_with_transformers(tmp_path, requests)] * 2
