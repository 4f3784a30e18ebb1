"""m said to the processor, to `generate` or to `forward` means the same, per image, in any mix of rows."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


pytestmark = pytest.mark.every_version


M = NUM_QUERY_TOKENS
MODEL, PROCESSOR = make_model(), make_processor()
num_visual_tokens = st.integers(1, M)
# A row: text chunks with m of the image between any two of them; empty chunks make images adjacent
rows = st.tuples(
    st.lists(num_visual_tokens, max_size=3),
    st.lists(st.sampled_from(["", "a", "b c", "\nWhy?"]), min_size=4, max_size=4),
)


def row_text(row):
    counts, chunks = row
    return "<image>".join(["Q" + chunks[0], *chunks[1 : 1 + len(counts)]]) + " A:"


def prepare(batch, prepared=None, **kwargs):
    """Inputs for rows, each image with its m, or with `prepared` for all."""
    counts = [m for row in batch for m in row[0]]
    images = make_images(len(counts)) or None
    texts = [row_text(row) for row in batch]
    num_visual_tokens = (counts if prepared is None else prepared) if images else None
    inputs = PROCESSOR(
        images=images, text=texts, num_visual_tokens=num_visual_tokens, padding=True, return_tensors="pt", **kwargs
    )
    return inputs, counts


def row_logits(logits, attention_mask):
    return [values[mask.bool()] for values, mask in zip(logits, attention_mask)]


@settings(max_examples=40)
@example(batch=[([1], ["", "a", "", ""]), ([2], ["", "a", "", ""])], padding_side="left", prepared=1)
@given(
    batch=st.lists(rows, min_size=1, max_size=4),
    padding_side=st.sampled_from(["left", "right"]),
    prepared=st.one_of(st.none(), num_visual_tokens),
)
def test_any_mix_equals_each_row_alone(batch, padding_side, prepared):
    """Rows with any number of images, adjacent or not, of any m, prepared with whatever m, padded on any side."""
    inputs, counts = prepare(batch, prepared, padding_side=padding_side)
    kwargs = {} if prepared is None or not counts else {"num_visual_tokens": counts}
    # Where the prepared rows were equally long, nothing tells `forward` the side, and it pads on the right
    side = padding_side if prepared is None or not inputs["attention_mask"].all() else "right"
    exact, _ = prepare(batch, padding_side=side)
    with torch.no_grad():
        together = row_logits(MODEL(**inputs, **kwargs).logits, exact["attention_mask"])
        first = 0
        for row, logits in zip(batch, together):
            images = make_images(len(counts))[first : first + len(row[0])] or None
            first += len(row[0])
            alone = PROCESSOR(
                images=images, text=row_text(row), num_visual_tokens=row[0] if images else None, return_tensors="pt"
            )
            torch.testing.assert_close(logits, MODEL(**alone).logits[0], atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(batch=st.lists(rows, min_size=1, max_size=3), prepared=num_visual_tokens)
def test_generate_with_num_visual_tokens_equals_processor_with_num_visual_tokens(batch, prepared):
    """`generate(num_visual_tokens=...)` gives the answers of a prompt prepared so, after the caller's own ids."""
    inputs, counts = prepare(batch, prepared)
    if not counts:
        return
    exact, _ = prepare(batch)
    options = {"max_new_tokens": 4, "do_sample": False}
    output = MODEL.generate(**inputs, num_visual_tokens=counts, **options)
    expected = MODEL.generate(**exact, **options)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    assert torch.equal(output[:, length:], expected[:, exact["input_ids"].shape[1] :])


