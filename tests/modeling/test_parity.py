"""Parity with the authors' implementation: its outputs on a tiny random checkpoint are in `tests/reference/dev`.

`tests/reference/official_layout.py` rebuilds that checkpoint from its seed in the authors' layout. It is converted, and
loaded through the Auto classes.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mqt_llava.conversion import convert
from mqt_llava.conversion.files import LazyTensor, read_tensors
from mqt_llava.conversion.names import from_authors
from mqt_llava.training.collator import MQTLlavaDataCollator
from tests.modeling.test_remote_code import fresh_process
from tests.reference import official_layout, parity_inputs


pytestmark = pytest.mark.every_version


REFERENCE = Path(__file__).parent.parent / "reference"
DEV = REFERENCE / "dev"
IMAGE_TOKEN = 32000  # ours; the authors write -200


def read_json(name):
    return json.loads((DEV / name).read_text())


def our_names(official):
    """What the tensor of that name is called after conversion: three names for packed projections."""
    return list(from_authors({official: LazyTensor((3, 3), torch.float32, None)}, 0))


def convert_official(folder, **layout):
    """The tiny checkpoint, converted: the folder of the result."""
    official_layout.write_checkpoint(
        folder / "ckpt", tokenizer_model=str(REFERENCE / "tokenizer.model"), **{"seed": 0, **layout}
    )
    convert(str(folder / "ckpt"), folder / "converted")
    return folder / "converted"


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def pixel_values():
    return torch.from_numpy(parity_inputs.pixel_values(0))


def expand(input_ids, m):
    """Official ids, with -200 for an image, as ours with m placeholders; also which of ours are not placeholders."""
    return [token for i in input_ids for token in ([IMAGE_TOKEN] * m if i == -200 else [i])]


def pad(rows, fill):
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def test_checkpoint_is_the_reference_one(folder):
    found = read_tensors(folder.parent / "ckpt")
    expected = read_json("state_dict.json")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        name: entry["shape"] for name, entry in expected.items()
    }
    for name, tensor in found.items():
        assert hashlib.sha256(tensor.load().numpy().tobytes()).hexdigest() == expected[name]["sha256"], name


@pytest.mark.parametrize("m", [1, 2, 3, 16, 100, 144, 255, 256])
def test_visual_tokens(model, pixel_values, m):
    expected = torch.from_numpy(np.load(DEV / "visual_tokens.npz")[f"m{m}"])
    with torch.no_grad():
        tokens = torch.stack(model.get_image_features(pixel_values, m).pooler_output)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


def test_vision_features_and_query_transformer(model, pixel_values):
    reference = np.load(DEV / "visual_tokens.npz")
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values, 1, output_hidden_states=True)
        features = outputs.last_hidden_state[:, 1:, ::64]
        probe = model.model.query_transformer(torch.from_numpy(parity_inputs.probe_features(0)), 16)
    torch.testing.assert_close(features, torch.from_numpy(reference["clip_features_16ch"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(probe, torch.from_numpy(reference["probe_m16"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", list(read_json("meta.json")["logit_cases"]))
def test_logits(model, pixel_values, case):
    settings, reference = read_json("meta.json")["logit_cases"][case], np.load(DEV / "logits.npz")
    ids, mask = reference[f"{case}/input_ids"], reference[f"{case}/attention_mask"].astype(bool)
    rows = [expand(row[keep].tolist(), settings["m"]) for row, keep in zip(ids, mask)]
    images = settings["images"]
    with torch.no_grad():
        logits = model(
            input_ids=pad(rows, 0),
            attention_mask=pad([[1] * len(row) for row in rows], 0),
            pixel_values=pixel_values[images] if images else None,
            visual_token_counts=torch.tensor([settings["m"]] * len(images)) if images else None,
        ).logits[..., :-1]
    valid = torch.from_numpy(reference[f"{case}/valid"])
    ours = torch.arange(logits.shape[1])[None] < torch.tensor([[len(row)] for row in rows])
    assert int(valid.sum()) == int(ours.sum())

    def compare(values, name):
        expected = torch.from_numpy(reference[f"{case}/{name}"])[valid]
        torch.testing.assert_close(values[ours], expected, atol=1e-3, rtol=0)

    compare(logits[..., :256], "logits256")
    compare(logits.logsumexp(-1), "logsumexp")
    expected = torch.from_numpy(reference[f"{case}/argmax"])[valid].long()
    assert torch.equal(logits[ours].argmax(-1), expected)


@pytest.mark.parametrize("prepared_m", [1, 256])
@pytest.mark.parametrize("m", [2, 16, 256])
def test_greedy_ids(model, pixel_values, m, prepared_m):
    reference = read_json("generate.json")
    input_ids = torch.tensor([expand(reference["input_ids"], prepared_m)])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values[reference["image"]][None],
        num_visual_tokens=m,
        max_new_tokens=reference["max_new_tokens"],
        do_sample=False,
    )
    assert torch.equal(output[:, : input_ids.shape[1]], input_ids)
    assert output[0, input_ids.shape[1] :].tolist() == reference["outputs"][f"m{m}"]["new_ids"]


FRESH = """
processor = AutoProcessor.from_pretrained(task["folder"], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(task["folder"], dtype=torch.float32, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
input_ids = torch.tensor([task["input_ids"]])
for m in task["num_visual_tokens"]:
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=torch.load(task["pixel_values"]),
        num_visual_tokens=m,
        max_new_tokens=task["max_new_tokens"],
        do_sample=False,
    )
    result[m] = output[0, input_ids.shape[1]:].tolist()
result["prompt_ids"] = processor(images=images, text=task["prompt"], num_visual_tokens=1)["input_ids"][0]
"""


def test_fresh_process_without_the_package(folder, pixel_values, tmp_path):
    """Greedy ids and prompt ids where only the converted folder brings the code."""
    reference = read_json("generate.json")
    entry = next(entry for entry in read_json("tokenization.json")["entries"] if entry["prompt"].count("<image>") == 1)
    torch.save(pixel_values[reference["image"]][None], tmp_path / "pixel_values.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    task = {
        "folder": str(folder),
        "images": [str(tmp_path / "photo.png")],
        "input_ids": expand(reference["input_ids"], 1),
        "pixel_values": str(tmp_path / "pixel_values.pt"),
        "num_visual_tokens": [2, 16, 256],
        "max_new_tokens": reference["max_new_tokens"],
        "prompt": entry["prompt"],
    }
    result = fresh_process(FRESH, task, tmp_path)
    assert result["prompt_ids"] == [IMAGE_TOKEN if token == -200 else token for token in entry["ids"]]
    for m in task["num_visual_tokens"]:
        assert result[str(m)] == reference["outputs"][f"m{m}"]["new_ids"]


def test_loss_and_gradients(model, pixel_values):
    reference = read_json("loss.json")
    m = reference["m"]
    rows, labels = [], []
    for ids, targets, mask in zip(reference["input_ids"], reference["labels"], reference["attention_mask"]):
        kept = [(i, t) for i, t, keep in zip(ids, targets, mask) if keep]
        rows.append([token for i, _ in kept for token in ([IMAGE_TOKEN] * m if i == -200 else [i])])
        labels.append([target for i, t in kept for target in ([-100] * m if i == -200 else [t])])
    model.zero_grad()
    loss = model(
        input_ids=pad(rows, 0),
        attention_mask=pad([[1] * len(row) for row in rows], 0),
        labels=pad(labels, -100),
        pixel_values=pixel_values[reference["images"]],
    ).loss
    assert abs(loss.item() - reference["loss"]) < 1e-3
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {name for official in read_json("state_dict.json") for name in our_names(official)}
    unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    assert set(found) == {name for name in theirs if not name.startswith(unused)}
    for name, norm in reference["gradient_l2_norms_stage2"].items():
        if norm is None or name.endswith("ln_k.bias"):  # frozen; or zero in exact arithmetic
            continue
        ours = math.sqrt(sum(found[part].norm().item() ** 2 for part in our_names(name)))
        assert ours == pytest.approx(norm, rel=1e-3), name
    assert (found["model.query_transformer.query"].norm(dim=-1) > 0).sum() == reference["query_rows_with_gradient"]


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("posnoise", {"pos_embed_noise": 0.05}), ("bf16", {"dtype": "bfloat16", "clip_path": "clip_bf16"})],
)
def test_variants(variant, layout, pixel_values, tmp_path):
    """A trained position table (not to be recomputed), and a checkpoint stored in bfloat16, run in float32."""
    model = load(convert_official(tmp_path, **layout))
    reference = np.load(DEV / "variants.npz")
    names = [name for name in reference.files if name.startswith(variant)]
    with torch.no_grad():
        tokens = torch.stack(model.get_image_features(pixel_values, 16).pooler_output)
        input_ids = torch.tensor([expand(read_json("generate.json")["input_ids"], 16)])
        logits = model(input_ids=input_ids, pixel_values=pixel_values[:1]).logits[..., :-1]
    checked = 0
    for name in names:
        expected = torch.from_numpy(reference[name])
        for ours, tolerance in ((tokens, 1e-4), (logits[..., :256], 1e-3), (logits.logsumexp(-1), 1e-3)):
            for candidate in (ours, ours[0]):
                if candidate.shape == expected.shape and expected.is_floating_point():
                    torch.testing.assert_close(candidate, expected, atol=tolerance, rtol=0)
                    checked += 1
    assert checked >= 2, names


def test_separate_vision_tower(model, tmp_path):
    """Without the vision tower inside, the folder that `mm_vision_tower` names gives the same model."""
    other = load(convert_official(tmp_path, include_vision_tower=False)).state_dict()
    assert other.keys() == model.state_dict().keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module", params=[None, True, False], ids=["no_key", "legacy", "legacy_false"])
def processor(request, tmp_path_factory):
    folder = convert_official(tmp_path_factory.mktemp("tokenizer"), legacy=request.param)
    return AutoProcessor.from_pretrained(folder), "_legacy_false" if request.param is False else ""


@pytest.mark.parametrize("entry", read_json("tokenization.json")["entries"], ids=lambda entry: entry["prompt"][-24:])
def test_prompt_ids(processor, entry):
    processor, suffix = processor
    images = [Image.new("RGB", (8, 8))] * entry["prompt"].count("<image>") or None
    inputs = processor(images=images, text=entry["prompt"], num_visual_tokens=1 if images else None)
    expected = entry["ids" + suffix]
    assert [-200 if token == processor.image_token_id else token for token in inputs["input_ids"][0]] == expected
    if "turns" in entry and entry.get("template") is None:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": turn}
            for i, turn in enumerate(entry["turns"])
            if turn is not None
        ]
        assert processor.apply_chat_template(messages) == "<s>" + entry["prompt"]


def test_label_masks(processor):
    """The chat template tells answers and their `</s>` from the rest."""
    processor, suffix = processor
    for entry in read_json("labels.json"):
        if entry["edge"]:
            continue
        turns = entry["turns_after_preprocess_multimodal"]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        images = [Image.new("RGB", (8, 8))] * sum(turn.count("<image>") for turn in turns)
        batch = MQTLlavaDataCollator(processor, 1)([{"messages": messages, "images": images}])
        ids = [-200 if i == processor.image_token_id else i for i in batch["input_ids"][0].tolist()]
        assert ids == entry["input_ids" + suffix], entry["name"]
        assert batch["labels"][0].tolist() == entry["labels" + suffix], entry["name"]


def test_pixels(processor):
    processor, _ = processor
    reference, meta = np.load(DEV / "images.npz"), read_json("meta.json")
    pictures = parity_inputs.rgb_images(0, [tuple(size) for size in meta["image_sizes_wh"]])
    images = [Image.fromarray(picture) for picture in pictures]
    inputs = processor(images=images, text="<image>" * len(images), return_tensors="np")
    assert np.array_equal(inputs["pixel_values"][:, :, ::7, ::7], reference["pixel_values_sample"])
