"""`torch.compile` and `torch.export`: how many graphs there are, and that they compute the same."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME
from tests.modeling.common import IMAGE_TOKEN_ID, NUM_VISUAL_TOKENS, prepare
from tests.small_model import make_model


@pytest.fixture
def compile_model(request):
    """`torch.compile` with `fullgraph=True`, which raises an error at a graph break."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model, backend: torch.compile(model, fullgraph=True, backend=backend)
    torch.compiler.reset()


def compilable(m, with_counts):
    """Padded rows with two, one or no image. No images are adjacent without counts: each run of placeholders is one then."""
    inputs = prepare(m=m) if with_counts else prepare([1, 2, 3], m=m)
    if not with_counts:
        inputs.pop("visual_token_counts", None)
    return inputs


def assert_same_logits(compiled, model, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits  # first: a cold compile fails even for transformers' LLaVA
        blind = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
        assert (expected - blind).abs().max() > 0.1
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-4, rtol=0)


# forward --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_counts", [True, False], ids=["counts", "no_counts"])
def test_forward_is_one_graph(model, compile_model, with_counts):
    """The traced graph is run as it is, without compiling it."""
    compiled = compile_model(model, "eager")
    for m in NUM_VISUAL_TOKENS:
        assert_same_logits(compiled, model, compilable(m, with_counts))


@pytest.mark.slow
@pytest.mark.parametrize("with_counts", [True, False], ids=["counts", "no_counts"])
def test_compiled_forward(model, compile_model, with_counts):
    compiled = compile_model(model, "inductor")
    for m in NUM_VISUAL_TOKENS:
        assert_same_logits(compiled, model, compilable(m, with_counts))


@pytest.mark.parametrize("row, with_counts", [(0, True), (2, True), (2, False)])
def test_counts_of_the_same_total_share_one_graph(model, compile_model, row, with_counts):
    compiled = compile_model(model, "eager")
    for counts in ([7, 7], [1, 13], [12, 2]):
        inputs = prepare([row], m=counts)
        if not with_counts:
            inputs.pop("visual_token_counts", None)
        assert_same_logits(compiled, model, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_text_alone_is_one_graph(model, compile_model):
    inputs = prepare([1])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(compile_model(model, "eager")(**inputs).logits, expected, atol=1e-4)


@pytest.mark.parametrize("with_counts", [True, False], ids=["counts", "no_counts"])
def test_training_step_is_one_graph(compile_model, with_counts):
    gradients = []
    inputs = compilable(5, with_counts)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE_TOKEN_ID, -100)
    model = make_model().train()
    for run in (model, compile_model(model, "aot_eager")):
        model.zero_grad()
        run(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {"model.query_transformer.query", "model.vision_tower.embeddings.class_embedding"} <= gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


# generate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [None, 3])
def test_generate_with_a_compiled_forward(model, compile_model, m):
    inputs, settings = prepare(m=7), {"max_new_tokens": 6, "do_sample": False, "num_visual_tokens": m}
    expected = model.generate(**inputs, **settings)
    model.forward = compile_model(model.forward, "eager")
    assert model.generate(**inputs, **settings, cache_implementation="static").tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_one_graph_decodes_prompts_of_any_length_with_any_m(model, processor, compile_model, image):
    """With the caller's own static cache, reset for every prompt, nothing is recompiled."""
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True  # as transformers does by itself on a GPU
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    for text, m in (("<image>a", 1), ("<image> what is this?", 7), ("A longer text: <image>", 16), ("<image>", 3)):
        inputs = processor(images=image, text=text, return_tensors="pt")
        options = {"num_visual_tokens": m, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        expected = model.generate(**inputs, **options)
        cache.reset()
        sequences = model.generate(**inputs, **options, **{CACHE_NAME: cache}, compile_config=compile_config)
        assert sequences.tolist() == expected.tolist()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_parts_prefill_prompts_of_any_length_with_any_m(model, processor, compile_model, image):
    """The documented way to compile the prefill too: nothing is recompiled after three prompts, and answers agree."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    texts = (
        "<image>a",
        "<image> what is this?",
        "A longer text: <image>",
        "<image>",
        "<image>b",
        "<image>" + "long " * 9,
    )
    prompts = list(zip(texts, (1, 7, 16, 3, 2, 9)))
    inputs = [processor(images=image, text=text, return_tensors="pt") for text, _ in prompts]
    options = [
        {"num_visual_tokens": m, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} for _, m in prompts
    ]
    expected = [model.generate(**row, **settings).tolist() for row, settings in zip(inputs, options)]

    model.model.vision_tower.compile(backend="eager")
    model.model.query_transformer.compile(backend="eager")
    model.model.language_model.compile(backend="eager", dynamic=True)
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    num_graphs = []
    for row, settings, sequences in zip(inputs, options, expected):
        cache.reset()
        answer = model.generate(**row, **settings, **{CACHE_NAME: cache}, compile_config=compile_config)
        assert answer.tolist() == sequences
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_graphs[0] >= 4  # tower, query transformer, prefill, decoding
    assert num_graphs[2:] == [num_graphs[2]] * 4


# torch.export ---------------------------------------------------------------------------------------------------------


def test_export_of_the_features_takes_any_number_of_images(model):
    pixel_values = prepare()["pixel_values"]

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model.get_image_features(pixel_values).pooler_output

    shapes = {"pixel_values": {0: torch.export.Dim("num_images", min=1, max=64)}}
    with torch.no_grad():
        program = torch.export.export(Features(), (pixel_values[:3],), dynamic_shapes=shapes, strict=False).module()
        for images in (pixel_values[:2], pixel_values, torch.cat([pixel_values] * 3)):
            expected = torch.stack(model.get_image_features(images).pooler_output)
            torch.testing.assert_close(program(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_counts", [True, False], ids=["counts", "no_counts"])
def test_export(model, with_counts):
    """An exported program also takes other images, and other counts of the same shapes."""
    exported = None
    for counts in ([5, 5, 7], [2, 8, 7]):
        inputs = prepare([2, 3], m=counts)
        if not with_counts:
            inputs.pop("visual_token_counts", None)
        inputs["pixel_values"] = inputs["pixel_values"] * (1 if exported is None else -1)
        if exported is None:
            with torch.no_grad():
                exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False).module()
        assert_same_logits(lambda **kwargs: exported(**kwargs, use_cache=False), model, inputs)
