"""The recipe of the small checkpoint: scenes, LLaVA's data format, labels, and all stages on a toy size."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from mqt_llava.training import make_data, pretrain_text, pretrain_vision, scenes, train
from mqt_llava.training.data import load_conversations, open_image
from recipes.tiny import assemble, export


REFERENCE = Path(__file__).parent.parent / "reference"
needs_font = pytest.mark.skipif(not os.path.exists(scenes.EMOJI_FONT), reason="needs fonts-noto-color-emoji")
seeds = st.integers(0, 2**40)


@given(seed=seeds)
def test_answers_follow_from_the_scene(seed):
    scene = scenes.make_scene(seed)
    assert scene == scenes.make_scene(seed)
    names = [thing.name for thing in scene.things]
    assert 1 <= len(names) <= scenes.MAX_THINGS and len({thing.cell for thing in scene.things}) == len(names)
    turns = scenes.conversation(scene)
    assert turns == scenes.conversation(scene) and turns[-1][0] == "list"
    assert len({question for _, question, _ in turns}) == len(turns)
    for kind, question, answer in turns:
        word = answer.rstrip(".").lower()
        if kind == "colour":
            assert word == scene.colour
        elif kind == "total":
            assert scenes.NUMBER_WORDS.index(word) == len(names)
        elif kind == "exists":
            asked = question.rstrip("?").split(" a ")[-1].split(" an ")[-1]
            assert (word == "yes") == (asked in names)
        elif kind == "count":
            asked = next(k for k in scenes.KINDS if f" {scenes.PLURALS.get(k, k + 's')} are" in question)
            assert scenes.NUMBER_WORDS.index(word) == names.count(asked)
        elif kind == "digit":
            assert word in names
        elif kind == "number?":
            assert (word == "yes") == any(name in scenes.DIGITS for name in names)
        elif kind == "list":
            assert [w for w in word.replace(",", " ").split() if w in scenes.KINDS + scenes.DIGITS] == names
        elif word != "nothing":
            assert word.split()[-1] in names


@given(seed=seeds, count=st.integers(2, 9))
def test_conversations_can_be_limited(seed, count):
    assert len(scenes.conversation(scenes.make_scene(seed), count)) <= count


@needs_font
def test_pictures_show_the_scene():
    scene = scenes.make_scene(0)
    picture, patches = scenes.draw(scene, 96, grid=8)
    assert picture.size == (96, 96) and picture.tobytes() == scenes.draw(scene, 96).tobytes()
    shown = {(scenes.KINDS + scenes.DIGITS)[i - 1] for i in patches.flatten() if i}
    assert shown == {thing.name for thing in scene.things}
    assert scenes.draw(scene, 384).size == (384, 384)


def test_missing_font_is_named(monkeypatch):
    monkeypatch.setattr(scenes, "EMOJI_FONT", "/no/such/font.ttf")
    scenes._sprite.cache_clear()
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        scenes.draw(next(s for s in map(scenes.make_scene, range(99)) if not s.things[0].is_digit))


@given(seed=seeds)
def test_short_samples_ask_about_the_picture_first(seed):
    turns = make_data.short_sample(seed)["conversations"]
    assert turns[0]["value"].startswith("<image>\n") and sum("<image>" in turn["value"] for turn in turns) == 1
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert turns == make_data.short_sample(seed)["conversations"]


def run(module, *arguments):
    """Call a module's command line in this process."""
    old, sys.argv = sys.argv, [module.__name__, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = old


TRAINING = (
    "--use_cpu --report_to none --disable_tqdm True --per_device_train_batch_size 4 --save_steps 2 --seed 1".split()
)


@needs_font
@pytest.mark.slow
def test_every_stage_runs_resumes_and_ships(tmp_path):
    data = tmp_path / "data"
    run(make_data, "--output_dir", data, "--pictures", 16, "--texts", 16)
    vision, text = tmp_path / "vision", tmp_path / "text"
    small = ("--num_hidden_layers", 1, "--hidden_size", 32, "--num_attention_heads", 2)
    run(
        pretrain_vision,
        *("--output_dir", vision, "--num_pictures", 16, "--max_steps", 2, "--remove_unused_columns", False),
        *small,
        *TRAINING,
    )
    text_data = ("--data_path", data / "text.json", "--output_dir", text, "--remove_unused_columns", False)
    run(pretrain_text, *text_data, "--max_steps", 2, *small, *TRAINING)
    start = tmp_path / "start"
    run(assemble, "--vision_tower", vision, "--language_model", text, "--output_dir", start)
    images = ("--image_folder", data / "images", "--bf16", False, "--gradient_accumulation_steps", 1)
    stage1 = ("--stage", 1, "--model", start, "--data_path", data / "captions.json", *images)
    run(train, *stage1, "--output_dir", tmp_path / "stage1", "--max_steps", 2, *TRAINING)
    stage2 = ("--stage", 2, "--model", tmp_path / "stage1", "--data_path", data / "conversations.json", *images)
    run(train, *stage2, "--output_dir", tmp_path / "unbroken", "--max_steps", 4, *TRAINING)

    # Broken off after two steps (a fixed learning rate, so that the schedule is the same), and resumed
    constant = ("--lr_scheduler_type", "constant", *TRAINING)
    run(train, *stage2, "--output_dir", tmp_path / "whole", "--max_steps", 4, *constant)
    run(train, *stage2, "--output_dir", tmp_path / "broken", "--max_steps", 2, *constant)
    run(train, *stage2, "--output_dir", tmp_path / "broken", "--max_steps", 4, "--resume", *constant)
    whole, broken = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage1").state_dict()
    changed = {name.split(".")[1] for name in whole if not torch.equal(whole[name], before[name])}
    assert changed == {"query_transformer", "language_model", "weight"}  # the last is lm_head.weight

    run(export, "--model", tmp_path / "unbroken", "--output_dir", tmp_path / "shipped")
    links = list((tmp_path / "shipped").glob("*.py"))
    assert len(links) == 5 and all(path.is_symlink() and path.exists() for path in links)  # one copy of the code
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "shipped", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "shipped", trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and model.generation_config.use_cache
    sample = load_conversations(data / "conversations.json", data / "images")[0]
    inputs = processor(images=[open_image(path) for path in sample["images"]], text="<image>", return_tensors="pt")
    assert model.generate(**inputs, num_visual_tokens=2, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    with pytest.raises(SystemExit, match="not empty"):
        run(export, "--model", tmp_path / "unbroken", "--output_dir", tmp_path / "shipped")


@pytest.mark.parametrize("num_visual_tokens", [[0], [1, 17]])
def test_bad_num_visual_tokens_are_refused_before_training(num_visual_tokens, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="num_visual_tokens"):
        run(
            train,
            *("--stage", 2, "--model", checkpoint, "--data_path", "none", "--image_folder", "none"),
            *("--output_dir", tmp_path, "--use_cpu", "--num_visual_tokens", *num_visual_tokens),
        )
