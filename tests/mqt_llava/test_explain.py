"""Heat maps are what they say: exact where they are exact, faithful where they are estimates, and of no harm to the model."""

import json
import os
from importlib import import_module

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma2Config, MistralConfig, Qwen2Config
from typer.testing import CliRunner

import mqt_llava
from benchmarks.measure import PeakMemory
from mqt_llava import cli
from mqt_llava.cost import CostModel
from mqt_llava.explain import (
    METHODS,
    AskedQuestion,
    EncodedImages,
    PatchParts,
    contribution,
    explain,
    extra_bytes,
    sheet,
    split_words,
    token_maps,
)
from recipes.tiny import scenes
from tests.small_model import NUM_QUERY_TOKENS, SIGLIP, make_images, make_model, make_processor, make_tokenizer


QUESTION = "What is this?"
SIDE = 6  # patches of the small model
EMOJI = os.path.exists(scenes.EMOJI_FONT)


def sizes(**more):
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **more}


LANGUAGE_MODELS = {
    "qwen2": Qwen2Config(**sizes(num_key_value_heads=2), vocab_size=264, initializer_range=0.2),
    "gemma2": Gemma2Config(**sizes(num_key_value_heads=2, head_dim=8), vocab_size=264, initializer_range=0.2),
    "mistral": MistralConfig(
        **sizes(num_key_value_heads=2), vocab_size=264, sliding_window=24, initializer_range=0.2, pad_token_id=0
    ),
}


def adapt(model, seed=1):
    """LoRA on every linear layer, that changes something."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(model, config).eval()


def asked(model, images=None, m=NUM_QUERY_TOKENS, **options):
    return AskedQuestion(
        model, make_processor(), images or make_images(1), QUESTION, m, answer="A red cat.", **options
    )


# ------------------------------------------------------------------------------------------------- maps and contributions


@pytest.mark.parametrize("kind", ["clip", "siglip", "lora", "bfloat16"])
def test_contributions_sum_to_the_token(kind):
    model = make_model(**(SIGLIP if kind == "siglip" else {}))
    if kind == "lora":
        model = adapt(model)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    inputs = make_processor()(images=make_images(2), text="<image><image>", return_tensors="pt")
    base = model.get_base_model() if kind == "lora" else model
    with torch.no_grad():
        outputs = base.get_image_features(inputs["pixel_values"], 9)
    parts = PatchParts.of(model, outputs)
    vectors = parts.vectors(9)
    assert vectors.shape == (2, 9, SIDE**2, 32)
    tokens = torch.stack(list(outputs.pooler_output)).float()
    tolerance = 0.05 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(vectors.sum(2) + parts.constant, tokens, rtol=tolerance, atol=tolerance)
    # What is left is the same for every picture, and less than what pictures add
    assert vectors.sum(2).norm() > 0.1 * tokens.norm()
    norms = contribution(model, inputs["pixel_values"], 9)
    torch.testing.assert_close(norms, vectors.norm(dim=-1), rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("overrides", [{}, SIGLIP], ids=["clip", "siglip"])
def test_token_maps_are_the_attention_of_the_query_transformer(overrides, monkeypatch):
    model = make_model(**overrides)
    maps = token_maps(model)
    assert maps.shape == (NUM_QUERY_TOKENS, 4, SIDE**2) and not maps.requires_grad
    torch.testing.assert_close(maps.sum(-1), torch.ones(NUM_QUERY_TOKENS, 4))
    model.set_attn_implementation("eager")
    module = __import__("mqt_llava.modeling.modeling_mqt_llava", fromlist=["eager_attention_forward"])
    eager, seen = module.eager_attention_forward, []

    def spy(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        seen.append(weights)
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    pixel_values = torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        model.get_image_features(pixel_values)
    torch.testing.assert_close(seen[0][0].transpose(0, 1), maps)


def test_maps_follow_an_adapter():
    plain = token_maps(make_model())
    adapted = adapt(make_model())
    maps = token_maps(adapted)
    assert (maps - plain).abs().max() > 0.01
    torch.testing.assert_close(token_maps(adapted.merge_and_unload()), maps, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_several_images(method):
    """Each with its own m; heat is shared among all of them."""
    result = explain(make_model(), make_processor(), make_images(2), QUESTION, [9, 3], method, max_new_tokens=12)
    number = len(result.words)
    assert result.words == result.answer.split() and number >= 1
    assert result.log_probs.shape == (number,) and (result.log_probs < 0).all()
    assert [one.shape for one in result.evidence] == [(number, SIDE, SIDE)] * 2
    assert result.visual_token_counts == [9, 3]
    if method == "occlusion":
        assert result.tokens is None and result.importance() is None
    else:
        assert [one.shape for one in result.tokens] == [(number, 9), (number, 3)]
        assert [one.shape for one in result.importance(0)] == [(9,), (3,)]
    for word in (None, 0):
        heat = result.heat(word)
        assert all((one >= 0).all() for one in heat)
        assert sum(float(one.sum()) for one in heat) == pytest.approx(1, abs=1e-5)


def test_gradients_tell_what_a_small_change_does():
    """Against a difference quotient: a little of one patch's part is added to all visual tokens, or taken away."""
    question, step, patches = asked(make_model(), m=5), 1e-2, [0, 7, 35]
    evidence, _ = question.by_gradient(16)
    parts = PatchParts.of(question.model, question.images.outputs).vectors(5)
    added = (parts[0] - parts[1])[:, patches].transpose(0, 1)  # behind the picture comes the grey one
    with torch.no_grad():
        more, less = (question.log_probs(question.visual_tokens + way * step * added) for way in (1, -1))
    assert evidence[0][:, patches].abs().max() > 0.01
    torch.testing.assert_close((more - less).T / (2 * step), evidence[0][:, patches], rtol=0.02, atol=1e-3)


