"""Generating at any m: streaming, caches, chats, beams, helpers of transformers, checkpointing, compilation."""

import copy
import json
from threading import Thread

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from mqt_llava import MQTLlavaForConditionalGeneration
from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


NUM_VISUAL_TOKENS = [1, 7, NUM_QUERY_TOKENS]
IMAGE_TOKEN_ID = 3
# Rows with two images (adjacent in one, apart in the other), without any, with one
ROWS = ["<image><image> which one?", "no picture", "<image> first, then <image>, go", "look: <image>"]
IMAGES_OF_ROWS = [[0, 1], [], [2, 3], [4]]


def prepare(rows=range(len(ROWS)), m=None, text=ROWS):
    """The processor's inputs for some of the rows, left-padded."""
    images = make_images(5)
    chosen = [[images[i] for i in IMAGES_OF_ROWS[row]] for row in rows]
    return make_processor()(
        images=chosen if any(chosen) else None,
        text=[text[row] for row in rows],
        num_visual_tokens=m,
        padding=True,
        return_tensors="pt",
    )


def images_of(inputs):
    """What the processor says about images: the counts are there where placeholders of two images are adjacent."""
    return {name: inputs[name] for name in ("pixel_values", "visual_token_counts") if name in inputs}


def new_tokens(sequences, inputs):
    """The answers without the prompt, `</s>` and what follows it."""
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[: answer.index(2)] if 2 in answer else answer for answer in answers]


class CountVision:
    """Counts the calls of the vision tower and the images that it is given."""

    def __init__(self, model):
        self.calls, self.images = 0, 0
        model.model.vision_tower.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1
        self.images += args[0].shape[0]


# Streaming ------------------------------------------------------------------------------------------------------------


class CollectingStreamer(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
def test_text_streamer(model, processor, image, m):
    inputs = processor(images=image, text="<image>Q: what?", num_visual_tokens=7, return_tensors="pt")
    streamer = CollectingStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_visual_tokens": m}
    sequences = model.generate(**inputs, **settings, streamer=streamer)
    assert sequences.tolist() == model.generate(**inputs, **settings).tolist()
    (answer,) = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer and streamer.text == answer


@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
def test_text_iterator_streamer_in_a_thread(model, processor, image, m):
    inputs = processor(images=image, text="<image>Q: what?", return_tensors="pt")
    streamer = TextIteratorStreamer(processor, skip_prompt=True, timeout=30, skip_special_tokens=True)
    settings = {**inputs, "max_new_tokens": 12, "do_sample": False, "num_visual_tokens": m}
    thread = Thread(target=model.generate, kwargs=settings | {"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    sequences = model.generate(**settings)
    assert streamed == processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.every_version
@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_static_cache_is_as_good_as_a_dynamic_one(model, m, num_beams):
    inputs = prepare(m=7)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_visual_tokens": m, "num_beams": num_beams}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    dynamic = model.generate(**inputs, **settings)
    static = model.generate(**inputs, **settings, cache_implementation="static")
    assert isinstance(static[CACHE_NAME], StaticCache) and isinstance(dynamic[CACHE_NAME], DynamicCache)
    assert static.sequences.tolist() == dynamic.sequences.tolist()
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=1e-4, rtol=0)


def test_without_a_cache(model):
    inputs, settings = prepare(), {"max_new_tokens": 4, "do_sample": False, "num_visual_tokens": 4}
    cached = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, use_cache=False).tolist() == cached.tolist()


@pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"),
    reason="this transformers drops the images of every model when it prefills in chunks",
)
@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_prefill_in_chunks(model, m, num_beams):
    """The chunks cut through the visual tokens of an image."""
    inputs = prepare(m=7)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_visual_tokens": m, "num_beams": num_beams}
    expected = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, prefill_chunk_size=5).tolist() == expected.tolist()


# Chats over a cache ---------------------------------------------------------------------------------------------------

FIXED = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def tokens(processor, text, batch_size, num_placeholders=0):
    ids = processor.tokenizer(text.replace("<image>", "<image>" * num_placeholders), add_special_tokens=False)
    return torch.tensor([ids["input_ids"]] * batch_size)


