"""The processor: pictures of any mode and shape, the contract with serving engines, refused input."""

import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaImageProcessorPil, PreTrainedTokenizerFast

from mqt_llava import MQTLlavaProcessor
from mqt_llava.modeling import image_processing_mqt_llava
from mqt_llava.modeling.processing_mqt_llava import CHAT_TEMPLATE, SYSTEM_PROMPT
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import canonical_sample
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_processor, make_tokenizer


def pixels(processor, image):
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]


def animation(path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return Image.open(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_modes_are_converted(processor, mode):
    red = Image.new("RGB", (20, 10), (200, 30, 40))
    image = red.quantize(4).convert("PA") if mode == "PA" else red.convert(mode)
    converted = pixels(processor, image)
    assert converted.shape == (1, 3, 30, 30)
    tolerance = 0.016 if mode == "F" else 1e-6  # one level of 255: PIL cuts what follows the point off
    torch.testing.assert_close(converted, pixels(processor, image.convert("RGB")), atol=tolerance, rtol=0)


def test_16_bit_levels_are_scaled_not_clipped(processor):
    levels = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)
    expected = Image.fromarray((levels // 257).astype(np.uint8))
    torch.testing.assert_close(
        pixels(processor, Image.fromarray(levels)), pixels(processor, expected), atol=0.03, rtol=0
    )
    assert pixels(processor, Image.fromarray(levels)).std() > 0.5


def test_first_frame_of_an_animation(processor, tmp_path):
    first = animation(tmp_path / "animation.png")
    torch.testing.assert_close(pixels(processor, first), pixels(processor, Image.new("RGB", (20, 10), "red")))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (700, 700)])
def test_any_shape(processor, model, size):
    inputs = processor(images=Image.new("RGB", size, "green"), text="<image>?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 30, 30)
    assert model(**inputs).logits.isfinite().all()


def test_outputs(processor):
    inputs = processor(
        images=make_images(3),
        text=["<image>", "<image> <image>"],
        num_visual_tokens=[1, 2, 3],
        padding=True,
        return_tensors="pt",
    )
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist() == [1, 5]
    assert "visual_token_counts" not in processor(text="none", return_tensors="pt")


def test_default_is_all_tokens(processor, image):
    assert processor(images=image, text="<image>")["input_ids"][0].count(3) == NUM_QUERY_TOKENS


def test_counts_are_returned_where_placeholders_do_not_say_them(processor):
    """TRL's trainers hand every tensor on by a name that they know."""
    images, options = make_images(3), {"num_visual_tokens": [1, 2, 3], "return_tensors": "pt", "padding": True}
    for text, expected in (
        (["<image>", "<image> <image>"], None),
        (["<image>\n", "<image>\n<image>\n"], None),
        (["<image>", "<image><image>"], [1, 2, 3]),
        (["a<image><image>b", "<image>"], [1, 2, 3]),
        (None, [1, 2, 3]),
    ):
        inputs = processor(images=images, text=text, **options)
        counts = inputs.get("visual_token_counts")
        assert expected == (counts if counts is None else counts.tolist()), text
        assert counts is None or counts.dtype == torch.long
    served = processor(images=images[0], text="<image>", return_text_replacement_offsets=True)
    assert served["visual_token_counts"] == [NUM_QUERY_TOKENS]


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (1, "none"),
        (1, "<image><image>"),
        (2, "<image>"),
        (0, "<image>"),
        ([[0], [1]], ["<image><image>", "none"]),
        ([[0, 1], []], ["<image>", "<image>"]),
    ],
)
def test_images_and_placeholders_that_differ(processor, images, text):
    pictures = make_images(2)
    images = [[pictures[i] for i in row] for row in images] if isinstance(images, list) else pictures[:images] or None
    with pytest.raises(ValueError, match="<image>"):
        processor(images=images, text=text)


def test_rows_of_images(processor):
    pictures = make_images(3)
    text = ["<image>", "<image> and <image>"]
    nested = processor(images=[pictures[:1], pictures[1:]], text=text, padding=True, return_tensors="pt")
    flat = processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert all(torch.equal(nested[name], flat[name]) for name in flat)