def test_integrated_gradients_sum_to_what_the_pictures_did():
    question = asked(make_model(), [Image.new("RGB", (30, 30), colour) for colour in ("red", "navy")], [6, 2])
    evidence, tokens = question.by_gradient(64, [(step + 0.5) / 256 for step in range(256)])
    with torch.no_grad():
        own, grey = (question.log_probs(rows[None])[0] for rows in (question.visual_tokens, question.grey_tokens))
    assert (own - grey).abs().max() > 0.2
    total = sum(one.sum(-1) for one in evidence)
    torch.testing.assert_close(total, own - grey, rtol=0.01, atol=1e-3)
    for of_patches, of_tokens in zip(evidence, tokens):
        torch.testing.assert_close(of_patches.sum(-1), of_tokens.sum(-1), rtol=1e-3, atol=1e-4)


def test_occlusion_sees_nothing_where_nothing_is():
    """Patches that are grey already lose nothing when they turn grey. The second of two images is meant."""
    grey = make_processor().image_processor.image_mean
    picture = Image.new("RGB", (30, 30), tuple(int(255 * mean) for mean in grey))
    picture.paste(make_images(2)[1].resize((15, 30)), (0, 0))
    question = asked(make_model(), [make_images(1)[0], picture])
    _, lost = question.by_occlusion(7, window=1)[0]
    lost = lost.unflatten(-1, (SIDE, SIDE))
    assert lost[:, :, 3:].abs().max() < 1e-5 < 1e-3 < lost[:, :, :3].abs().max()


def test_occlusion_is_the_answer_to_another_picture():
    picture = make_images(2)[1]  # 30 x 30, so pixels are patches
    question = asked(make_model(), [picture], 7)
    evidence = question.by_occlusion(16, window=1)[0][0]
    covered = picture.copy()
    covered.paste(tuple(int(255 * mean) for mean in make_processor().image_processor.image_mean), (10, 5, 15, 10))
    with torch.no_grad():
        before = question.log_probs(question.visual_tokens[None])[0]
        other = asked(make_model(), [covered], 7)
        after = other.log_probs(other.visual_tokens[None])[0]
    torch.testing.assert_close(evidence[:, 1 * SIDE + 2], before - after, rtol=1e-3, atol=1e-4)