def second_prompt(first, sequences, second_turn):
    """The whole conversation: the first turn, its answer, and what the user says next."""
    input_ids = torch.cat([sequences, second_turn], dim=1)
    new = input_ids.shape[1] - first["attention_mask"].shape[1]
    mask = torch.cat([first["attention_mask"], torch.ones(len(input_ids), new, dtype=torch.long)], dim=1)
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_same_turn(continued, scratch):
    new = -FIXED["max_new_tokens"]
    assert continued.sequences[:, new:].tolist() == scratch.sequences[:, new:].tolist()
    torch.testing.assert_close(torch.stack(continued.logits), torch.stack(scratch.logits), atol=1e-4, rtol=0)


@pytest.mark.skipif(CACHE_NAME != "cache", reason="this transformers has one name for the cache")
def test_old_name_of_the_cache(model):
    """Since transformers 5.24 it is deprecated, and goes on working as for transformers' own models."""
    inputs = prepare([2], m=4)
    config = model.config.get_text_config()
    for call in (model, model.model):
        with torch.no_grad():
            expected = call(**inputs, cache=DynamicCache(config=config))
            with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
                outputs = call(**inputs, past_key_values=DynamicCache(config=config))
        torch.testing.assert_close(outputs[0], expected[0])
        assert outputs.past_key_values is outputs.cache and outputs["past_key_values"] is outputs.cache
        assert outputs.cache.get_seq_length() == expected.cache.get_seq_length() > 0
    old, new = DynamicCache(config=config), DynamicCache(config=config)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        answer = model.generate(**inputs, **FIXED, past_key_values=old, num_visual_tokens=3)
    assert answer.tolist() == model.generate(**inputs, **FIXED, cache=new, num_visual_tokens=3).tolist()
    assert old.get_seq_length() == new.get_seq_length() > 0


@pytest.mark.every_version
@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
@pytest.mark.parametrize("passed", ["whole", "new tokens", "static"])
def test_second_turn_from_the_cache(model, processor, m, passed):
    """The cache of the first turn gives the same second turn as a run from scratch; nothing is encoded again."""
    rows = [2] if passed == "static" else [0, 2]
    first = prepare(rows, m=m)
    images = images_of(first)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120) if passed == "static" else None
    answer = model.generate(**first, **FIXED, **WITH_LOGITS, **{CACHE_NAME: cache})
    prompt = second_prompt(first, answer.sequences, tokens(processor, "USER: and now?", len(rows)))
    scratch = model.generate(**prompt, **images, **FIXED, **WITH_LOGITS)
    cache, counter = answer[CACHE_NAME], CountVision(model)
    if passed == "new tokens":
        prompt["input_ids"] = prompt["input_ids"][:, cache.get_seq_length() :]
    continued = model.generate(**prompt, **FIXED, **WITH_LOGITS, **{CACHE_NAME: cache})
    assert_same_turn(continued, scratch)
    assert counter.images == 0


@pytest.mark.every_version
@pytest.mark.parametrize("rebudget", [False, True], ids=["prepared", "num_visual_tokens"])
@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
@pytest.mark.parametrize("passed", ["whole", "whole, no counts", "new tokens", "features"])
def test_second_turn_with_a_new_image(model, processor, m, passed, rebudget):
    """It alone is passed and encoded, and its visual tokens alone follow `num_visual_tokens`."""
    first = prepare([0, 2], m=5)
    new_pixels = -first["pixel_values"][[0, 2]]
    answer = model.generate(**first, **FIXED, **WITH_LOGITS)
    cache = answer[CACHE_NAME]
    scratch = model.generate(
        **second_prompt(first, answer.sequences, tokens(processor, "USER: <image> and now?", 2, m)),
        pixel_values=torch.cat([first["pixel_values"], new_pixels])[[0, 1, 4, 2, 3, 5]],  # images go row by row
        visual_token_counts=torch.tensor([5, 5, m] * 2),
        **FIXED,
        **WITH_LOGITS,
    )
    prepared_m = 9 if rebudget else m
    prompt = second_prompt(first, answer.sequences, tokens(processor, "USER: <image> and now?", 2, prepared_m))
    if passed == "new tokens":
        prompt["input_ids"] = prompt["input_ids"][:, cache.get_seq_length() :]
    if passed == "features":
        with torch.no_grad():
            features = model.get_image_features(new_pixels, NUM_QUERY_TOKENS if rebudget else m)
        prompt["mm_encoder_outputs"] = {"image": features}
    else:
        prompt["pixel_values"] = new_pixels
    if passed == "whole":
        prompt["visual_token_counts"] = torch.tensor([prepared_m] * 2)
    counter = CountVision(model)
    settings = FIXED | WITH_LOGITS | ({"num_visual_tokens": m} if rebudget else {})
    continued = model.generate(**prompt, **settings, **{CACHE_NAME: cache})
    assert_same_turn(continued, scratch)
    assert continued.sequences[:, : prompt["input_ids"].shape[1]].tolist() == prompt["input_ids"].tolist()
    assert counter.images == (0 if passed == "features" else 2)