def test_unknown_arguments_are_refused(processor, image):
    with pytest.raises(ValueError, match=r"num_visual_token\b") as error:
        processor(images=image, text="<image>", num_visual_token=4)
    assert "num_visual_tokens" in str(error.value)


def test_truncation_never_cuts_visual_tokens(processor, image):
    with pytest.raises(ValueError):
        processor(images=image, text="<image> and a question", truncation=True, max_length=5)


def test_wrong_pixel_shapes_are_refused(processor, image):
    for size in ({"height": 20, "width": 20}, {"height": 30, "width": 40}):
        with pytest.raises(ValueError, match="30 x 30"):
            processor(images=image, text="<image>", size=size)


def test_tokenizer_without_image_token_is_refused(processor):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="add_special_tokens"):
        MQTLlavaProcessor(processor.image_processor, tokenizer, image_token="<picture>")


def test_chat_template(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Why?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == f"<s>{SYSTEM_PROMPT} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages[:1]])
    assert own == "<s>Be brief. USER: <image>\nWhat? ASSISTANT:"
    assert processor.chat_template == CHAT_TEMPLATE
    with pytest.raises(Exception, match="Roles"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_every_text_part_counts(processor):
    """Of a system turn too, as for training."""
    parts = [{"type": "text", "text": text} for text in ("Be brief. ", "Be kind.")]
    user = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "So"}, {"type": "text", "text": "."}]}
    prompt = processor.apply_chat_template([{"role": "system", "content": parts}, user, answer])
    assert prompt == "<s>Be brief. Be kind. USER: Why? ASSISTANT: So.</s>"
    for nothing in ([], ""):
        prompt = processor.apply_chat_template([{"role": "system", "content": nothing}, user])
        assert prompt == "<s>USER: Why? ASSISTANT:"


texts = st.text("ab ?\n", max_size=5)
text_content = texts | st.lists(texts.map(lambda text: {"type": "text", "text": text}), max_size=3)
user_content = texts | st.lists(
    st.one_of(texts.map(lambda text: {"type": "text", "text": text}), st.just({"type": "image"})), max_size=4
)
answers = text_content.filter(
    lambda content: any(c in "ab?" for c in str(content).replace("text", "").replace("type", ""))
)
chats = st.tuples(st.none() | text_content, st.lists(st.tuples(user_content, answers), min_size=1, max_size=3))


@settings(max_examples=100)
@given(chats)
def test_prompts_of_training_and_inference_are_one(chat):
    """The collator's ids of a chat are those of the processor, whose placeholders come m times."""
    system, turns = chat
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    processor = make_processor()
    num_images = sum(
        part["type"] == "image"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    images = make_images(num_images)
    text = processor.apply_chat_template(messages)
    expected = processor(images=images or None, text=text, num_visual_tokens=1)["input_ids"][0]
    canonical = canonical_sample({"messages": messages, "images": images})
    found, labels = MQTLlavaDataCollator(processor, 1).tokenize(canonical["messages"])
    assert found == expected
    assert all(label in (-100, id) for label, id in zip(labels, found))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "a.png"},
        {"type": "img", "image": "a.png"},
        {"type": "video", "path": "a.mp4"},
        {"type": "audio", "path": "a.wav"},
    ],
    ids=lambda part: part["type"],
)
def test_parts_of_other_types_are_refused_by_name(processor, part):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    with pytest.raises(Exception, match=rf"must be text or image; got {part['type']}"):
        processor.apply_chat_template(messages)


def test_videos_are_refused(processor):
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match=f"takes images and text, but no `{name}`"):
            processor(text="a", **{name: [np.zeros((2, 3, 8, 8))]})


def test_a_processor_may_have_an_m_of_its_own(tmp_path):
    make_processor().save_pretrained(tmp_path / "plain")
    processor = MQTLlavaProcessor.from_pretrained(tmp_path / "plain", num_visual_tokens=4)
    processor.save_pretrained(tmp_path / "four")
    for carrier in (processor, MQTLlavaProcessor.from_pretrained(tmp_path / "four")):
        counts = [
            carrier(images=make_images(1), text="<image>", **options)["input_ids"][0].count(3)
            for options in ({}, {"num_visual_tokens": 2}, {"images_kwargs": {"num_visual_tokens": 3}})
        ]
        assert counts == [4, 2, 3]
    with pytest.raises(ValueError, match="from 1 to 16"):
        wrong = MQTLlavaProcessor.from_pretrained(tmp_path / "plain", num_visual_tokens=17)
        wrong(images=make_images(1), text="<image>")


