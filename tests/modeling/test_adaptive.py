"""`generate(num_visual_tokens="auto")`: as many visual tokens as the question needs."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    MistralConfig,
    Qwen2Config,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mqt_llava import TINY_CHECKPOINT, VisualTokenSchedule
from mqt_llava.cost import CostModel
from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME
from tests.modeling.common import ROWS, CountVision, prepare
from tests.small_model import NUM_QUERY_TOKENS, SIGLIP, make_images, make_model, make_processor


ROOT = Path(__file__).parents[2]
STAGES = [2, 5, NUM_QUERY_TOKENS]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def make_decided_model(**overrides):
    """A random model that is surer of some tokens than of others."""
    model = make_model(**overrides)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def decided():
    return make_decided_model()


def trim(sequences, prompt_length, ends=(2,)):
    """The answers up to `</s>`, and without what pads them."""
    answers = sequences[:, prompt_length:].tolist()
    ended = [next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer)) for answer in answers]
    return [without_padding(answer[:end]) for answer, end in zip(answers, ended)]


def without_padding(answer):
    while answer and answer[-1] == 0:
        answer = answer[:-1]
    return answer


def answers_at(model, inputs, m, **options):
    sequences = model.generate(**inputs, **(GREEDY | options), num_visual_tokens=m)
    return trim(sequences, inputs["input_ids"].shape[1])


def scratch_confidence(model, inputs, m, window=32, **options):
    """By the tokens' probabilities of plain `generate` with m visual tokens, row by row."""
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True} | options
    outputs = model.generate(**inputs, **options, num_visual_tokens=m)
    answers = trim(outputs.sequences, inputs["input_ids"].shape[1])
    log_probs = [torch.stack(outputs.scores, 1)[row].log_softmax(-1) for row in range(len(answers))]
    chosen = [scores[range(len(a)), a] for scores, a in zip(log_probs, answers)]
    return [min(float(c[max(0, t - window + 1) : t + 1].sum()) for t in range(len(c))) for c in chosen]


def check(model, inputs, schedule, **options):
    """Every row answers as `generate` does with the m of its stage, at the first stage whose confidence is enough."""
    outputs = model.generate(**inputs, **(GREEDY | options), num_visual_tokens=schedule, return_dict_in_generate=True)
    prompt = inputs["input_ids"]
    assert outputs.sequences[:, : prompt.shape[1]].tolist() == prompt.tolist()
    answers = trim(outputs.sequences, prompt.shape[1])
    has_image = (prompt == 3).any(-1).tolist()
    fixed = [answers_at(model, inputs, m, **options) for m in schedule.num_visual_tokens]
    sure = [scratch_confidence(model, inputs, m, schedule.window, **options) for m in schedule.num_visual_tokens]
    for row, stage in enumerate(outputs.stages.tolist()):
        assert answers[row] == fixed[stage][row]
        assert outputs.confidences[row].log().item() == pytest.approx(sure[stage][row], abs=1e-3)
        thresholds = [*schedule.thresholds, 0.0] if has_image[row] else [0.0]
        expected = next(i for i, t in enumerate(thresholds) if sure[i][row] >= torch.tensor(t).log())
        assert stage == expected
    per_row = [schedule.num_visual_tokens[stage] for stage in outputs.stages.tolist()]
    images = [2, 0, 2, 1] if len(prompt) == len(ROWS) else None
    if images:
        assert outputs.visual_token_counts.tolist() == [m for m, n in zip(per_row, images) for _ in range(n)]
    return outputs


def between(model, inputs, schedule_stages=STAGES, window=32):
    """Thresholds between the confidences of the rows, so that some stop at each stage."""
    thresholds = []
    for m in schedule_stages[:-1]:
        sure = sorted(scratch_confidence(model, inputs, m, window))
        thresholds.append(float(torch.tensor((sure[1] + sure[2]) / 2).exp()))
    return VisualTokenSchedule(schedule_stages, thresholds, window)