def test_new_image_in_some_rows_alone(model, processor):
    """Rows whose new parts shrink differently: the padding goes between the cached part and the new one."""
    rows, m = [2, 2], 4
    first = prepare(rows, m=m)
    answer = model.generate(**first, **FIXED, **WITH_LOGITS)
    new_pixels = -first["pixel_values"][:1]

    def second_turn(num_placeholders):
        turn = tokens(processor, "USER: <image> and now?", 2, num_placeholders)
        turn[1, turn[1] == IMAGE_TOKEN_ID] = 50
        return turn

    prompt = second_prompt(first, answer.sequences, second_turn(9))
    settings = {**FIXED, **WITH_LOGITS, "num_visual_tokens": m}
    continued = model.generate(
        **prompt, **settings, pixel_values=new_pixels, **{CACHE_NAME: copy.deepcopy(answer[CACHE_NAME])}
    )
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in prompt.items()}
        pixels = first["pixel_values"][2 * row : 2 * row + 2]
        counts = torch.tensor([m, m])
        if row == 0:
            alone["input_ids"] = second_prompt(first, answer.sequences, second_turn(m))["input_ids"][:1]
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            pixels, counts = torch.cat([pixels, new_pixels]), torch.tensor([m, m, m])
        scratch = model.generate(**alone, **FIXED, **WITH_LOGITS, pixel_values=pixels, visual_token_counts=counts)
        assert continued.sequences[row, -6:].tolist() == scratch.sequences[0, -6:].tolist()
        logits = torch.stack(continued.logits)[:, row]
        torch.testing.assert_close(logits, torch.stack(scratch.logits)[:, 0], atol=1e-4, rtol=0)


def test_first_image_in_the_second_turn(model, processor, image):
    first = processor(text="hello there", return_tensors="pt")
    with_image = processor(images=image, text="<image>", num_visual_tokens=5, return_tensors="pt")
    pixels = images_of(with_image)
    answer = model.generate(**first, **FIXED, **WITH_LOGITS)
    prompt = second_prompt(first, answer.sequences, tokens(processor, "USER: <image> and now?", 1, 5))
    scratch = model.generate(**prompt, **pixels, **FIXED, **WITH_LOGITS)
    continued = model.generate(**prompt, **pixels, **FIXED, **WITH_LOGITS, **{CACHE_NAME: answer[CACHE_NAME]})
    assert_same_turn(continued, scratch)


def test_second_turn_of_padded_rows(model, processor):
    """Rows of different lengths and numbers of images, left-padded, go on from one cache."""
    first = prepare(m=4)
    images = images_of(first)
    answer = model.generate(**first, **FIXED, **WITH_LOGITS)
    prompt = second_prompt(first, answer.sequences, tokens(processor, "USER: and now?", len(ROWS)))
    scratch = model.generate(**prompt, **images, **FIXED, **WITH_LOGITS)
    continued = model.generate(**prompt, **FIXED, **WITH_LOGITS, **{CACHE_NAME: answer[CACHE_NAME]})
    assert_same_turn(continued, scratch)


@pytest.mark.every_version
def test_cached_images_keep_their_visual_tokens(model, processor):
    """Sequences begin with the caller's own ids, the cache with fewer tokens: the whole conversation does not fit it."""
    first = prepare([2], m=NUM_QUERY_TOKENS)
    few = prepare([2], m=4)
    scratch_answer = model.generate(**few, **FIXED)
    turn = tokens(processor, "USER: and now?", 1)
    prompt = second_prompt(few, scratch_answer, turn)
    images = images_of(few)
    scratch = model.generate(**prompt, **images, **FIXED, **WITH_LOGITS)

    answer = model.generate(**first, **FIXED, **WITH_LOGITS, num_visual_tokens=4)
    assert answer.sequences[:, -6:].tolist() == scratch_answer[:, -6:].tolist()
    cache = answer[CACHE_NAME]
    whole = second_prompt(first, answer.sequences, turn)
    for settings in ({}, {"num_visual_tokens": 4}):
        with pytest.raises(ValueError, match="those of cached images cannot be changed"):
            model.generate(**whole, **settings, **{CACHE_NAME: cache}, max_new_tokens=2)
    new = torch.cat([answer.sequences[:, -1:], turn], dim=1)
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
    continued = model.generate(new, attention_mask=mask, **FIXED, **WITH_LOGITS, **{CACHE_NAME: cache})
    assert_same_turn(continued, scratch)