@settings(max_examples=25)
@given(
    m=num_visual_tokens,
    prepared=num_visual_tokens,
    batch_size=st.integers(1, 3),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_labels_follow_num_visual_tokens(m, prepared, batch_size, padding_side):
    texts = [f"Q<image>{'why ' * i}? A: {'yes' * (i + 1)}" for i in range(batch_size)]
    losses = []
    for first, kwargs in ((m, {}), (prepared, {"num_visual_tokens": m})):
        inputs = PROCESSOR(
            images=make_images(batch_size),
            text=texts,
            num_visual_tokens=first,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == PROCESSOR.image_token_id)
        labels = inputs["input_ids"].masked_fill(ignored, -100)
        with torch.no_grad():
            losses.append(MODEL(**inputs, labels=labels, **kwargs).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_position_ids_follow_num_visual_tokens():
    batch = [([3], ["x", "yes", "", ""]), ([5, 2], ["", "", "no", ""])]
    inputs, counts = prepare(batch, 7)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    exact, _ = prepare(batch)
    with torch.no_grad():
        logits = MODEL(**inputs, position_ids=positions, num_visual_tokens=counts).logits
        expected = MODEL(**exact, position_ids=(exact["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    for ours, theirs in zip(*(row_logits(x, exact["attention_mask"]) for x in (logits, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tokens_of_a_small_m_are_a_prefix():
    pixel_values = PROCESSOR(images=make_images(2), text="<image><image>", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        all_tokens = MODEL.get_image_features(pixel_values).pooler_output
        for m in range(1, M + 1):
            for few, many in zip(MODEL.get_image_features(pixel_values, [m, M + 1 - m]).pooler_output, all_tokens):
                torch.testing.assert_close(few, many[: len(few)], atol=1e-5, rtol=1e-5)


def test_only_the_tokens_asked_for_are_computed():
    pixel_values = PROCESSOR(images=make_images(2), text="<image><image>", return_tensors="pt")["pixel_values"]
    shapes = []
    hook = MODEL.model.query_transformer.text_proj.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    MODEL.get_image_features(pixel_values, [2, 5])
    hook.remove()
    assert shapes == [(2, 5, 32)]


def test_m_changes_the_answer_and_the_image_matters():
    """Guards the tests above: on this model, logits do depend on m and on the image."""
    first, second = (PROCESSOR(images=make_images(1, seed), text="Q<image>A:", return_tensors="pt") for seed in (0, 1))
    with torch.no_grad():
        logits = [MODEL(**first, num_visual_tokens=m).logits[0, -1] for m in (1, 4, M)]
        other = MODEL(**second, num_visual_tokens=M).logits[0, -1]
    differences = [
        (a - b).abs().max() for a, b in ((logits[0], logits[1]), (logits[1], logits[2]), (logits[2], other))
    ]
    assert min(differences) > 1e-2


BAD_NUM_VISUAL_TOKENS = [
    0,
    -1,
    M + 1,
    True,
    2.5,
    "16",
    [1],
    [1, 2, 3],
    [1, 0],
    [1, True],
    [1, 2.0],
    torch.tensor([1.0, 2.0]),
    np.array(0),
]


@pytest.mark.parametrize("bad", BAD_NUM_VISUAL_TOKENS, ids=repr)
def test_bad_num_visual_tokens_are_refused_everywhere(bad):
    texts, images = "<image> and <image>", make_images(2)
    inputs = PROCESSOR(images=images, text=texts, return_tensors="pt")
    calls = [
        lambda: PROCESSOR(images=images, text=texts, num_visual_tokens=bad),
        lambda: MODEL.generate(**inputs, num_visual_tokens=bad, max_new_tokens=1),
        lambda: MODEL(**inputs, num_visual_tokens=bad),
        lambda: MODEL.get_image_features(inputs["pixel_values"], bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"num_visual_tokens") as error:
            call()
        assert "one per image" in str(error.value)


@pytest.mark.parametrize("bad", [0, M + 1, [1]])
def test_bad_num_visual_tokens_are_refused_without_images(bad):
    with pytest.raises(ValueError, match="num_visual_tokens"):
        PROCESSOR(text="no image", num_visual_tokens=bad)
    inputs = PROCESSOR(text="no image", return_tensors="pt")
    with pytest.raises(ValueError, match="num_visual_tokens"):
        MODEL(**inputs, num_visual_tokens=bad)


GOOD_NUM_VISUAL_TOKENS = [
    3,
    np.int64(3),
    [3, 3],
    (3, 3),
    np.array(3),
    np.array([3, 3]),
    torch.tensor(3),
    torch.tensor([3, 3]),
]


@pytest.mark.parametrize("good", GOOD_NUM_VISUAL_TOKENS, ids=repr)
def test_kinds_of_integers(good):
    inputs = PROCESSOR(images=make_images(2), text="<image><image>", num_visual_tokens=good, return_tensors="pt")
    assert inputs["visual_token_counts"].tolist() == [3, 3]
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == 6


def test_num_visual_tokens_are_not_swallowed_where_they_are_not_taken():
    inputs = PROCESSOR(images=make_images(1), text="<image>", return_tensors="pt")
    for call in (MODEL.model, lambda **kwargs: MODEL.get_image_features(inputs["pixel_values"], num_visual_tokens=4)):
        with pytest.raises(ValueError, match=r"`num_visual_tokens` is not accepted here.* Got 4"):
            call(**inputs, num_visual_tokens=4)


def test_images_and_placeholders_must_match():
    inputs = PROCESSOR(images=make_images(2), text="<image> and <image>", num_visual_tokens=4, return_tensors="pt")
    fewer_tokens = {**inputs, "input_ids": inputs["input_ids"][:, :-6], "attention_mask": None}
    fewer_images = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
    for broken in (fewer_tokens, fewer_images):
        without_counts = {k: v for k, v in broken.items() if k != "visual_token_counts"}
        for kwargs in (broken, without_counts):
            for call in (MODEL, MODEL.generate):
                with pytest.raises(ValueError, match="do not match"):
                    call(**kwargs)


def test_adjacent_images_need_counts():
    inputs = PROCESSOR(images=make_images(2), text="<image><image>", num_visual_tokens=[1, 3], return_tensors="pt")
    with torch.no_grad():
        counted = MODEL(**inputs).logits
        assert counted.shape[1] == inputs["input_ids"].shape[1]
        assert inputs.pop("visual_token_counts").tolist() == [1, 3]
        with pytest.raises(ValueError, match="visual_token_counts"):
            MODEL(**inputs)


def test_placeholders_without_pixels_are_legal_in_forward():
    inputs = PROCESSOR(images=make_images(1), text="<image>", return_tensors="pt")
    with torch.no_grad():
        assert MODEL(input_ids=inputs["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("with_ids", [False, True])
def test_generate_from_embeddings(with_ids):
    """A prompt as `inputs_embeds`: placeholders are found by their embedding, where ids are not passed too."""
    inputs, _ = prepare([([3, 5], ["", "a", "b c", ""]), ([2], ["a", "", "", ""])], padding_side="left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = MODEL.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    input_ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = MODEL.get_input_embeddings()(input_ids)
    if with_ids:
        inputs["input_ids"] = input_ids
    assert MODEL.generate(**inputs, **options)[:, -5:].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="inputs_embeds"):
        MODEL.generate(**{**inputs, "input_ids": None}, num_visual_tokens=2, **options)


@pytest.mark.parametrize("prepared", [None, 1, M])
def test_position_ids_of_the_caller(prepared):
    """Position ids are re-budgeted with the prompt, and begin where the caller has them begin."""
    batch = [([3, 5], ["", "a", "b c", ""]), ([2], ["a", "", "", ""])]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    results = []
    for m in (None, prepared):
        inputs, counts = prepare(batch, m, padding_side="left")
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + 7
        kwargs = {} if m is None else {"num_visual_tokens": counts}
        with torch.no_grad():
            logits = MODEL(**inputs, position_ids=positions, **kwargs).logits
        sequences = MODEL.generate(**inputs, position_ids=positions, **kwargs, **options)
        results.append((logits[:, -1], sequences[:, -5:]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert results[0][1].tolist() == results[1][1].tolist()


@pytest.mark.parametrize("m", [1, 7, M, [2, 9, 4]])
def test_features_of_all_tokens_do_for_every_m(m):
    """Images are encoded once; the first m visual tokens of each are taken."""
    batch = [([3, 5], ["", "a", "b c", ""]), ([2], ["a", "", "", ""])]
    inputs, _ = prepare(batch, padding_side="left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_visual_tokens": m}
    expected = MODEL.generate(**inputs, **options)
    pixel_values = inputs.pop("pixel_values")
    with torch.no_grad():
        features = {"image": MODEL.get_image_features(pixel_values)}
        logits = MODEL(**inputs, mm_encoder_outputs=features, num_visual_tokens=m).logits
        wanted = MODEL(**inputs, pixel_values=pixel_values, num_visual_tokens=m).logits
        few = {"image": MODEL.get_image_features(pixel_values, [1, 2, 1])}
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    for _ in range(2):  # features are not used up
        assert MODEL.generate(**inputs, mm_encoder_outputs=features, **options).tolist() == expected.tolist()
    with pytest.raises(ValueError, match=r"has \[1, 2, 1\] visual tokens"):
        MODEL.generate(**inputs, mm_encoder_outputs=few, **options | {"num_visual_tokens": 3})