def test_attention_is_that_of_the_language_model():
    model = make_model()
    question = asked(model, m=4)
    _, (tokens,) = question.by_attention(1)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        layers = question.run(question.visual_tokens[None], output_attentions=True).attentions
    mean = torch.stack([layer[0] for layer in layers]).mean((0, 1))
    columns = (question.ids[0] == model.config.image_token_id).nonzero()[:, 0]
    rows = mean[question.prompt_ids.shape[1] - 1 : -1, columns]
    torch.testing.assert_close(tokens, question.in_word @ rows)
    assert len(question.words) == 3 and len(question.in_word.sum(0)) == len("A red cat.") + 1


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("method", ["integrated_gradients", "rollout"])
def test_other_language_models(name, method):
    model = make_model(text_config=LANGUAGE_MODELS[name])
    result = explain(model, make_processor(), make_images(1), QUESTION, 4, method, answer="A cat.")
    assert result.evidence[0].abs().sum() > 0 and result.evidence[0].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    exact = explain(make_model(), make_processor(), make_images(1), QUESTION, 4, method, answer="A cat.")
    rough = explain(make_model().bfloat16(), make_processor(), make_images(1), QUESTION, 4, method, answer="A cat.")
    pair = torch.stack([exact.evidence[0].flatten(), rough.evidence[0].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.9


def test_an_adapter_is_explained_as_its_merged_model():
    adapted = adapt(make_model())
    results = [
        explain(model, make_processor(), make_images(1), QUESTION, 4, answer="A cat.")
        for model in (make_model(), adapted, adapted.merge_and_unload())
    ]
    plain, apart, merged = (one.evidence[0] for one in results)
    torch.testing.assert_close(apart, merged, rtol=1e-2, atol=1e-3)
    assert (apart - plain).abs().max() > 0.05


def test_words_make_up_the_answer():
    """Explained as a whole, in one row; and whatever the number of rows at once."""
    whole = asked(make_model(), per_word=False).by_gradient(16)[0][0]
    words = asked(make_model()).by_gradient(2)[0][0]
    assert whole.shape == (1, SIDE**2) and words.shape == (3, SIDE**2)
    torch.testing.assert_close(words.sum(0), whole[0], rtol=1e-3, atol=1e-4)


def test_a_conversation_is_explained_at_its_last_answer():
    images, processor, model = make_images(1), make_processor(), make_model()
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    alone = explain(model, processor, images, [first], 4)
    assert alone.answer == explain(model, processor, images, QUESTION, 4).answer and alone.question == QUESTION
    turns = [first, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Where?"}]
    later = explain(model, processor, images, turns, 4, answer="Here.")
    assert later.question == "Where?" and later.words == ["Here."]
    single = explain(model, processor, images, "Where?", 4, answer="Here.")
    assert (later.log_probs - single.log_probs).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- what it does not do


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_before(method):
    model = make_model()
    choice = model.config._attn_implementation, model.model.language_model.config._attn_implementation
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # as servers call it
        explain(model, make_processor(), make_images(1), QUESTION, 4, method, answer="A cat.")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert (model.config._attn_implementation, model.model.language_model.config._attn_implementation) == choice


def test_the_model_is_as_before_where_it_fails(monkeypatch):
    model = make_model()
    question = asked(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden_states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        question.by_gradient(4)
    with pytest.raises(ZeroDivisionError):
        question.by_attention(4)
    monkeypatch.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_images_are_encoded_once_for_every_m():
    model, processor = make_model(), make_processor()
    passes = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: passes.append(1))
    images = EncodedImages(model, processor, make_images(2), 9)
    several = [explain(model, processor, images, QUESTION, m, answer="A cat.") for m in (1, 4, 9)]
    assert len(passes) == 1
    alone = explain(model, processor, make_images(2), QUESTION, 4, answer="A cat.")
    torch.testing.assert_close(several[1].evidence, alone.evidence, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="encoded for at most 9 visual tokens; got 16"):
        explain(model, processor, images, QUESTION, 16)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_what_was_said(method):
    """Of a model in which layers, logits and patches all weigh something."""
    text = {**sizes(num_key_value_heads=4), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    model = make_model(text_config=Qwen2Config(**text, vocab_size=2000))
    images = EncodedImages(model, make_processor(), make_images(1))
    question = AskedQuestion(model, make_processor(), images, QUESTION, 16, answer="A red cat.", per_word=False)
    lengths = {"num_text_tokens": question.prompt_ids.shape[1] - 16, "num_new_tokens": question.answer_ids.shape[1]}
    said = extra_bytes(CostModel(model.config), 16, method=method, dtype=torch.float32, batch_size=8, **lengths)
    with PeakMemory() as memory:
        question.explain(method, 8)
    assert 0.4 < said / memory.peak < 2.5


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "`method` must be one of integrated_gradients, gradient, attention, rollout, occlusion"),
        ({"question": "  "}, "The question is empty"),
        ({"answer": " "}, "The answer is empty"),
        ({"num_visual_tokens": 17}, "from 1 to 16"),
        ({"num_visual_tokens": True}, "from 1 to 16"),
        ({"num_visual_tokens": [1, 2]}, "2 entries"),
        ({"images": []}, "At least one image"),
        ({"question": "What? " * 200}, "The prompt has .* tokens, but the model supports at most 512"),
        ({"question": "Is this <image>?"}, "must not contain <image>"),
    ],
)
def test_bad_input_is_refused_before_any_work(settings, message):
    model = make_model()
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("worked"))
    arguments = {"images": make_images(1), "question": QUESTION} | settings
    if message == "The answer is empty":  # known when it is tokenized
        model = make_model()
    with pytest.raises(ValueError, match=message):
        explain(model, make_processor(), **arguments)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Only an MQT-LLaVA model can be explained; got Linear"):
        token_maps(torch.nn.Linear(1, 1))