def test_images_that_the_cache_holds_are_not_passed_again(model, processor):
    first = prepare([0, 2], m=5)
    images = images_of(first)
    answer = model.generate(**first, **FIXED, **WITH_LOGITS)
    prompt = second_prompt(first, answer.sequences, tokens(processor, "USER: and now?", 2))
    for passed in (images, {"pixel_values": images["pixel_values"]}, images | {"num_visual_tokens": 5}):
        with pytest.raises(ValueError, match="do not match"):
            model.generate(**prompt, **passed, max_new_tokens=2, **{CACHE_NAME: answer[CACHE_NAME]})


@pytest.mark.parametrize("m", [None, 4])
def test_a_cache_that_holds_the_prompt_is_refused(model, m):
    """Its positions would be taken for those of the prompt, and the answer would be wrong."""
    inputs = prepare([2], m=5)
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=3)
    with pytest.raises(ValueError, match="nothing to go on with"):
        model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=3, num_visual_tokens=m)


@pytest.mark.parametrize(
    "wrong", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": make_model()}, {"use_cache": False}], ids=list
)
def test_what_transformers_gets_wrong_with_a_filled_cache_is_refused(model, wrong):
    first = model.generate(**prepare([3], m=5), max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=f"cannot go on from a cache with {next(iter(wrong))}"):
        model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=3, **wrong)


# Beams, samples, the vision tower -------------------------------------------------------------------------------------


@pytest.mark.every_version
@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("num_beams, num_return_sequences", [(1, 1), (3, 1), (3, 2)])
def test_rows_of_a_batch_are_answered_as_each_alone(model, m, num_beams, num_return_sequences):
    settings = {"max_new_tokens": 8, "do_sample": False, "num_visual_tokens": m}
    settings |= {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    inputs = prepare(m=7)
    together = new_tokens(model.generate(**inputs, **settings), inputs)
    alone = []
    for row in range(len(ROWS)):
        inputs = prepare([row], m=7)
        alone += new_tokens(model.generate(**inputs, **settings), inputs)
    assert together == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_each_image_of_a_batch_may_have_its_own_m(model):
    counts = [1, 16, 3, 7, 2]
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    inputs = prepare(m=5)
    together = new_tokens(model.generate(**inputs, **settings, num_visual_tokens=counts), inputs)
    alone = []
    for row, images in enumerate(IMAGES_OF_ROWS):
        inputs = prepare([row], m=[counts[i] for i in images] or None)
        alone += new_tokens(model.generate(**inputs, **settings), inputs)
    assert together == alone


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
def test_samples_belong_to_their_own_row_and_images(model, m):
    """Every returned sample has the probabilities of its own row: checked by a forward pass of that row alone."""
    inputs = prepare(m=7)
    torch.manual_seed(0)
    outputs = model.generate(
        **inputs,
        num_visual_tokens=m,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        min_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, prompt_length = torch.stack(outputs.logits, dim=1), inputs["input_ids"].shape[1]
    assert outputs.sequences.shape == (3 * len(ROWS), prompt_length + 5) and logits.shape[:2] == (12, 5)
    for i, (sequence, sampled) in enumerate(zip(outputs.sequences, logits)):
        row = i // 3
        alone = prepare([row], m=7)
        assert sequence[:prompt_length].tolist() == inputs["input_ids"][row].tolist()
        alone["input_ids"] = torch.cat([alone["input_ids"], sequence[None, prompt_length:]], dim=1)
        del alone["attention_mask"]
        with torch.no_grad():
            expected = model(**alone, num_visual_tokens=m).logits[0, -6:-1]
        torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)
    assert len({tuple(sequence.tolist()) for sequence in outputs.sequences}) > len(ROWS)


@pytest.mark.parametrize("m", [None, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "beams", "samples", "sampled_beams", "static", "no_cache"],
)
def test_vision_tower_runs_once_per_image(model, settings, m):
    inputs, counter = prepare(m=7), CountVision(model)
    model.generate(**inputs, **settings, num_visual_tokens=m, max_new_tokens=4, min_new_tokens=4)
    assert (counter.calls, counter.images) == (1, 5)


# A chat never contains a generated <image> -----------------------------------------------------------------------------


def favour_image_token(model):
    """Rig the head so that `<image>` always wins."""
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(3), 1e4))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
        {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=6)},
    ],
    ids=["greedy", "samples", "beams", "own_generation_config"],
)
@pytest.mark.parametrize("m", [None, 4])
def test_image_token_is_never_generated(model, settings, m):
    favour_image_token(model)
    inputs = prepare()
    answers = new_tokens(model.generate(**inputs, **settings, max_new_tokens=6, num_visual_tokens=m), inputs)
    assert all(IMAGE_TOKEN_ID not in answer for answer in answers)
    assert any(answers)
    settings = {"do_sample": False, "suppress_tokens": None, "max_new_tokens": 6}
    model.generation_config.suppress_tokens = []
    rigged = new_tokens(model.generate(**inputs, **settings), inputs)
    assert rigged == [[IMAGE_TOKEN_ID] * 6] * len(ROWS)  # so the head would have chosen it