def test_chat_template_takes_placeholders_from_image_parts_alone(processor):
    """A server never compares the numbers: `<image>` in a client's text would be read as an image that is not there."""
    parts = [{"type": "image"}, {"type": "text", "text": "<image>\nWhat?"}]
    for role in ("system", "user", "assistant"):
        with pytest.raises(Exception, match="must not contain <image>"):
            processor.apply_chat_template([{"role": role, "content": parts[1:]}, {"role": "user", "content": "Why?"}])
    for role in ("system", "assistant"):  # such an image would be dropped
        with pytest.raises(Exception, match="Only user turns"):
            processor.apply_chat_template([{"role": role, "content": parts[:1]}, {"role": "user", "content": "Why?"}])
    assert "<image>\nWhat?" in processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat?"}])


def test_chat_template_with_images_and_num_visual_tokens(processor):
    picture = make_images(1)[0]
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"num_visual_tokens": 5}
    )
    assert inputs["input_ids"][0].tolist().count(3) == 5
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


def test_a_prompt_of_the_chat_template_gets_no_second_bos(processor, image):
    bos = processor.tokenizer.bos_token_id
    prompt = processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat?"}])
    for text, options, expected in (
        (prompt, {}, 1),
        ([prompt, prompt], {"images": [image] * 2}, 2),
        (prompt, {"add_special_tokens": True}, 2),
        (prompt, {"text_kwargs": {"add_special_tokens": True}}, 2),
        (prompt.removeprefix("<s>"), {}, 1),
    ):
        inputs = processor(**({"images": image, "text": text} | options))
        assert sum(ids.count(bos) for ids in inputs["input_ids"]) == expected


# ------------------------------------------------------------------------------------------- contract with vLLM


def test_serving_reads_the_annotations(processor):
    kwargs = MQTLlavaProcessor.__call__.__annotations__["kwargs"]
    images_kwargs = typing.get_args(kwargs)[0].__annotations__["images_kwargs"]
    assert "num_visual_tokens" in images_kwargs.__annotations__ and not isinstance(
        images_kwargs, (str, typing.ForwardRef)
    )
    assert (
        processor.image_token == "<image>" and processor.image_token_id == 3 and processor.image_processor is not None
    )


def test_serving_sizes_by_the_largest_m(processor):
    counted = processor._get_num_multimodal_tokens([(30, 30), (50, 9)], num_visual_tokens=2)
    assert counted["num_image_tokens"] == [NUM_QUERY_TOKENS] * 2 and counted["num_image_patches"] == [1, 1]


def test_serving_finds_the_placeholders(processor):
    images, text = make_images(2), ["<s>See <image> and <image>."]
    processed, replacements = processor._process_images(images, num_visual_tokens=[2, 4])
    expanded, offsets = processor.get_text_with_replacements(list(text), replacements)
    assert [expanded[0][slice(*offset["new_span"])] for offset in offsets[0]] == ["<image>" * 2, "<image>" * 4]
    assert list(processed["visual_token_counts"]) == [2, 4]


def test_serving_takes_one_m_for_all_images(processor):
    """Each image is cached under the request's arguments: lists would give other images' m in another order."""
    options = {"images": make_images(2), "text": "<image><image>", "return_text_replacement_offsets": True}
    assert processor(**options, num_visual_tokens=3)["visual_token_counts"] == [3, 3]
    for bad in ([3, 3], [3, 4], "3", 3.0):
        with pytest.raises(ValueError, match="one integer for all images"):
            processor(**options, num_visual_tokens=bad)
        with pytest.raises(ValueError, match="one integer for all images"):
            processor(**options, images_kwargs={"num_visual_tokens": bad})
    with pytest.raises(ValueError, match="return_tensors"):
        processor(**options, return_tensors="np")


def test_serving_slices_features_per_image(processor, model):
    inputs = processor(images=make_images(2), text="<image><image>", num_visual_tokens=[2, 4], return_tensors="pt")
    outputs = model.model.get_image_features(
        inputs["pixel_values"], return_dict=True, visual_token_counts=inputs["visual_token_counts"]
    )
    assert [tuple(tokens.shape) for tokens in outputs.pooler_output] == [(2, 32), (4, 32)]


