"""A prefix that is prefilled once changes no answer."""

import pytest
import torch

from mqt_llava import PrefixCache
from mqt_llava.modeling.processing_mqt_llava import SYSTEM_PROMPT
from tests.small_model import NUM_QUERY_TOKENS, make_images


QUESTIONS = ["Why?", "What is to the left of it?", "no"]


def prepare(processor, questions, m=None, images=True):
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": "<image>\n" * images + question}], add_generation_prompt=True
        )
        for question in questions
    ]
    return processor(
        images=[[image] for image in make_images(len(texts))] if images else None,
        text=texts,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
        **({"num_visual_tokens": m} if images else {}),
    )


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS])
@pytest.mark.parametrize("m", [None, 1, NUM_QUERY_TOKENS])
def test_same_answers_and_less_work(model, processor, questions, m, images):
    inputs = prepare(processor, questions, 7, images)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_visual_tokens": m}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options)
    prefix = PrefixCache(model, processor)
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for _ in range(2):  # the cache is not used up
        lengths.clear()
        found = model.generate(**prefix(inputs), **options)
        assert found.sequences[:, -6:].tolist() == expected.sequences[:, -6:].tolist()
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
        whole = inputs["input_ids"].shape[1] + (0 if m is None or not images else m - 7)
        assert lengths[0] == whole - len(prefix)
    assert len(prefix) > 100  # the test's tokenizer makes a token of every character
    assert found.sequences.shape == expected.sequences.shape


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(model, processor, settings):
    inputs = prepare(processor, QUESTIONS, 4)
    options = {"max_new_tokens": 6, "do_sample": False, **settings}
    found = model.generate(**PrefixCache(model, processor)(inputs, settings["num_beams"]), **options)
    length = inputs["input_ids"].shape[1]
    assert found[:, length:].tolist() == model.generate(**inputs, **options)[:, length:].tolist()


@pytest.mark.parametrize("numbers, m", [([1, 2], 4), ([2, 0, 1], 1), ([1, 1], [4, 9])], ids=str)
def test_rows_that_shrink_differently(model, processor, numbers, m):
    """The cached beginning is text: re-budgeting leaves it alone, however many images each row has."""
    questions = ["<image>\n" * number + "Why?" for number in numbers]
    chats = [[{"role": "user", "content": question}] for question in questions]
    images = make_images(sum(numbers))
    rows = [[images.pop() for _ in range(number)] for number in numbers]
    inputs = processor(
        images=rows,
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        num_visual_tokens=7,
        padding=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_visual_tokens": m}
    expected = model.generate(**inputs, **options)
    assert model.generate(**PrefixCache(model, processor)(inputs), **options)[:, -6:].equal(expected[:, -6:])


def test_a_template_that_takes_parts_alone(model, processor):
    own = PrefixCache(model, processor)
    begin, end = "{% for message in messages %}{% for part in message['content'] %}", "{% endfor %}{% endfor %}"
    processor.chat_template = (
        "<s>" + SYSTEM_PROMPT + " USER: " + begin + "{{ '<image>\n' if part.type == 'image' else part.text }}" + end
    )
    assert PrefixCache(model, processor).input_ids.equal(own.input_ids)


def test_another_beginning(model, processor):
    inputs = processor(text="Once upon a time there was", return_tensors="pt")
    prefix = PrefixCache(model, processor, "Once upon")
    assert processor.decode(prefix.input_ids) == "<s>Once upon"
    options = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(**prefix(inputs), **options).tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("text", ["Something else", "Once upon"])
def test_prompts_that_do_not_begin_so_are_refused(model, processor, text):
    prefix = PrefixCache(model, processor, "Once upon")
    with pytest.raises(ValueError, match="does not begin with the 10 shared tokens"):
        prefix(processor(text=text, return_tensors="pt"))