@pytest.mark.every_version
@pytest.mark.parametrize("file", ["as saved", "missing", "of the language model"])
def test_image_token_is_never_generated_by_a_loaded_model(checkpoint, tmp_path, file):
    """Also where the generation config's file is missing, or came from the language model that a model was made of."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    generation_config = tmp_path / "generation_config.json"
    if file == "missing":
        generation_config.unlink()
    elif file == "of the language model":
        generation_config.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    model = favour_image_token(MQTLlavaForConditionalGeneration.from_pretrained(tmp_path))
    inputs = prepare()
    answers = new_tokens(model.generate(**inputs, do_sample=False, max_new_tokens=6, num_visual_tokens=4), inputs)
    assert all(IMAGE_TOKEN_ID not in answer for answer in answers)


# What generate returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_return_dict_in_generate(model, m, num_beams):
    inputs = prepare(m=7)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    sequences = model.generate(**inputs, **settings, num_visual_tokens=m)
    outputs = model.generate(
        **inputs,
        **settings,
        num_visual_tokens=m,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert outputs.sequences.tolist() == sequences.tolist()
    prompt_length = inputs["input_ids"].shape[1]
    assert outputs.sequences[:, :prompt_length].tolist() == inputs["input_ids"].tolist()
    assert outputs.sequences.shape == (len(ROWS), prompt_length + 5)

    longest = prepare(m=m or 7)["input_ids"].shape[1]  # what the model saw
    assert outputs.hidden_states[0][-1].shape == (len(ROWS) * num_beams, longest, 32)
    # Transition scores are read off the end of the sequences, which the caller's own prompt must not disturb
    scores = model.compute_transition_scores(
        outputs.sequences, outputs.scores, getattr(outputs, "beam_indices", None), normalize_logits=num_beams == 1
    )
    assert scores.shape == (len(ROWS), 5) and scores.isfinite().all()
    if num_beams > 1:
        torch.testing.assert_close(scores.sum(1) / 5, outputs.sequences_scores, atol=1e-4, rtol=0)


def test_ways_to_pass_the_prompt(model):
    """As the first argument, without mask or counts, or as embeddings, whose answer comes without the prompt."""
    inputs = prepare([2], m=7)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    pixels = {"pixel_values": inputs["pixel_values"]}
    expected = model.generate(**inputs, **settings).tolist()
    assert model.generate(inputs["input_ids"], **pixels, **settings).tolist() == expected
    assert model.generate(inputs["input_ids"], **pixels, **settings, num_visual_tokens=7).tolist() == expected
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    answer = model.generate(inputs_embeds=embeddings, **pixels, **settings)
    assert answer.tolist() == [expected[0][-5:]]
    features = model.get_image_features(**pixels, visual_token_counts=7)
    ready = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}}
    assert model.generate(**ready, **settings).tolist() == expected


# Where m is said, and who sees the prompt ------------------------------------------------------------------------------


def computed(model, call):
    """The number of queries that ran, once for each call of the query transformer."""
    counts = []
    hook = model.model.query_transformer.register_forward_hook(
        lambda module, args, output: counts.append(output.shape[1])
    )
    call()
    hook.remove()
    return counts


def test_generation_config_says_m(model, tmp_path):
    """The call goes before its generation config, that before the model's, that before the placeholders."""
    inputs, options = prepare([2], m=9), {"max_new_tokens": 3, "do_sample": False}
    own = GenerationConfig(num_visual_tokens=4, **options)
    expected = {m: model.generate(**inputs, **options, num_visual_tokens=m).tolist() for m in (2, 4, 6, 9)}
    assert model.generate(**inputs, generation_config=own).tolist() == expected[4]
    assert model.generate(inputs["input_ids"], own, pixel_values=inputs["pixel_values"]).tolist() == expected[4]
    assert computed(model, lambda: model.generate(**inputs, generation_config=own, num_visual_tokens=2)) == [2]

    assert computed(model, lambda: model.generate(**inputs, **options)) == [9]
    model.generation_config.num_visual_tokens = 6
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["num_visual_tokens"] == 6
    for carrier in (model, MQTLlavaForConditionalGeneration.from_pretrained(tmp_path)):
        assert carrier.generate(**inputs, **options).tolist() == expected[6]
        assert computed(carrier, lambda: carrier.generate(**inputs, generation_config=own)) == [4]
        assert computed(carrier, lambda: carrier.generate(**inputs, **options, num_visual_tokens=9)) == [9]
        carrier.generate(**prepare([1]), **options)  # a text alone has no m
    model.generation_config.num_visual_tokens = NUM_QUERY_TOKENS + 1
    with pytest.raises(ValueError, match="from 1 to 16"):
        model.generate(**inputs, **options)


