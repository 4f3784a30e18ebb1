"""transformers' `image-text-to-text` pipeline: chats, texts with images, and where m is passed."""

import pytest
from transformers import pipeline

from mqt_llava import MQTLlavaForConditionalGeneration
from tests.modeling.common import NUM_VISUAL_TOKENS
from tests.small_model import make_images


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