def test_words_of_characters_that_come_in_bytes():
    tokenizer = make_tokenizer()
    ids = tokenizer("Größe 🐱 ok", add_special_tokens=False)["input_ids"]
    text, words, word_of = split_words(tokenizer, ids)
    assert (text, words) == ("Größe 🐱 ok", ["Größe", "🐱", "ok"])
    assert [word_of.count(word) for word in range(3)] == [8, 5, 2]  # bytes, each with the space behind it
    assert word_of == sorted(word_of)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_heat_is_drawn_where_it_is():
    """Over a wide picture, whose padding is cut away again: the hottest patch is red, a cold one grey."""
    picture = Image.new("RGB", (60, 30), (40, 200, 40))
    result = explain(make_model(), make_processor(), picture, QUESTION, 4, answer="A cat.")
    result.evidence[0][:] = -1
    result.evidence[0][0, 2, 4] = 5  # third of six rows, of which the picture has the second to the fourth quarter
    drawn = result.draw(0)
    assert drawn.size == (60, 30)
    red, green, blue = drawn.getpixel((45, 10))
    assert red > 180 > 120 > green and red > 100 + blue
    assert len(set(drawn.getpixel((5, 25)))) == 1
    assert drawn.tobytes() != result.draw(1).tobytes()  # where nothing spoke for the word: the picture in grey
    assert len(set(result.draw(1).getpixel((45, 10)))) == 1
    result.evidence[0][0, 2, 4] = 0.1  # hardly anything, the most of its word though
    pale = result.draw(0).getpixel((45, 10))
    assert 0 < pale[0] - pale[2] < 40 < red - blue


def test_the_caller_keeps_the_picture():
    picture = Image.new("RGB", (3000, 1500), "red")
    result = explain(make_model(), make_processor(), picture, QUESTION, 1, answer="A cat.")
    assert picture.size == (3000, 1500) and result.draw().size == (1024, 512)


@pytest.mark.parametrize("sizes_of", [[4], [1, 4, 16]])
@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_sheet(sizes_of, method):
    images = EncodedImages(make_model(), make_processor(), make_images(2))
    per_word = len(sizes_of) == 1
    explanations = [
        explain(make_model(), make_processor(), images, QUESTION, m, method, answer="$A red_ cat$", per_word=per_word)
        for m in sizes_of
    ]
    figure = sheet(explanations)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == f"m = {sizes_of[0]}: $A red_ cat$" and len(titles) == (4 if per_word else 3)
    bars = [axes for axes in figure.axes if axes.patches]
    assert len(bars) == (0 if method == "occlusion" else len(titles))
    figure.canvas.draw()


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def invoke(checkpoint, tmp_path):
    picture = tmp_path / "picture.png"
    make_images(1)[0].save(picture)

    def run(*arguments, model=checkpoint):
        options = ["--model", str(model), "--max-new-tokens", "8", *map(str, arguments)]
        return CliRunner().invoke(cli.app, ["explain", str(picture), *options])

    return run