@pytest.mark.every_version
def test_each_row_stops_where_it_is_sure_and_answers_as_there(decided):
    inputs = prepare()
    outputs = check(decided, inputs, between(decided, inputs))
    assert len(outputs.stages.unique()) > 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_schedule(decided, data):
    stages = sorted(data.draw(st.sets(st.integers(1, NUM_QUERY_TOKENS), min_size=1, max_size=4)))
    rows = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=3))
    inputs = prepare(rows, m=data.draw(st.sampled_from([1, 7, None])))
    window = data.draw(st.sampled_from([1, 2, 32]))
    thresholds = []
    for m in stages[:-1]:  # halfway between two confidences, so that rounding decides nothing
        sure = [0.0, *sorted(map(float, torch.tensor(scratch_confidence(decided, inputs, m, window)).exp())), 1.0]
        gaps = [(a + b) / 2 for a, b in pairwise(sure) if b - a > 1e-4]
        thresholds.append(data.draw(st.sampled_from(gaps)))
    check(decided, inputs, VisualTokenSchedule(stages, thresholds, window))


@pytest.mark.parametrize("name", ["siglip and qwen2", "sdpa off", "bfloat16"])
def test_other_models(name):
    overrides = {}
    if name == "siglip and qwen2":
        sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
        overrides = SIGLIP | {"text_config": Qwen2Config(**sizes, eos_token_id=2, initializer_range=0.2)}
    model = make_decided_model(**overrides)
    if name == "sdpa off":
        model.set_attn_implementation("eager")
    inputs = prepare()
    if name == "bfloat16":  # rounding may flip a token: it runs, and stops at the last stage where nothing is sure
        model = model.bfloat16()
        schedule = VisualTokenSchedule(STAGES, [1.0, 1.0])
        outputs = model.generate(**inputs, **GREEDY, num_visual_tokens=schedule, return_dict_in_generate=True)
        assert outputs.stages.tolist() == [2, 0, 2, 2]
    else:
        check(model, inputs, between(model, inputs))


def test_history_before_the_image_and_padding(decided):
    processor, image = make_processor(), make_images(1)[0]
    texts = [
        "USER: hello ASSISTANT: yes</s>USER: <image> what? ASSISTANT:",
        "<image>?",
        "a system prompt. <image> and",
    ]
    inputs = processor(images=[image] * 3, text=texts, padding=True, return_tensors="pt")
    check(decided, inputs, between(decided, inputs))


def test_features_of_the_caller(decided):
    inputs = prepare()
    schedule = between(decided, inputs)
    expected = decided.generate(**inputs, **GREEDY, num_visual_tokens=schedule)
    pixels = inputs.pop("pixel_values")
    features = decided.get_image_features(pixels, return_dict=True)
    sequences = decided.generate(
        **inputs, **GREEDY, mm_encoder_outputs={"image": features}, num_visual_tokens=schedule
    )
    assert sequences.tolist() == expected.tolist()
    few = BaseModelOutputWithPooling(pooler_output=[tokens[:4] for tokens in features.pooler_output])
    with pytest.raises(ValueError, match=r"has \[4, 4, 4, 4, 4\] visual tokens"):
        decided.generate(**inputs, **GREEDY, mm_encoder_outputs={"image": few}, num_visual_tokens=schedule)


def test_logits_are_those_of_a_run_from_scratch(decided):
    """Behind the prompt at every stage, and behind every token of the last answer: the cached visual tokens are as good as new ones,
    and rejected drafts are not seen."""
    processor, seen = make_processor(), []
    inputs = processor(images=make_images(1), text="a text before <image> and one behind", return_tensors="pt")
    hook = decided.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    sequences = decided.generate(**inputs, **GREEDY, num_visual_tokens=VisualTokenSchedule(STAGES, [1.0, 1.0]))
    hook.remove()
    for m, logits in zip(STAGES, seen):
        scratch = decided(**inputs, num_visual_tokens=m).logits[:, -1]
        torch.testing.assert_close(logits[:, 0], scratch, atol=1e-4, rtol=0)
    steps = torch.cat(seen[3:], dim=1)
    ids = sequences[:, :-1]
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scratch = decided(**whole, num_visual_tokens=STAGES[-1]).logits[:, -steps.shape[1] :]
    assert steps.shape[1] > 3
    torch.testing.assert_close(steps, scratch, atol=1e-4, rtol=0)


