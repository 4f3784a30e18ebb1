"""Readers of conversations, and batches of them: labels, lengths, broken samples."""

import base64
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from mqt_llava import MQTLlavaImageProcessor, MQTLlavaProcessor
from mqt_llava.conversion.authors import load_llama_tokenizer
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import (
    SampleError,
    canonical_sample,
    load_conversations,
    open_image,
    refuse_broken,
    with_num_visual_tokens,
)
from mqt_llava.training.sampling import VisualTokenSampler
from tests.reference import REFERENCE, official_layout
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


M = NUM_QUERY_TOKENS


def llava(*turns, **row):
    speakers = ("human", "gpt")
    return row | {"conversations": [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]}


def chat(*turns, **row):
    roles = ("user", "assistant")
    return row | {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(make_images(3)):
        image.save(tmp_path / f"{i}.png")
    return tmp_path


# Readers ------------------------------------------------------------------------------------------------------------------

ROWS = [
    (llava("<image>\nWhat?", "A cat.", id=7, image="0.png"), ["<image>\nWhat?", "A cat."], ["0.png"]),
    (llava("Now what? <image>", "A cat.", image=["0.png"]), ["<image>\nNow what?", "A cat."], ["0.png"]),
    (
        llava("<image> or <image>?", "The first.", "Why?", "So.", id="x", image=["0.png", "1.png"]),
        ["<image>\n<image>\nor ?", "The first.", "Why?", "So."],
        ["0.png", "1.png"],
    ),
    (llava("Hi", "Hello"), ["Hi", "Hello"], []),
    (chat([IMAGE, text("What?")], "A cat.", images=["2.png"]), ["<image>\nWhat?", "A cat."], ["2.png"]),
    (
        chat([text("What?"), IMAGE | {"path": "1.png"}], [text("A "), text("cat.")]),
        ["<image>\nWhat?", "A cat."],
        ["1.png"],
    ),
    (chat([text("What?"), IMAGE | {"image": "1.png"}], "A cat."), ["<image>\nWhat?", "A cat."], ["1.png"]),
]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_form_of_a_row_is_read(lines, streaming, folder):
    rows = [row for row, _, _ in ROWS]
    file = folder / ("rows.jsonl" if lines else "rows.json")
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n" if lines else json.dumps(rows))
    dataset = load_conversations(file, streaming=streaming)
    samples = list(dataset)
    for i, (sample, (row, turns, images)) in enumerate(zip(samples, ROWS, strict=True)):
        assert sample["error"] is None
        assert [message["content"] for message in sample["messages"]] == turns
        assert sample["images"] == [str(folder / name) for name in images]
        assert sample["id"].startswith(f"{file.name}[{i}]") and (
            "id" not in row or f"(id {row['id']})" in sample["id"]
        )
    batch = MQTLlavaDataCollator(make_processor(), 3)(samples)
    assert batch["visual_token_counts"].tolist() == [3] * 7 and len(batch["input_ids"]) == len(ROWS)
    assert "loss" in make_model()(**batch)
    assert [row["num_visual_tokens"] for row in with_num_visual_tokens(dataset, 5)] == [5] * len(ROWS)


def test_a_changed_file_is_read_again(folder):
    file = folder / "rows.json"
    file.write_text(json.dumps([llava("Hi", "Hello")]))
    assert len(load_conversations(file)) == 1
    file.write_text(json.dumps([llava("Hi", "Hello")] * 2))
    assert len(load_conversations(file)) == 2


def test_several_files_are_shards(folder):
    for i in range(2):
        (folder / f"{i}.json").write_text(json.dumps([llava("Hi", f"{i}")]))
    stream = load_conversations([folder / "0.json", folder / "1.json"], folder, streaming=True)
    assert stream.num_shards == 2
    assert [row["messages"][1]["content"] for row in stream] == ["0", "1"]


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"no data file .*none\.json"):
        load_conversations(folder / "none.json")
    (folder / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no image folder .*nowhere"):
        load_conversations(folder / "rows.json", folder / "nowhere")


BROKEN = {
    "no placeholder": (llava("What?", "A cat.", image="0.png"), "1 images and 0 <image>"),
    "no image": (llava("<image>What?", "A cat."), "0 images and 1 <image>"),
    "two for one": (llava("<image><image>What?", "A cat.", image="0.png"), "1 images and 2 <image>"),
    "no answer": (llava("<image>What?", image="0.png"), "no answer"),
    "empty answer": (llava("<image>What?", " ", image="0.png"), "answer in turn 1 is empty"),
    "later empty answer": (llava("Hi", "Hello", "What?", ""), "answer in turn 3 is empty"),
    "image in the answer": (llava("What?", "<image>", image="0.png"), "answer in turn 1 has an <image>"),
    "no turns": ({"id": 1}, "neither `conversations` nor `messages`"),
    "not a row": ("hello", "neither `conversations` nor `messages`"),
    "turns are text": ({"conversations": "hello"}, "not a list of objects"),
    "role": ({"conversations": [{"from": "cat", "value": "Miaow"}]}, "got 'cat'"),
    "two questions": (chat("a", "b") | {"messages": [{"role": "user", "content": "a"}] * 2}, "take turns"),
    "url": (chat([IMAGE | {"url": "https://a/b.png"}], "A cat."), "not downloaded"),
    "part": (chat([{"type": "video"}], "A cat."), "got 'video'"),
    "both": (chat([IMAGE | {"path": "1.png"}, text("?")], "A", images=["0.png"]), "both"),
    "number": (chat(7, "A cat."), "a string or a list of parts; got 7"),
}


@pytest.mark.parametrize(("row", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_rows_are_named_with_their_index(row, message, folder):
    (folder / "rows.json").write_text(json.dumps([llava("Hi", "Hello"), row]))
    rows = list(load_conversations(folder / "rows.json"))
    with pytest.raises(ValueError, match=r"rows\.json\[1\].*cannot be trained on") as error:
        MQTLlavaDataCollator(make_processor())(rows)
    assert message in str(error.value)


def test_images_are_opened_by_the_collator(folder):
    (folder / "corrupt.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    names = ["missing.png", "corrupt.png", "text.png", "0.png"]
    (folder / "rows.json").write_text(json.dumps([llava("<image>?", "A cat.", image=name) for name in names]))
    rows = list(load_conversations(folder / "rows.json"))
    for row, message in zip(rows, ["neither an image file", "damaged", "annot read the image .*text.png"]):
        with pytest.raises(ValueError, match=message):
            MQTLlavaDataCollator(make_processor())([row])
    collator = MQTLlavaDataCollator(make_processor(), 2, on_error="skip", return_sample_ids=True)
    batch = collator(rows)
    assert (
        batch["sample_ids"] == ["rows.json[3]"] and batch["pixel_values"].shape[0] == 1 and collator.num_skipped == 3
    )


def test_skipping_warns_and_never_gives_an_empty_batch(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "mqt_llava.training.collator.logger.warning", lambda *args: warnings.append(args[0] % args[1:])
    )
    collator = MQTLlavaDataCollator(make_processor(), 2, on_error="skip", return_sample_ids=True)
    good, broken = chat("Hi", "Hello", id="good"), chat("Hi", "", id="bad")
    with pytest.raises(ValueError, match="All 2 samples of a batch are broken"):
        collator([broken, broken])
    assert collator([broken, good, broken])["sample_ids"] == ["good"]
    assert collator([broken])["sample_ids"] == ["good"]
    assert collator.num_skipped == len(warnings) == 5
    assert (
        "Sample bad cannot be trained on: the answer in turn 1 is empty" in warnings[0] and "number 5" in warnings[-1]
    )


def image_forms(path):
    """One image in all the forms that datasets have."""
    content = path.read_bytes()
    return {
        "pil": Image.open(path),
        "path": str(path),
        "pathlib": path,
        "bytes": content,
        "base64": base64.b64encode(content).decode(),
        "dict of bytes": {"bytes": content, "path": None},
        "dict of a path": {"bytes": None, "path": str(path)},
    }


def write_turned(path):
    """A picture that its camera says to turn."""
    picture = make_images(1)[0]
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


def write_deep(path):
    """Levels of 16 bits, which PIL's own conversion shows white."""
    Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 50).reshape(30, 40)).save(path)


def write_transparent(path):
    Image.new("RGBA", (30, 30), (0, 0, 0, 80)).save(path)


@pytest.mark.parametrize("write", [write_turned, write_deep, write_transparent])
def test_images_look_as_the_processor_shows_them_in_every_form(write, tmp_path):
    processor = make_processor()
    write(tmp_path / "a.png")
    expected = processor.image_processor(Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    for name, image in image_forms(tmp_path / "a.png").items():
        batch = MQTLlavaDataCollator(processor, 1)([chat("<image>?", "A cat.", images=[image])])
        assert torch.equal(batch["pixel_values"], expected), name


def test_images_are_not_downloaded():
    for image in ("https://somewhere/0.png", {"path": "http://somewhere/0.png"}):
        with pytest.raises(SampleError, match="not downloaded"):
            open_image(image)


@pytest.fixture
def large_image(tmp_path):
    """One that is not read in one go."""
    levels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "large.png")
    return tmp_path / "large.png"


def test_workers_do_not_read_one_open_file_together(large_image):
    processor = make_processor()
    expected = processor.image_processor(Image.open(large_image), return_tensors="pt")["pixel_values"]
    for source in (large_image, open(large_image, "rb")):  # noqa: SIM115  (closed by PIL)
        rows = [chat("<image>?", "A cat.", images=[Image.open(source)])] * 6
        for batch in DataLoader(rows, 1, num_workers=2, collate_fn=MQTLlavaDataCollator(processor, 1)):
            assert torch.equal(batch["pixel_values"], expected)


def test_an_image_of_several_samples_is_read_once(large_image):
    processor = make_processor()
    expected = processor.image_processor(Image.open(large_image), return_tensors="pt")["pixel_values"][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(5):
            image = Image.open(large_image)
            rows = [chat("<image>?", "A cat.", images=[image]), chat("<image><image>?", "A cat.", images=[image] * 2)]
            pixel_values = MQTLlavaDataCollator(processor, 1)(rows)["pixel_values"]
            assert len(pixel_values) == 3 and all(torch.equal(pixels, expected) for pixels in pixel_values)
    finally:
        torch.set_num_threads(threads)


# TRL's forms of a row -----------------------------------------------------------------------------------------------------


def test_rows_in_the_forms_of_trl():
    images = make_images(2)
    collator, processor = MQTLlavaDataCollator(make_processor(), 2), make_processor()
    expected = collator([chat("<image><image>What?", "A cat.", images=images)])
    turns = chat("What?", "A cat.")["messages"]
    parts = [
        {"role": "user", "content": [IMAGE, IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    for row in (
        {"messages": turns, "images": images},
        {"messages": parts, "images": [*images, None]},
        {"prompt": turns[:1], "completion": turns[1:], "images": images},
        {"prompt": parts[:1], "completion": parts[1:], "images": images, "messages": None},
    ):
        batch = collator([row])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    one = collator([{"messages": turns, "image": images[0], "images": None}])
    assert (one["input_ids"] == processor.image_token_id).sum() == 2 and len(one["pixel_values"]) == 1
    assert "pixel_values" not in collator([{"messages": turns, "images": [None]}, {"messages": turns, "image": None}])
    with pytest.raises(ValueError, match="must be lists of turns; got text"):
        collator([{"prompt": "What?", "completion": "A cat."}])


def test_answers_of_a_prompt_are_no_labels(tmp_path):
    turns = chat("<image>What?", "A cat.", "And?", "No more.")["messages"]
    row = {"prompt": turns[:3], "completion": turns[3:], "image": "0.png"}
    make_images(1)[0].save(tmp_path / "0.png")
    (tmp_path / "rows.json").write_text(json.dumps([row, {"messages": turns, "image": "0.png"}]))
    processor = make_processor()
    batch = MQTLlavaDataCollator(processor, 2)(list(load_conversations(tmp_path / "rows.json")))
    answers = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert answers == [" No more.</s>", " A cat.</s> No more.</s>"]
    with pytest.raises(ValueError, match="no answer"):
        MQTLlavaDataCollator(processor)([{"prompt": turns[:2], "completion": turns[2:3], "images": make_images(1)}])


# Labels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_labels_of_raw_rows_equal_the_reference(legacy, tmp_path):
    """From the turns as they stand in LLaVA's JSON; `tests/modeling/test_parity.py` begins after the first step."""
    official_layout.write_tokenizer(str(tmp_path), str(REFERENCE / "tokenizer.model"), 2048, legacy)
    side = {"height": 336, "width": 336}
    image_processor = MQTLlavaImageProcessor(size=side, crop_size=side)
    processor = MQTLlavaProcessor(image_processor, load_llama_tokenizer(tmp_path, legacy=legacy))
    suffix = "" if legacy else "_legacy_false"
    entries = [e for e in json.loads((REFERENCE / "dev" / "labels.json").read_text()) if not e["edge"]]
    rows = [
        llava(*entry["turns"], **({"image": Image.new("RGB", (8, 8))} if entry["has_image"] else {}))
        for entry in entries
    ]
    for m in (1, 5):
        batch = MQTLlavaDataCollator(processor, m)(rows)
        for row, entry in enumerate(entries):
            ids, labels = [], []
            for i, label in zip(entry["input_ids" + suffix], entry["labels" + suffix]):
                ids += [processor.image_token_id] * m if i == -200 else [i]
                labels += [label] * (m if i == -200 else 1)
            assert batch["input_ids"][row, : len(ids)].tolist() == ids, entry["name"]
            assert batch["labels"][row, : len(ids)].tolist() == labels, entry["name"]
            assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (
                len(batch["labels"][row]) - len(ids)
            )
            assert (batch["labels"][row, len(ids) :] == -100).all()


def test_batches_equal_the_processor_and_rebudgeting():
    """The collator's prompt at m is the processor's at m, and the model's own re-budgeting gives the same loss."""
    processor, model, images = make_processor(), make_model(), make_images(3)
    rows = [
        chat("<image><image>Which?", "The first.", images=images[:2]),
        chat("<image>What?", "A cat.", "And?", "No more.", images=images[2:]),
        chat("Hi", "Hello"),
    ]
    at_one, at_seven = (MQTLlavaDataCollator(processor, m)(rows) for m in (1, 7))
    text = processor.apply_chat_template([canonical_sample(row)["messages"] for row in rows])
    expected = processor(
        images=images, text=text, num_visual_tokens=7, padding=True, padding_side="right", add_special_tokens=False
    )
    assert at_seven["input_ids"].tolist() == expected["input_ids"]
    assert at_seven["visual_token_counts"].tolist() == [7, 7, 7]
    torch.testing.assert_close(model(**at_one, num_visual_tokens=7).loss, model(**at_seven).loss)


def test_samples_may_have_m_of_their_own():
    sampler = VisualTokenSampler("uniform", M)
    collator = MQTLlavaDataCollator(make_processor(), sampler)
    row = chat("<image>?", "A cat.", images=make_images(1))
    batch = collator([row, row | {"num_visual_tokens": 5}, row | {"num_visual_tokens": M}])
    assert batch["visual_token_counts"].tolist() == [sampler.sample(0), 5, M]
    collator([row | {"num_visual_tokens": 5}])  # draws nothing
    assert collator([row])["visual_token_counts"].tolist() == [sampler.sample(1)]
    with pytest.raises(ValueError, match=f"from 1 to {M}"):
        collator([row | {"num_visual_tokens": M + 1}])


@pytest.mark.parametrize("m", [0, M + 1, True, 2.5])
def test_bad_settings_are_refused(m):
    with pytest.raises(ValueError, match=f"integer from 1 to {M}"):
        MQTLlavaDataCollator(make_processor(), m)
    with pytest.raises(ValueError, match="on_error"):
        MQTLlavaDataCollator(make_processor(), on_error="ignore")
    with pytest.raises(ValueError, match=f"from 1 to {M}"):
        MQTLlavaDataCollator(make_processor(), VisualTokenSampler("even", 256))
    processor = make_processor()
    processor.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="generation"):
        MQTLlavaDataCollator(processor)


# Lengths ------------------------------------------------------------------------------------------------------------------


def test_too_long_says_what_to_change():
    row = chat("<image>What?", "A cat.", images=make_images(1), id="long")
    sampler = VisualTokenSampler([1, M], M)
    length = MQTLlavaDataCollator(make_processor(), M)([row])["input_ids"].shape[1]
    MQTLlavaDataCollator(make_processor(), sampler, max_length=length)([row])
    for _ in range(5):  # whatever is drawn
        with pytest.raises(
            ValueError, match=rf"long.*{length} tokens, including 1 x {M} visual.*`max_length`.*num_visual_tokens"
        ):
            MQTLlavaDataCollator(make_processor(), sampler, max_length=length - 1)([row])


@settings(max_examples=60)
@given(
    turns=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    images=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    m=st.integers(1, M),
    max_length=st.integers(1, 500),
)
def test_truncation_cuts_no_visual_token_and_leaves_labels(turns, images, m, max_length):
    """Whatever the length: the model takes what comes out, or the sample is refused."""
    processor = make_processor()
    contents = [part for i, length in enumerate(turns) for part in ("<image>" * images[i] + f"{i}?", f"{i}" * length)]
    row = chat(*contents, images=make_images(sum(images[: len(turns)])))
    whole = MQTLlavaDataCollator(processor, m)([row])
    try:
        batch = MQTLlavaDataCollator(processor, m, max_length=max_length, truncate=True)([row])
    except ValueError as error:
        assert "no room for an answer" in str(error) and "max_length" in str(error)
        first = (whole["labels"][0] != -100).nonzero()[0].item()
        assert first >= max_length
        return
    length = batch["input_ids"].shape[1]
    assert length <= max_length and torch.equal(batch["input_ids"], whole["input_ids"][:, :length])
    assert torch.equal(batch["labels"], whole["labels"][:, :length])
    assert batch["labels"][0, -1] != -100  # it ends in an answer
    num_images = 0 if "pixel_values" not in batch else len(batch["pixel_values"])
    assert (batch["input_ids"] == processor.image_token_id).sum() == m * num_images
    if whole["input_ids"].shape[1] > max_length and (batch["labels"] == processor.tokenizer.eos_token_id).any():
        assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id  # whole turns
    make_model()(**batch)


# Files that cannot be read ------------------------------------------------------------------------------------------------

FILES = {
    "text.json": (b"no json", "text.json cannot be read: Expecting value"),
    "empty.json": (b"", "empty.json cannot be read: Expecting value"),
    "latin.json": ('["\xe9"]'.encode("latin-1"), "latin.json cannot be read: 'utf-8' codec"),
    "lines.json": (b'{"a": 1}\n{"a": 2}', "lines.json cannot be read: Extra data"),
    "line.jsonl": (b'{"a": 1}\n{"a": ', "line.jsonl cannot be read"),
    "dict.json": (b'{"a": 1}', "dict.json must be a list of rows; got dict"),
    "none.json": (b"[]", "There are no rows in .*none.json"),
    "none.jsonl": (b"\n", "There are no rows in .*none.jsonl"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_named(name, streaming, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(load_conversations(tmp_path / name, streaming=streaming))


def test_files_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([chat("Hi", "Hello")]), encoding="utf-8-sig")
    assert load_conversations(tmp_path / "a.json")[0]["error"] is None


def test_broken_rows_are_refused_before_training(folder):
    rows = [llava("<image>\nWhat?", "A cat.", image="0.png"), chat("Hi", "Hello")]
    (folder / "good.json").write_text(json.dumps(rows))
    refuse_broken(load_conversations(folder / "good.json"))
    odd = {"messages": [{"role": ["user"], "content": "Hi"}]}
    broken = [llava("<image>\nWhat?", "A cat.", image="none.png"), chat("Hi", ""), odd]
    (folder / "bad.json").write_text(json.dumps(rows + broken))
    with pytest.raises(ValueError, match=r"bad\.json\[2\].*no image file .*none.png.* In total 3 samples are broken"):
        refuse_broken(load_conversations(folder / "bad.json"))


def test_files_that_differ_by_their_folder_alone(tmp_path, monkeypatch):
    """By a relative path, with the same size and time, as after `tar` or `rsync`."""
    for answer in ("yes", "noo"):
        (tmp_path / answer).mkdir()
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
        (tmp_path / answer / "rows.json").write_text(json.dumps([{"messages": turns}]))
        os.utime(tmp_path / answer / "rows.json", ns=(1, 1))
    for answer in ("yes", "noo"):
        monkeypatch.chdir(tmp_path / answer)
        assert load_conversations("rows.json")[0]["messages"][1]["content"] == answer
