"""`generate` at any m: streaming, batches, beams, samples, callbacks, drafts, and ways to pass the prompt and m."""

import json
from threading import Thread

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.modeling.common import (
    IMAGE_TOKEN_ID,
    IMAGES_OF_ROWS,
    NUM_VISUAL_TOKENS,
    ROWS,
    CountVision,
    new_tokens,
    prepare,
)
from tests.small_model import NUM_QUERY_TOKENS, make_model


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


# Batches, beams, samples ----------------------------------------------------------------------------------------------


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
    """The logits of each sample are those of a forward pass of its own row alone."""
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


# `<image>` is never generated -----------------------------------------------------------------------------------------


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
    """Also where generation_config.json is missing, or is that of the language model that the model was built from."""
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


# What `generate` returns ----------------------------------------------------------------------------------------------


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


# Ways to pass the prompt, the images and m ----------------------------------------------------------------------------


def test_ways_to_pass_the_prompt(model):
    """As the first argument, without mask or counts, with ready features, or as embeddings: then no prompt is returned."""
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


def test_placeholders_without_images_are_refused(model):
    inputs = prepare([2], m=7)
    del inputs["pixel_values"]
    inputs.pop("visual_token_counts", None)
    for m in (None, 4):
        with pytest.raises(ValueError, match="there are no images"):
            model.generate(**inputs, num_visual_tokens=m, max_new_tokens=2)
    with pytest.raises(ValueError, match="there are no images"):
        model(**inputs, num_visual_tokens=4)
    model(**inputs)  # legal: transformers' own tests do it
    with pytest.raises(ValueError, match="`num_visual_token` is not accepted here"):
        model(**prepare([2]), num_visual_token=4)


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
    """The call overrides its generation config, which overrides the model's, which overrides the placeholders."""
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


# Callbacks ------------------------------------------------------------------------------------------------------------


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


# Assisted decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [None, *NUM_VISUAL_TOKENS])
@pytest.mark.parametrize("row", [0, 2, 3])
def test_assisted_decoding(model, m, row):
    """A draft model does not change the answer, whether its weights are different or the same."""
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
