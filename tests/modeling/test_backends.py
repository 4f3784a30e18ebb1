"""The attention backends: the same logits from each, and all three parts of the model use the one that was chosen."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils
from transformers.masking_utils import eager_mask

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.modeling.common import NUM_VISUAL_TOKENS, real_logits
from tests.small_model import make_images, make_model, make_processor


@pytest.fixture
def inputs():
    """Two rows of different lengths, left-padded, with one image and with two adjacent ones of other m."""
    first, *others = make_images(3)
    return make_processor()(
        images=[[first], others],
        text=["a <image>b", "<image><image> a longer text"],
        num_visual_tokens=NUM_VISUAL_TOKENS,
        padding=True,
        return_tensors="pt",
    )


@pytest.fixture
def expected(inputs):
    model = make_model(attn_implementation="eager")
    logits = real_logits(model, inputs)
    blind = real_logits(model, inputs | {"pixel_values": -inputs["pixel_values"]})
    assert (logits - blind).abs().max() > 0.1  # else equal logits would say nothing about the visual parts
    return logits


def parts(model):
    return {
        "vision_config": model.model.vision_tower.config._attn_implementation,
        "text_config": model.model.language_model.config._attn_implementation,
        "": model.model.query_transformer.config._attn_implementation,
    }


@pytest.fixture
def uncompiled():
    """FlexAttention without the half minute of compiling it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("how", ["config", "from_pretrained", "set_attn_implementation"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_backends_agree(backend, how, inputs, expected, checkpoint, uncompiled):
    if how == "config":
        model = make_model(attn_implementation=backend)
    elif how == "from_pretrained":
        model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=backend)
    else:
        model = make_model(attn_implementation="sdpa" if backend == "eager" else "eager")
        model.set_attn_implementation(backend)
    assert set(parts(model).values()) == {backend}
    torch.testing.assert_close(real_logits(model, inputs), expected, atol=1e-4, rtol=0)


def test_compiled_flex_attention_agrees(inputs, expected):
    model = make_model(attn_implementation="flex_attention")
    torch.testing.assert_close(real_logits(model, inputs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "choice",
    [
        {"vision_config": "eager", "text_config": "sdpa", "": "eager"},
        {"vision_config": "sdpa", "text_config": "eager", "": "flex_attention"},
        {"vision_config": "flex_attention", "text_config": "flex_attention", "": "sdpa"},
    ],
)
@pytest.mark.parametrize("how", ["config", "from_pretrained", "set_attn_implementation"])
def test_each_part_has_its_own_backend(choice, how, inputs, expected, checkpoint, uncompiled):
    if how == "config":
        model = make_model(attn_implementation=choice)
    elif how == "from_pretrained":
        model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=choice)
    else:
        model = make_model()
        model.set_attn_implementation(choice)
    assert parts(model) == choice
    torch.testing.assert_close(real_logits(model, inputs), expected, atol=1e-4, rtol=0)


def test_gradients_agree(inputs):
    """FlexAttention has no backward pass on a CPU."""
    gradients = []
    for implementation in ("eager", "sdpa"):
        model = make_model(attn_implementation=implementation)
        # the first token of a row would be foretold by the padding before it, whose outputs mean nothing
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= model.config.image_token_id, -100)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {"model.query_transformer.query", "model.query_transformer.k_proj.weight"} <= gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def spy():
    """A registered attention backend `"spy"` that writes down who calls it, with which shapes and which mask."""
    calls = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, query.shape, key.shape, value.shape, attention_mask, kwargs))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        weights = query @ key.transpose(-1, -2) * kwargs["scaling"]
        weights = (weights if attention_mask is None else weights + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("spy", attend)
    AttentionMaskInterface.register("spy", eager_mask)
    yield calls
    AttentionInterface._global_mapping.pop("spy")
    AttentionMaskInterface._global_mapping.pop("spy")


@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
def test_a_registered_backend_reaches_all_three_parts(m, spy, image):
    model = make_model(attn_implementation="spy")
    inputs = make_processor()(
        images=[image, image], text=["<image>a", "<image>bcd"], num_visual_tokens=m, padding=True, return_tensors="pt"
    )
    logits = real_logits(model, inputs)

    length, heads, head_dim = inputs["input_ids"].shape[1], 4, 8
    class_token_and_patches, patches = (2, heads, 37, head_dim), (2, heads, 36, head_dim)
    text, grouped = (2, heads, length, head_dim), (2, 2, length, head_dim)
    assert [(type(module).__name__, *map(tuple, shapes)) for module, *shapes, _, _ in spy] == [
        # two of the tower's three layers: what is behind `hidden_states[-2]` is not computed
        *[("CLIPAttention", class_token_and_patches, class_token_and_patches, class_token_and_patches)] * 2,
        ("MQTLlavaQueryTransformer", (2, heads, m, head_dim), patches, patches),
        *[("LlamaAttention", text, grouped, grouped)] * 2,
    ]
    (query_transformer_call,) = (call for call in spy if type(call[0]).__name__ == "MQTLlavaQueryTransformer")
    *_, mask, kwargs = query_transformer_call
    assert mask is None and kwargs["is_causal"] is False and kwargs["dropout"] == 0 and kwargs["scaling"] == 8**-0.5

    eager = make_model(attn_implementation="eager")
    torch.testing.assert_close(logits, real_logits(eager, inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", ["vision_config", "text_config", ""])
def test_a_registered_backend_reaches_only_the_part_that_it_is_for(part, spy, inputs, expected):
    choice = dict.fromkeys(["vision_config", "text_config", ""], "eager") | {part: "spy"}
    logits = real_logits(make_model(attn_implementation=choice), inputs)
    names = {"vision_config": "CLIPAttention", "text_config": "LlamaAttention", "": "MQTLlavaQueryTransformer"}
    assert {type(module).__name__ for module, *_ in spy} == {names[part]}
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
@pytest.mark.parametrize("how", ["config", "from_pretrained", "set_attn_implementation"])
def test_flash_attention_2_is_refused_only_for_lack_of_its_package(how, checkpoint):
    """No part says that it cannot do flash attention. Real flash attention was not run: there was no GPU."""
    with pytest.raises(ImportError, match=r"FlashAttention2 .*doesn't seem to be installed"):
        if how == "config":
            make_model(attn_implementation="flash_attention_2")
        elif how == "from_pretrained":
            MQTLlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="flash_attention_2")
        else:
            make_model().set_attn_implementation("flash_attention_2")


def exact_attention(q, k, v, scale, causal):
    """Attention of one sequence as the flash kernels define it: `(length, heads, head_dim)`, causal from the end."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        future = torch.ones(q.shape[0], k.shape[0]).triu(k.shape[0] - q.shape[0] + 1).bool()
        scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.fixture
def flash(monkeypatch):
    """`flash_attention_2` with its two CUDA kernels replaced by plain ones. All code of transformers around them is
    real: the dispatch, the masks, taking the padding out and putting it back."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        calls.append(("dense", tuple(q.shape), causal))
        return torch.stack([exact_attention(*row, softmax_scale, causal) for row in zip(q, k, v)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1),
    ):  # fmt: skip
        calls.append(("varlen", tuple(q.shape), causal))
        rows = zip(q.split(cu_seqlens_q.diff().tolist()), *(x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)))
        return torch.cat([exact_attention(*row, softmax_scale, causal) for row in rows])

    utils = modeling_flash_attention_utils
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_func, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)
    return calls


def test_flash_attention_2_reaches_all_three_parts(flash, inputs, expected):
    """The way to the kernels is checked, with stand-ins for the kernels: real flash attention was not run."""
    model = make_model(attn_implementation="flash_attention_2")
    assert set(parts(model).values()) == {"flash_attention_2"}
    logits = real_logits(model, inputs)
    tokens = int(inputs["attention_mask"].sum())
    assert flash == [
        *[("dense", (3, 37, 4, 8), False)] * 2,
        ("dense", (3, max(NUM_VISUAL_TOKENS), 4, 8), False),
        *[("varlen", (tokens, 4, 8), True)] * 2,
    ]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_flash_attention_2_generates(flash, inputs):
    """With stand-ins for the kernels: real flash attention was not run."""
    answers = [
        make_model(attn_implementation=backend).generate(
            **inputs, num_visual_tokens=4, max_new_tokens=6, do_sample=False
        )
        for backend in ("flash_attention_2", "eager")
    ]
    assert answers[0].tolist() == answers[1].tolist()
    assert len(flash) > 6