def transformers_pixels(image, **options):
    side = {"height": 30, "width": 30}
    settings = {"do_pad": True, "size": side, "do_center_crop": False, "crop_size": side, "return_tensors": "pt"}
    return LlavaImageProcessorPil()([image], **settings | options)["pixel_values"]


@settings(max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), seed=st.integers(0, 9))
def test_pixels_are_those_of_transformers(width, height, seed):
    """The faster way to pad and resize gives the same pixels, bit for bit."""
    processor = make_processor()
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    expected = transformers_pixels(image)
    found = processor(images=[image, image.copy()], text="<image><image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(found[:1], expected) and torch.equal(found[1:], expected)


def test_a_strip_is_never_made_square():
    """Which would take 2.7 GB."""
    code = """
import resource
from PIL import Image
from tests.small_model import make_processor
processor = make_processor()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((30_000, 2), (2, 30_000)):
    inputs = processor(images=Image.new("RGB", size, (10, 200, 30)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 30, 30)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
    assert int(printed) < 200  # MB


@pytest.mark.parametrize("strip_pixels", [1, 60, 200])
def test_strips_make_no_difference(monkeypatch, strip_pixels):
    whole = [pixels(make_processor(), image) for image in make_images(5)]
    monkeypatch.setattr(image_processing_mqt_llava, "STRIP_PIXELS", strip_pixels)
    strips = [pixels(make_processor(), image) for image in make_images(5)]
    assert all(map(torch.equal, whole, strips))


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 20_000, "width": 20_000}},
        {"size": 20_000},
        {"size": {"shortest_edge": 30}},
        {"crop_size": {"height": 15, "width": 15}},
        {"images_kwargs": {"crop_size": 15}},
        {"do_resize": False},
    ],
)
def test_other_shapes_are_refused_before_any_work(processor, options, monkeypatch):
    """A request to a server may carry them: 20,000 x 20,000 pixels would take all of its memory."""
    monkeypatch.setattr(image_processing_mqt_llava, "to_rgb", None)
    monkeypatch.setattr(LlavaImageProcessorPil, "preprocess", None)
    with pytest.raises(ValueError, match="30 x 30"):
        processor(images=make_images(1)[0], text="<image>", **options)


@pytest.mark.parametrize("options", [{}, {"image_mean": [0.1] * 3}])
def test_endless_images_are_refused(processor, options):
    """Far beyond JPEG's limit of 65,535 pixels to a side; where the image processor makes the whole square, sooner."""
    for size in ((10_000_000, 1), (1, 10_000_000)):
        with pytest.raises(ValueError, match="too long to be padded to a square"):
            processor(images=Image.new("RGB", size), text="<image>", **options)


@pytest.mark.parametrize(
    "options", [{"do_resize": False}, {"do_pad": False}, {"resample": 0}, {"image_mean": [0.1] * 3}]
)
def test_other_geometry_is_left_to_transformers(options):
    processor = make_processor()
    image = make_images(2)[1].resize((30, 30)) if "do_resize" in options else make_images(1)[0]
    expected = transformers_pixels(image, **options)
    if expected.shape[-2:] == (30, 30):
        found = processor(images=image, text="<image>", return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(found, expected)
    else:
        with pytest.raises(ValueError, match="30 x 30"):
            processor(images=image, text="<image>", **options)


def test_draft_decodes_a_large_jpeg_at_a_smaller_size(tmp_path):
    gradient = np.linspace(0, 255, 960 * 640).reshape(640, 960).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(tmp_path / "large.jpg", quality=95)
    processor, pixels = make_processor(), {}
    for draft in (False, True):
        with Image.open(tmp_path / "large.jpg") as image:
            pixels[draft] = processor(images=image, text="<image>", draft=draft, return_tensors="pt")["pixel_values"]
            assert image.size == ((120, 80) if draft else (960, 640))
    assert not torch.equal(pixels[False], pixels[True])
    assert (pixels[False] - pixels[True]).abs().mean() < 0.05
    exact = processor(images=make_images(1), text="<image>", draft=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(exact, processor(images=make_images(1), text="<image>", return_tensors="pt")["pixel_values"])