def test_command_draws_the_sheet(invoke, tmp_path):
    output = tmp_path / "sheet.png"
    result = invoke(QUESTION, "--num-visual-tokens", "1,4,16", "--output", output)
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["m = 1", "m = 4", "m = 16"]
    assert "needs up to" in result.stderr and f"drawn to {output}" in result.stderr
    with Image.open(output) as drawn:
        assert drawn.width > drawn.height > 300
    before = output.read_bytes()
    again = invoke(QUESTION, "--output", output)
    assert again.exit_code == 2 and "exists" in again.stderr and output.read_bytes() == before
    assert invoke(QUESTION, "--output", output, "--overwrite").exit_code == 0 and output.read_bytes() != before
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"picture.png", "sheet.png"}


def test_command_has_all_methods():
    """It names them itself, since `mqt_llava.explain` imports torch."""
    assert tuple(method.value for method in import_module("mqt_llava.cli.explain").Method) == METHODS


def test_command_tells_numbers(invoke, tmp_path):
    result = invoke(QUESTION, "--num-visual-tokens", "4", "--json", "--output", tmp_path / "words.pdf")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["num_visual_tokens"] == 4 and told["words"] == told["answer"].split()
    assert len(told["heat"]) == len(told["words"]) and torch.tensor(told["answer_heat"]).shape == (1, SIDE, SIDE)
    assert torch.tensor(told["tokens"][0]).shape == (len(told["words"]), 4)
    assert (tmp_path / "words.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.png"], "needs a question"),
        ([QUESTION, "--output", "x.txt"], "--output must end in"),
        ([QUESTION, "--output", "nowhere/x.png"], "there is no folder nowhere"),
        ([QUESTION, "--output", "x.png", "--num-visual-tokens", "1,17"], "from 1 to 16 with this model; got 17"),
        ([QUESTION, "--output", "x.png", "--num-visual-tokens", "few"], "is an integer; got 'few'"),
        ([QUESTION, "--output", "x.png", "--method", "magic"], "magic"),
        (["Is this <image>?", "--output", "x.png"], "<image>"),
    ],
)
def test_command_refuses_in_one_line(invoke, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert result.stderr.rstrip().splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------------------------- the shipped checkpoint


@pytest.mark.skipif(not EMOJI, reason="needs fonts-noto-color-emoji")
def test_shipped_checkpoint_looks_at_the_thing():
    """Two things in corners: the heat of an answer about one lies in its cell, and moves with the question."""
    model = AutoModelForImageTextToText.from_pretrained(mqt_llava.TINY_CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mqt_llava.TINY_CHECKPOINT)
    inside = []
    for seed, (first, second) in enumerate([("cat", "car"), ("tree", "pizza"), ("fish", "clock")]):
        things = (scenes.Thing(first, 1 / 6, 1 / 6, 0.28, 0.0), scenes.Thing(second, 5 / 6, 5 / 6, 0.28, 0.0))
        picture = scenes.draw(scenes.Scene(seed, "white", "plain", 1.0, 1.0, 512, things))
        images = EncodedImages(model, processor, picture)
        for place, name, corner in (("top left", first, (0, 0)), ("bottom right", second, (1, 1))):
            answer = f"A {name}."
            result = explain(model, processor, images, f"What is at the {place}?", answer=answer, per_word=False)
            heat, side = result.heat()[0], images.side
            half = [slice(None, side // 2), slice(side // 2, None)]
            inside.append(float(heat[half[corner[0]], half[corner[1]]].sum()))
    assert sum(inside) / len(inside) > 0.5  # a quarter is chance