# What it costs --------------------------------------------------------------------------------------------------------


class CountColumns:
    """The `(rows, columns)` that the language model is given, call by call."""

    def __init__(self, model):
        self.shapes = []
        self.handle = model.model.language_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))


def test_nothing_is_computed_twice_but_what_stands_behind_the_image():
    model = make_decided_model()
    inputs = make_processor()(images=make_images(1), text="look: <image> what?", return_tensors="pt")
    vision, columns = CountVision(model), CountColumns(model)
    model.generate(**inputs, **GREEDY, num_visual_tokens=VisualTokenSchedule(STAGES, [1.0, 1.0]))
    assert (vision.calls, vision.images) == (1, 1)
    text = inputs["input_ids"].shape[1] - NUM_QUERY_TOKENS
    # Nothing is sure enough for 1.0. The first answer is broken off after one token, which is the second one's draft; that says a
    # token more where it agrees
    assert columns.shapes[0] == (1, text + 2)
    behind = len(" what?")
    assert columns.shapes[1] == (1, 5 - 2 + behind + 1)
    assert columns.shapes[2] in [(1, 16 - 5 + behind + draft) for draft in (1, 2)]
    assert all(shape == (1, 1) for shape in columns.shapes[3:])


def test_rows_that_are_sure_leave_the_batch(decided):
    inputs = prepare()
    schedule, columns = between(decided, inputs), CountColumns(decided)
    outputs = decided.generate(**inputs, **GREEDY, num_visual_tokens=schedule, return_dict_in_generate=True)
    columns.handle.remove()
    prefills = [rows for rows, number in columns.shapes if number > 1]
    assert prefills == [sum(stage >= i for stage in outputs.stages.tolist()) for i in range(len(prefills))]