@pytest.mark.parametrize("m", [None, 7, 2, NUM_QUERY_TOKENS])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_callbacks_see_rows_that_begin_with_the_callers_prompt(model, m, num_beams):
    inputs = prepare(m=7)
    length = inputs["input_ids"].shape[1]
    seen = {"criterion": [], "processor": [], "prefix": []}

    def assert_own(input_ids):
        prompts = inputs["input_ids"].repeat_interleave(len(input_ids) // len(ROWS), dim=0)
        assert input_ids[:, :length].tolist() == prompts.tolist()

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert_own(input_ids)
            seen["criterion"].append(input_ids.shape[1] - length)
            return torch.full((len(input_ids),), input_ids.shape[1] - length >= 3)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert_own(input_ids)
            seen["processor"].append(input_ids.shape[1] - length)
            return scores

    def allowed(row, ids):
        assert ids[:length].tolist() == inputs["input_ids"][row].tolist()
        seen["prefix"].append(len(ids) - length)
        return list(range(4, 200))

    sequences = model.generate(
        **inputs,
        num_visual_tokens=m,
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=8,
        stopping_criteria=[Criterion()],
        logits_processor=[Processor()],
        prefix_allowed_tokens_fn=allowed,
    )
    assert sequences.shape[1] == length + 3
    assert seen["criterion"] == [1, 2, 3] and seen["processor"] == [0, 1, 2] and set(seen["prefix"]) == {0, 1, 2}


def test_placeholders_without_images_are_refused(model):
    inputs = prepare([2], m=7)
    del inputs["pixel_values"]
    inputs.pop("visual_token_counts", None)
    for m in (None, 4):
        with pytest.raises(ValueError, match="no images stand behind"):
            model.generate(**inputs, num_visual_tokens=m, max_new_tokens=2)
    with pytest.raises(ValueError, match="no images stand behind"):
        model(**inputs, num_visual_tokens=4)
    model(**inputs)  # legal: transformers' own tests do it
    with pytest.raises(ValueError, match="`num_visual_token` is not taken here"):
        model(**prepare([2]), num_visual_token=4)


# Pipeline -------------------------------------------------------------------------------------------------------------


def ask(image, text="What is it?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def expected_answer(model, processor, messages, m, **kwargs):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )
    sequences = model.generate(**inputs, num_visual_tokens=m, max_new_tokens=8, do_sample=False)
    return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.every_version
@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
def test_pipeline_with_chat_messages(model, processor, image, m):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": m}
    messages = ask(image)
    (result,) = pipe(text=messages, generate_kwargs=settings, return_full_text=False)
    assert result["generated_text"] == expected_answer(model, processor, messages, m)
    (result,) = pipe(messages, generate_kwargs=settings)
    assert result["generated_text"][0]["role"] == "user"
    assert result["generated_text"][1] == {
        "role": "assistant",
        "content": expected_answer(model, processor, messages, m),
    }


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
def test_pipeline_with_text_and_image(model, processor, image, m):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": m}
    text = "USER: <image>\nWhat? ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    sequences = model.generate(**inputs, **settings)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    (result,) = pipe(images=image, text=text, generate_kwargs=settings, return_full_text=False)
    assert result["generated_text"] == answer
    (result,) = pipe(images=image, text=text, generate_kwargs=settings)
    assert result["generated_text"] == text + answer


def test_pipeline_with_num_visual_tokens_of_the_processor(model, processor, image):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    messages, settings = ask(image), {"do_sample": False, "max_new_tokens": 8}
    (result,) = pipe(
        text=messages,
        generate_kwargs=settings,
        return_full_text=False,
        processor_kwargs={"num_visual_tokens": 2},
    )
    assert result["generated_text"] == expected_answer(model, processor, messages, 2)


def test_pipeline_with_several_chats_and_images(model, processor):
    first, second, third = make_images(3)
    chats = [ask(first), ask(second, "Why?")]
    chats[1][0]["content"].append({"type": "image", "image": third})
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": 4}
    results = pipe(text=chats, generate_kwargs=settings, return_full_text=False)
    assert [result[0]["generated_text"] for result in results] == [
        expected_answer(model, processor, chat, 4) for chat in chats
    ]


def test_pipeline_goes_on_with_an_assistant_message(model, processor, image):
    messages = [*ask(image), {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    inputs = processor.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert processor.decode(inputs["input_ids"][0]).endswith("ASSISTANT: It is")
    sequences = model.generate(**inputs, num_visual_tokens=4, max_new_tokens=8, do_sample=False)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": 4}
    (result,) = pipe(text=messages, generate_kwargs=settings)
    assert result["generated_text"][-1]["content"][0]["text"] == "It is" + answer


def test_pipeline_from_a_folder(checkpoint, image):
    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    assert isinstance(pipe.model, MQTLlavaForConditionalGeneration)
    messages, settings = ask(image), {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": 4}
    (result,) = pipe(text=messages, generate_kwargs=settings, return_full_text=False)
    assert result["generated_text"] == expected_answer(pipe.model, pipe.processor, messages, 4)


# Assisted decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("row", [0, 2, 3])
def test_assisted_decoding(model, m, row):
    """A draft model changes nothing about the answer, be it another model or one just like this."""
    inputs = prepare([row], m=7)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_visual_tokens": m}
    expected = model.generate(**inputs, **settings)
    torch.manual_seed(7)
    other, twin, counter = type(model)(model.config).eval(), make_model(), CountVision(model)
    drafts = []
    for i, draft_model in enumerate((other, twin), start=1):
        draft_model.model.language_model.register_forward_pre_hook(lambda *args: drafts.append(1))
        assert model.generate(**inputs, **settings, assistant_model=draft_model).tolist() == expected.tolist()
        assert len(drafts) >= i and (counter.calls, counter.images) == (i, i * len(IMAGES_OF_ROWS[row]))


@pytest.mark.parametrize("m", [None, 4])
def test_prompt_lookup_decoding(model, m):
    inputs = prepare([2], m=7)
    settings = {"max_new_tokens": 10, "do_sample": False, "num_visual_tokens": m}
    expected = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, prompt_lookup_num_tokens=3).tolist() == expected.tolist()


# Gradient checkpointing -----------------------------------------------------------------------------------------------


def loss_and_gradients(model, m):
    inputs = prepare(m=7)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE_TOKEN_ID, -100)
    calls = []
    for layers in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    loss = model(**inputs, labels=labels, num_visual_tokens=m).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, len(calls)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # the new name is not in 5.19
@pytest.mark.parametrize("m", [1, NUM_QUERY_TOKENS])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["all_train", "only_query_transformer_trains"])
def test_gradient_checkpointing(m, use_reentrant, frozen):
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if frozen:
            model.requires_grad_(False)
            model.model.query_transformer.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        results.append(loss_and_gradients(model, m))
    (loss, gradients, calls), (checkpointed_loss, checkpointed_gradients, checkpointed_calls) = results
    torch.testing.assert_close(checkpointed_loss, loss, atol=1e-6, rtol=0)
    assert checkpointed_calls > calls  # layers did run again in the backward pass
    assert gradients.keys() == checkpointed_gradients.keys()
    assert {"model.query_transformer.query", "model.query_transformer.v_proj.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=["beams", "more"]
)
def test_features_of_the_caller_stay_as_they_are(model, settings):
    inputs = prepare([0, 2, 3], m=5)
    options = {"max_new_tokens": 4, "do_sample": False, **settings}
    expected = model.generate(**inputs, **options).tolist()
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"), inputs["visual_token_counts"])
    for _ in range(2):
        assert model.generate(**inputs, **options, mm_encoder_outputs={"image": features}).tolist() == expected
        assert [len(tokens) for tokens in features.pooler_output] == [5] * 5
        assert features.last_hidden_state is not None


PEFT_METHODS = {
    "dora": LoraConfig(target_modules=r".*language_model.*q_proj", use_dora=True, init_lora_weights=False),
    "vera": VeraConfig(target_modules=r".*language_model.*q_proj", init_weights=False),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls the cache by its old name
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_methods_of_peft(model, method):
    """They train, and answer at the m of the prompt; told otherwise, the same as where the prompt has that m."""
    tuned = get_peft_model(model, PEFT_METHODS[method])
    few, many = prepare([2, 3], m=3), prepare([2, 3], m=9)
    labels = few["input_ids"].masked_fill(few["input_ids"] <= IMAGE_TOKEN_ID, -100)
    tuned(**few, labels=labels).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    if method == "prompt tuning":  # PEFT makes embeddings of the prompt
        with pytest.raises(ValueError, match="`num_visual_tokens` needs `input_ids`"):
            tuned(**many, num_visual_tokens=3)
    else:
        with torch.no_grad():
            logits = tuned(**many, num_visual_tokens=3).logits
            torch.testing.assert_close(logits, tuned(**few).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = new_tokens(tuned.generate(**few, **options), few)
    assert new_tokens(tuned.generate(**many, **options, num_visual_tokens=3), many) == expected


def test_generate_in_a_callback_of_trainer(model, tmp_path):
    """As samples are logged while a model trains, with checkpointing: the answers are those of the same weights afterwards."""
    inputs, options = prepare([2, 3], m=7), {"max_new_tokens": 4, "do_sample": False, "num_visual_tokens": 3}
    answers = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            was_training = model.training
            model.eval()
            answers.append(model.generate(**inputs, **options).tolist())
            model.train(was_training)

    batch = {name: inputs[name] for name in inputs}
    batch["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE_TOKEN_ID, -100)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.05, use_cpu=True, report_to=[], save_strategy="no", bf16=False
    )
    trainer = Trainer(model, arguments, lambda rows: batch, train_dataset=[0] * 8, callbacks=[Ask()])
    trainer.train()
    assert len(answers) == 2 and answers[0] != answers[1]
    assert model.eval().generate(**inputs, **options).tolist() == answers[1]


# torch.compile and torch.export ---------------------------------------------------------------------------------------


@pytest.fixture
def compile_model(request):
    """`torch.compile` with `fullgraph`, which raises where tracing breaks."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model, backend: torch.compile(model, fullgraph=True, backend=backend)
    torch.compiler.reset()


def compilable(m, with_counts):
    """Padded rows with one, two or no image. Without counts runs of placeholders are images: none are adjacent then."""
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


@pytest.mark.parametrize("with_counts", [True, False], ids=["counts", "no_counts"])
def test_forward_is_one_graph(model, compile_model, with_counts):
    """The traced graph is run as it is here, not compiled any further."""
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


@pytest.mark.parametrize("m", [None, 3])
def test_generate_with_a_compiled_forward(model, compile_model, m):
    inputs, settings = prepare(m=7), {"max_new_tokens": 6, "do_sample": False, "num_visual_tokens": m}
    expected = model.generate(**inputs, **settings)
    model.forward = compile_model(model.forward, "eager")
    assert model.generate(**inputs, **settings, cache_implementation="static").tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_one_graph_decodes_prompts_of_any_length_with_any_m(model, processor, compile_model, image):
    """With a static cache of the caller's, which is reset for every prompt, nothing is compiled again."""
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
    """README's way to compile the prefill too: after three prompts nothing is compiled again, and answers are the same."""
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
    """An exported program answers for other images and other counts of the same shapes, too."""
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
