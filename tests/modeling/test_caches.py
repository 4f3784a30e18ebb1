"""Caches of keys and values: static or dynamic, filled in chunks, and carried over to the next turn of a chat."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME
from tests.modeling.common import IMAGE_TOKEN_ID, NUM_VISUAL_TOKENS, ROWS, CountVision, images_of, prepare
from tests.small_model import NUM_QUERY_TOKENS, make_model


FIXED = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}


# Kinds of caches ------------------------------------------------------------------------------------------------------


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
    """Chunks end in the middle of an image's visual tokens."""
    inputs = prepare(m=7)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_visual_tokens": m, "num_beams": num_beams}
    expected = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, prefill_chunk_size=5).tolist() == expected.tolist()


@pytest.mark.skipif(CACHE_NAME != "cache", reason="this transformers has one name for the cache")
def test_old_name_of_the_cache(model):
    """Deprecated since transformers 5.24, it still works, as it does for transformers' own models."""
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


# The next turn of a chat ----------------------------------------------------------------------------------------------


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
    """Only the new image is passed and encoded, and only its visual tokens follow `num_visual_tokens`."""
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
    """The new parts of the rows shrink by different amounts: padding goes between the cached part and the new one."""
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
    """Sequences begin with the caller's own ids but the cache holds fewer tokens, so the two do not match."""
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
        with pytest.raises(ValueError, match="cached images cannot be changed"):
            model.generate(**whole, **settings, **{CACHE_NAME: cache}, max_new_tokens=2)
    new = torch.cat([answer.sequences[:, -1:], turn], dim=1)
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
    continued = model.generate(new, attention_mask=mask, **FIXED, **WITH_LOGITS, **{CACHE_NAME: cache})
    assert_same_turn(continued, scratch)


# What is refused ------------------------------------------------------------------------------------------------------


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
    """Its positions would be mistaken for those of the prompt, and the answer would be wrong."""
    inputs = prepare([2], m=5)
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=3)
    with pytest.raises(ValueError, match="nothing new to process"):
        model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=3, num_visual_tokens=m)


@pytest.mark.parametrize(
    "wrong", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": make_model()}, {"use_cache": False}], ids=list
)
def test_what_transformers_gets_wrong_with_a_filled_cache_is_refused(model, wrong):
    first = model.generate(**prepare([3], m=5), max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=f"cannot continue from a cache with {next(iter(wrong))}"):
        model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=3, **wrong)