def test_a_draft_that_is_confirmed_costs_one_pass():
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT, trust_remote_code=False)
    turns = [{"role": "user", "content": "<image>\nWhat colour is the background?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    image = Image.open(ROOT / "examples" / "scene.png")
    inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    columns, passes = CountColumns(model), []
    for schedule in (1, 64, VisualTokenSchedule([1, 64], [1.0])):
        columns.shapes.clear()
        sequences = model.generate(**inputs, num_visual_tokens=schedule, max_new_tokens=20, do_sample=False)
        passes.append((len(columns.shapes), sequences.tolist()))
    assert passes[0][1] == passes[1][1] == passes[2][1]
    assert passes[2][0] <= passes[1][0] + 1


# What it takes --------------------------------------------------------------------------------------------------------


class Chunks(TextStreamer):
    """What is streamed, chunk by chunk, without the prompt."""

    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_nothing_is_streamed_that_may_be_taken_back(decided, threshold):
    inputs, streamer = prepare([3]), Chunks()
    schedule = VisualTokenSchedule(STAGES, [threshold] * 2)
    sequences = decided.generate(**inputs, **GREEDY, num_visual_tokens=schedule, streamer=streamer)
    _, *chunks = streamer.chunks
    answer = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert [token for chunk in chunks for token in chunk] == answer and streamer.ended
    # The first stage's answer comes as a whole, the last stage's as it is generated
    assert (len(chunks) == 1) == (threshold == 0.0)


class Ban(LogitsProcessor):
    """Allows only odd tokens behind even ones, and the reverse, in the row that it is made for."""

    def __init__(self, row):
        self.row, self.seen = row, []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[:, :3].tolist())
        odd = torch.arange(scores.shape[1]) % 2
        scores = scores.clone()
        scores[self.row, odd == input_ids[self.row, -1] % 2] = -torch.inf
        return scores


class StopBehind(StoppingCriteria):
    def __init__(self, prompt_length, number):
        self.length = prompt_length + number

    def __call__(self, input_ids, scores, **kwargs):
        row = torch.arange(len(input_ids))
        return (input_ids.shape[1] >= self.length) & (row % 2 == 0)


OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 4},
    "several ends": {"eos_token_id": [2, *range(100, 160)]},
    "one token": {"max_new_tokens": 1},
    "a bad word": {"bad_words_ids": [[i] for i in range(40, 100)]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_greedy_decoding(decided, option):
    inputs = prepare()
    schedule = between(decided, inputs)
    options = GREEDY | OPTIONS[option]
    outputs = decided.generate(**inputs, **options, num_visual_tokens=schedule, return_dict_in_generate=True)
    for row, stage in enumerate(outputs.stages.tolist()):
        fixed = decided.generate(**inputs, **options, num_visual_tokens=STAGES[stage])
        length = inputs["input_ids"].shape[1]
        ends = OPTIONS[option].get("eos_token_id", [2])
        assert trim(outputs.sequences, length, ends)[row] == trim(fixed, length, ends)[row]


def test_callbacks_of_the_caller_hold_for_drafts_too(decided):
    inputs = prepare()
    prompt_length = inputs["input_ids"].shape[1]

    def callbacks():
        return {
            "logits_processor": [Ban(2)],
            "stopping_criteria": [StopBehind(prompt_length, 3), MaxTimeCriteria(600)],
            "prefix_allowed_tokens_fn": lambda row, ids: list(range(2, 200)) if row == 3 else list(range(264)),
        }

    schedule = between(decided, inputs)
    given = callbacks()
    outputs = decided.generate(**inputs, **GREEDY, **given, num_visual_tokens=schedule, return_dict_in_generate=True)
    prompt = inputs["input_ids"][:, :3].tolist()
    assert all(seen == prompt for seen in given["logits_processor"][0].seen)
    for row, stage in enumerate(outputs.stages.tolist()):
        fixed = decided.generate(**inputs, **GREEDY, **callbacks(), num_visual_tokens=STAGES[stage])
        assert trim(outputs.sequences, prompt_length)[row] == trim(fixed, prompt_length)[row]


def test_budgets():
    decided, inputs = make_decided_model(), prepare([0, 3])
    decided.set_attn_implementation("eager")  # whose products the counter knows
    schedule = VisualTokenSchedule(STAGES, [1.0, 1.0])
    options = GREEDY | {"num_visual_tokens": schedule, "return_dict_in_generate": True}
    text = int(((inputs["input_ids"] != 3) & inputs["attention_mask"].bool()).sum(-1).max())
    request = {"num_text_tokens": text, "num_images": 2, "num_new_tokens": 8, "batch_size": 2}
    spent = [cost.flops for cost in CostModel(decided.config).stages(schedule, **request)]
    decided.generate(
        **inputs, **options, max_flops=1e12
    )  # makes the cost model, whose own products are not to be counted
    for number in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            outputs = decided.generate(**inputs, **options, max_flops=sum(spent[:number]))
        assert outputs.stages.tolist() == [number - 1] * 2
        assert counter.get_total_flops() <= sum(spent[:number])
    with pytest.raises(ValueError, match="The first stage, m = 2, may cost"):
        decided.generate(**inputs, **options, max_flops=1000)
    with pytest.raises(ValueError, match="need `max_new_tokens`"):
        decided.generate(**inputs, num_visual_tokens=schedule, max_flops=1e12)


def test_pipeline(decided):
    processor, image = make_processor(), make_images(1)[0]
    ask = pipeline("image-text-to-text", model=decided, processor=processor)
    schedule = VisualTokenSchedule(STAGES, [1.0, 1.0])
    texts = [
        ask(image, text="<image>what?", generate_kwargs=GREEDY | {"num_visual_tokens": m})[0]["generated_text"]
        for m in (schedule, NUM_QUERY_TOKENS)
    ]
    assert texts[0] == texts[1]


def test_under_lora(decided):
    inputs = prepare()
    model = get_peft_model(make_decided_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    schedule = between(model, inputs)
    check(model, inputs, schedule)


# Settings that travel -------------------------------------------------------------------------------------------------


ASK = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=Image.open(sys.argv[2]), text="<image>what?", return_tensors="pt")
outputs = model.generate(
    **inputs, num_visual_tokens="auto", max_new_tokens=8, do_sample=False, return_dict_in_generate=True
)
print([outputs.sequences.tolist(), outputs.stages.tolist(), outputs.visual_token_counts.tolist()])
"""


@pytest.mark.every_version
def test_auto_in_a_fresh_process_from_the_settings_of_the_checkpoint(tmp_path):
    model, processor, image = make_decided_model(), make_processor(), make_images(1)[0]
    schedule = VisualTokenSchedule(STAGES, [1.0, 1.0], calibration={"num_pictures": 100})
    model.generation_config.visual_token_schedule = schedule.to_dict()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert VisualTokenSchedule(**saved["visual_token_schedule"]) == schedule
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", ASK, str(tmp_path / "model"), str(tmp_path / "image.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    inputs = processor(images=image, text="<image>what?", return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY, num_visual_tokens=NUM_QUERY_TOKENS)
    assert json.loads(result.stdout) == [expected.tolist(), [2], [NUM_QUERY_TOKENS]]


def test_auto_may_be_the_default(decided):
    inputs = prepare()
    schedule = between(decided, inputs)
    expected = decided.generate(**inputs, **GREEDY, num_visual_tokens=schedule)
    settings = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0, suppress_tokens=[3])
    settings.num_visual_tokens, settings.visual_token_schedule = "auto", schedule.to_dict()
    assert decided.generate(**inputs, generation_config=settings).tolist() == expected.tolist()


@pytest.mark.parametrize("num_query_tokens, stages", [(1, [1]), (4, [1, 4]), (64, [2, 8, 64]), (256, [8, 32, 256])])
def test_default_schedule(num_query_tokens, stages):
    schedule = VisualTokenSchedule.default(num_query_tokens)
    assert schedule.num_visual_tokens == stages and schedule.calibration is None


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "list of positive integers"),
        (([2.5], []), "list of positive integers"),
        (([True], []), "list of positive integers"),
        ((8, []), "list of positive integers"),
        (([8, 8], [0.5]), "ascending order"),
        (([8, 2], [0.5]), "ascending order"),
        (([2, 8], [1.5]), "1 `thresholds` from 0 to 1"),
        (([2, 8], [float("nan")]), "1 `thresholds` from 0 to 1"),
        (([2, 8], [0.5, 0.5]), "1 `thresholds` from 0 to 1"),
        (([2, 8], [0.5], 0), "`window`"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisualTokenSchedule(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_visual_tokens": "Auto"}, "got 'Auto'"),
        ({"num_visual_tokens": "auto"}, "this checkpoint has none"),
        ({"num_visual_tokens": VisualTokenSchedule([2, 17], [0.5])}, "from 1 to 16"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"do_sample": True}, "do_sample=True"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({CACHE_NAME: DynamicCache()}, CACHE_NAME),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"max_length": 100}, "max_length"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
        ({"streamer": TextStreamer(None)}, "a `streamer` for several rows"),
        ({"stop_strings": "a"}, "stop_strings='a'"),
        ({"position_ids": torch.zeros(4, 60, dtype=torch.long)}, "position_ids"),
        ({"generation_config": GenerationConfig(do_sample=True)}, "do_sample=True"),
    ],
)
def test_what_has_no_meaning_over_several_passes_is_refused_before_any_work(options, message):
    model = make_model()
    vision = CountVision(model)
    options = {"num_visual_tokens": VisualTokenSchedule(STAGES, [0.5, 0.5]), "max_new_tokens": 4} | options
    with pytest.raises(ValueError, match=message):
        model.generate(**prepare(), **options)
    assert vision.calls == 0


def test_what_is_known_by_the_model_is_refused_too():
    inputs, schedule = prepare(), VisualTokenSchedule(STAGES, [0.5, 0.5])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="an adapter with virtual tokens"):
        get_peft_model(make_model(), config).generate(**inputs, num_visual_tokens=schedule, **GREEDY)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24}
    with pytest.raises(ValueError, match="needs full attention"):
        make_model(text_config=MistralConfig(**sizes)).generate(**inputs, num_visual_tokens=schedule, **GREEDY)
    with pytest.raises(ValueError, match="3 positional arguments"):
        make_model().generate(
            inputs["input_ids"], None, None, None, None, False, None, None, num_visual_tokens=schedule
        )
    training = make_model().train()
    training.generation_config.num_visual_tokens = "auto"
    with pytest.raises(ValueError, match="A model in training mode refuses this"):
        training.generate(**inputs, **GREEDY)


def test_rows_that_have_ended_are_padded_as_generate_pads_them(decided):
    inputs = prepare()
    schedule = between(decided, inputs)
    # Without `pad_token_id`
    settings = GenerationConfig(**GREEDY, eos_token_id=[144, 4, 26, 38, 107], return_dict_in_generate=True)
    length, options = inputs["input_ids"].shape[1], {"generation_config": settings}
    adaptive = decided.generate(**inputs, **options, num_visual_tokens=schedule)
    padded = 0
    for row, stage in enumerate(adaptive.stages.tolist()):
        plain = decided.generate(**inputs, **options, num_visual_tokens=STAGES[stage]).sequences[row, length:].tolist()
        answer = adaptive.sequences[row, length:].tolist()
        shorter, longer = sorted([answer, plain], key=len)
        assert longer[: len(shorter)] == shorter and set(longer[len(shorter) :]) <= {144}
        padded += any(token in (4, 26, 38, 107) for token in answer[:-1])
    assert padded


def test_a_callback_is_not_asked_behind_the_end(decided):
    """A function of a trie allows nothing there, which transformers refuses."""
    inputs = prepare([3])
    (answer,) = answers_at(decided, inputs, 16, max_new_tokens=3)
    prompt_length = inputs["input_ids"].shape[1]

    def only(row, ids):
        return [answer[len(ids) - prompt_length]] if len(ids) < prompt_length + 2 else [2] if ids[-1] != 2 else []

    options = GREEDY | {"prefix_allowed_tokens_fn": only, "num_visual_tokens": VisualTokenSchedule(STAGES, [1.0, 1.0])}
    sequences = decided.generate(**inputs, **options)
    assert sequences[0, prompt_length:].tolist() == [*answer[:2], 2]


@pytest.mark.parametrize("settings", [[2, 8], {"num_visual_tokens": [2]}, {"num_visual_tokens": [2], "threshold": 1}])
def test_bad_settings_of_a_checkpoint_are_named(settings):
    model = make_model()
    model.generation_config.visual_token_schedule = settings
    with pytest.raises(ValueError, match="visual_token_schedule"):
        model.generate(**prepare(), **GREEDY, num_visual_tokens="auto")


def test_forward_takes_no_schedule(decided):
    inputs = prepare()
    with pytest.raises(ValueError, match="got 'auto'"):
        decided(**inputs, num_visual_tokens="auto")


def test_rows_without_images_are_answered_once(decided):
    inputs = prepare([1])
    outputs = decided.generate(
        **inputs, **GREEDY, num_visual_tokens=VisualTokenSchedule(STAGES, [1.0, 1.0]), return_dict_in_generate=True
    )
    assert outputs.stages.tolist() == [0] and outputs.visual_token_counts.tolist() == []
    assert outputs.sequences.tolist() == decided.generate(**inputs, **GREEDY).tolist()
