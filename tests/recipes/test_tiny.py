"""How `mqt-llava-tiny` is made: scenes, LLaVA's data format, labels, and all stages on a toy size."""

import copy
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig

from examples import lora_new_skill
from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration
from mqt_llava.training import train
from mqt_llava.training.data import load_conversations, open_image
from recipes.tiny import drills, evaluate, export, gazes, make_data, pretrain_language, pretrain_vision, scenes, tune
from recipes.tiny.optimizer import MuonAndAdamW


needs_fonts = pytest.mark.skipif(
    not all(map(os.path.exists, scenes.FONTS)), reason="needs fonts-noto-color-emoji, fonts-symbola"
)
seeds = st.integers(0, 2**40)


@given(seed=seeds)
def test_things_lie_inside_the_picture_and_hardly_overlap(seed):
    scene = scenes.make_scene(seed)
    assert scene == scenes.make_scene(seed)
    assert max(scene.width, scene.height) == 1 and min(scene.width, scene.height) >= 0.5
    assert 32 <= scene.pixels <= 3000 and len(scene.things) <= scenes.MAX_THINGS
    assert sum(thing.is_number for thing in scene.things) <= 1
    boxes = []
    for thing in scene.things:
        assert scenes.SMALLEST <= thing.size <= 0.85 and thing.size * scene.pixels > 15.5
        x, y, half = thing.x * scene.width, thing.y * scene.height, thing.size / 2
        assert x - half > -0.1 and x + half < scene.width + 0.1 and y - half > -0.1 and y + half < scene.height + 0.1
        for other_x, other_y, other in boxes:
            assert max(abs(x - other_x), abs(y - other_y)) > 0.8 * (half + other)
        boxes.append((x, y, half))


@given(seed=seeds)
def test_answers_follow_from_the_scene(seed):
    scene = scenes.make_scene(seed)
    names = [thing.name for thing in scene.things]
    turns = scenes.conversation(scene)
    assert turns == scenes.conversation(scene)
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
        elif kind == "number?":
            assert (word == "yes") == any(name.isdecimal() for name in names)
        elif kind == "list":
            things = {f"number {name}" if name.isdecimal() else name: names.count(name) for name in names}
            assert evaluate.read_answer(answer) == (things or {"there is nothing": 1})
        elif word.startswith("there is no "):
            assert word.split()[-1] not in names and (kind != "number" or not any(map(str.isdecimal, names)))
        elif word != "nothing":
            assert word.split()[-1] in names


def a_scene(*things, width=1.0, height=1.0):
    things = tuple(scenes.Thing(name, x, y, size, 0) for name, x, y, size in things)
    return scenes.Scene(0, "red", "plain", width, height, 300, things)


def test_labels_of_a_patch_say_where_it_is_in_the_picture():
    """A picture twice as wide as high: two rows of eight patches are padding on either side, and cells are low and wide."""
    scene = a_scene(("cat", 0.15, 0.2, 0.2), ("cat", 0.9, 0.8, 0.2), width=1.0, height=0.5)
    patches = np.zeros(64, dtype=int)
    patches[[16, 47]], patches[20] = 1 + scenes.KINDS.index("cat"), 1 + pretrain_vision.NAMES.index("7")
    numbers, places, colour, total = pretrain_vision.scene_labels(scene, patches)
    grid = places.reshape(8, 8)
    assert (grid[[0, 1, 6, 7]] == 9).all()
    assert grid[2].tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and grid[5].tolist() == [6, 6, 6, 7, 7, 8, 8, 8]
    assert scenes.COLOURS[colour] == "red" and total == 2
    assert np.flatnonzero(numbers).tolist() == [16, 47] and numbers[[16, 47]].tolist() == [2, 2]


def test_places_are_asked_for_only_where_they_are_plain():
    scene = a_scene(("cat", 0.15, 0.15, 0.2), ("dog", 0.5, 0.34, 0.2), ("bee", 0.8, 0.8, 0.2))
    assert [thing.place for thing in scene.things] == [0, None, 8]  # the dog is near a line
    occupied, empty = scenes.clear_cells(scene)
    assert {cell: thing.name for cell, thing in occupied.items()} == {0: "cat", 8: "bee"}
    assert empty == [2, 3, 5, 6, 7]  # the dog reaches into 1 and 4
    assert scenes.clear_cells(a_scene(("cat", 0.5, 0.5, 0.85)))[1] == []  # it reaches everywhere
    assert [t.place for t in a_scene(("cat", 0.9, 0.5, 0.1), width=1.0, height=0.5).things] == [5]


def test_neighbours_are_asked_for_only_where_they_are_plain():
    def beside(*things):
        return {
            (direction, thing.name): other and other.name
            for direction, thing, other in scenes._neighbours(a_scene(*things))
        }

    row = beside(("cat", 0.2, 0.5, 0.1), ("dog", 0.5, 0.5, 0.1), ("bee", 0.9, 0.5, 0.1))
    assert row["right of", "cat"] == "dog" and row["left of", "bee"] == "dog" and row["left of", "cat"] is None
    assert row["above", "cat"] is None
    diagonal = beside(("cat", 0.2, 0.2, 0.1), ("dog", 0.5, 0.5, 0.1))
    assert ("right of", "cat") not in diagonal and diagonal["left of", "cat"] is None
    alike = beside(("cat", 0.2, 0.5, 0.1), ("dog", 0.6, 0.45, 0.1), ("bee", 0.65, 0.6, 0.1))
    assert ("right of", "cat") not in alike  # dog and bee are about as near
    assert not [key for key in beside(("cat", 0.2, 0.5, 0.1), ("cat", 0.8, 0.5, 0.1)) if "cat" in key]


@given(seed=seeds)
def test_what_differs_differs(seed):
    (first, second), question, answer = scenes.ask_pair(seed)
    assert scenes.ask_pair(seed) == ([first, second], question, answer)
    if question == "What differs?":
        gone, new = (
            [t.name for t in a.things if a.count(t.name) > b.count(t.name)]
            for a, b in ((first, second), (second, first))
        )
        assert (first.colour != second.colour) == (answer == "The background.")
        expected = {
            (0, 0): ("The background.", "Nothing."),
            (1, 0): (f"{scenes._article(gone[0]).capitalize()} is gone." if gone else "",),
            (0, 1): (f"{scenes._article(new[0]).capitalize()} is new." if new else "",),
            (1, 1): (
                f"{scenes._article((new or ['x'])[0]).capitalize()} instead of {scenes._article((gone or ['x'])[0])}.",
            ),
        }
        assert answer in expected[bool(gone), bool(new)]
    elif question.startswith("Which"):
        name = question.rstrip("?").split()[-1]
        shown = [which for which, scene in (("first", first), ("second", second)) if scene.count(name)]
        assert answer == {0: "Neither.", 2: "Both."}.get(len(shown), f"The {''.join(shown)}.")


@needs_fonts
@pytest.mark.parametrize("seed", range(3))
def test_pictures_show_the_scene(seed):
    scene = scenes.make_scene(seed)
    picture, patches, centres = scenes.draw(scene, 256, grid=8)
    assert picture.size == (round(256 * scene.width), round(256 * scene.height))
    assert picture.tobytes() == scenes.draw(scene, 256).tobytes()
    names = {figure for thing in scene.things for figure in (thing.name if thing.is_number else [thing.name])}
    shown = {pretrain_vision.NAMES[i - 1] for i in patches.flatten() if i}
    assert shown <= names and {pretrain_vision.NAMES[i - 1] for i in centres.flatten() if i} <= names
    assert (centres > 0).sum() == len(scene.things)
    assert max(scenes.draw(scene).size) == scene.pixels


@given(seed=seeds)
def test_questions_about_a_new_skill_name_a_new_kind(seed):
    """Of examples/lora_new_skill.py, whatever the scene has, which may be nothing at all."""
    scene, kinds = lora_new_skill.new_scene(seed), [*lora_new_skill.NEW_KINDS, "cherries"]
    assert any(thing.name in kinds for thing in scene.things)
    _, question, answer = lora_new_skill.ask_about_new(scene, np.random.default_rng(seed))
    assert any(kind in f"{question} {answer}".lower() for kind in kinds)


@needs_fonts
def test_held_out_kinds_are_never_line_drawings():
    things = [thing for seed in range(2000) for thing in scenes.make_scene(seed).things]
    lines = {thing.name for thing in things if thing.is_line_drawing}
    assert lines.isdisjoint(scenes.HELD_OUT) and len(lines) > 40
    assert min(thing.size for thing in things if thing.is_line_drawing) >= scenes.LINES_FROM


@pytest.mark.parametrize("name", ["EMOJI_FONT", "LINE_FONT"])
def test_missing_font_is_named(name, monkeypatch):
    monkeypatch.setattr(scenes, name, "/no/such/font.ttf")
    scenes._sprite.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"/no/such/font\.ttf not found\. Install Debian's `fonts-"):
        scenes._sprite("cat", is_line_drawing=name == "LINE_FONT")


@given(seed=seeds)
def test_samples_ask_about_the_picture_first(seed):
    turns = make_data.conversation_sample(seed)["conversations"]
    assert turns[0]["value"].startswith("<image>\n") and sum("<image>" in turn["value"] for turn in turns) == 1
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert turns == make_data.conversation_sample(seed)["conversations"]


def test_answers_name_things_in_any_order():
    two_cats = {"cat": 2, "mouse": 1, "number 42": 1}
    for answer in ("Two cats, a mouse and the number 42.", " A mouse, a cat, the number 42 and a cat."):
        assert evaluate.read_answer(answer) == two_cats
    assert evaluate.read_answer("Two mice.") == {"mouse": 2} != evaluate.read_answer("Two.")
    assert evaluate.read_answer("42.") != evaluate.read_answer("4.")


def test_line_drawings_show_the_kinds_that_they_are_asked_for():
    samples = evaluate.line_drawings(scenes.HELD_OUT, 16)
    named = [evaluate.read_answer(answer) for *_, answer in samples]
    assert named == [{kind: 1} for kind in (*scenes.HELD_OUT, *scenes.HELD_OUT)]
    assert len({pictures[0].tobytes() for pictures, *_ in samples}) == 16


def test_visual_tokens_begin_with_parts_of_the_picture():
    """The first with all of it, the next four with its quarters, later ones with squares of 2 x 2 patches."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=128, patch_size=16, **sizes)
    text = LlamaConfig(vocab_size=32, **sizes)
    options = {"num_query_tokens": 64, "query_transformer_num_attention_heads": 8, "image_token_id": 3}
    config = MQTLlavaConfig(vision_config=vision, text_config=text, **options)
    transformer = MQTLlavaForConditionalGeneration(config).model.query_transformer
    gazes.look_from_coarse_to_fine(transformer)
    masks = gazes.gazes(8)
    assert masks.shape == (64, 64) and masks.sum(1).int().tolist()[:16] == [64] + [16] * 4 + [9] * 9 + [4] * 2
    assert (masks[14:40].sum(0) > 0).float().mean() > 0.8  # some of the small squares cover most of the picture
    # 64 pictures, of which one patch each is not blank: how much of it each token shows
    features = torch.eye(64)[:, :, None] * torch.randn(64, 1, 256)
    with torch.no_grad():
        shown = transformer(features, 64).norm(dim=-1).T
    of_gaze = (shown * masks).sum(1) / shown.sum(1)
    assert of_gaze[0] == 1 and of_gaze[1:].min() > 0.6 and of_gaze.mean() > 0.8


@given(st.integers(0, 2 * drills.FIRST))
def test_drills_are_right_about_what_their_labels_show(seed):
    turns, (covers, centres, numbers, places, colour, _) = drills.drill(seed)
    names = [pretrain_vision.NAMES[covers[patch] - 1] for patch in drills.MIDDLES]
    assert [numbers[patch] for patch in drills.MIDDLES] == [
        min(names.count(name), scenes.MAX_THINGS) for name in names
    ]
    assert (centres > 0).sum() == 9 and all(centres[patch] == covers[patch] for patch in drills.MIDDLES)
    assert [places[patch] for patch in drills.MIDDLES] == list(range(9))
    questions = [turn["value"].removeprefix("<image>\n") for turn in turns[::2]]
    assert turns[0]["value"].startswith("<image>") and len(set(questions)) == len(questions)

    counts = {kind: names.count(kind) for kind in scenes.KINDS}
    words = {kind: scenes.NUMBER_WORDS[count] for kind, count in counts.items() if count <= scenes.MAX_THINGS}
    told = {
        "What is where?": dict(zip(scenes.PLACES, names)),
        "What is there?": {kind: "yes" if count else "no" for kind, count in counts.items()},
        "How many of what?": words,
        "Describe the picture.": {},
    }
    right = {f"What is {scenes.where(cell)}?": scenes.noun(name) for cell, name in enumerate(names)}
    right |= {f"Is there {scenes.noun(kind)}?": told["What is there?"][kind] for kind in scenes.KINDS}
    right |= {f"How many {scenes.plural(kind)} are there?": word for kind, word in words.items()}
    rows = [
        ["nothing"] * 5,
        *(["nothing", *map(scenes.noun, names[i : i + 3]), "nothing"] for i in (0, 3, 6)),
        ["nothing"] * 5,
    ]
    for cell, name in enumerate(names):
        row, column = divmod(cell, 3)
        above, below, left, right_of = (
            rows[row][column + 1],
            rows[row + 2][column + 1],
            *rows[row + 1][column : column + 3 : 2],
        )
        for direction, thing in {"above": above, "below": below, "left of": left, "right of": right_of}.items():
            right[f"What is {direction} the {name}?"] = thing
    for question, answer in zip(questions, (turn["value"] for turn in turns[1::2])):
        if question == "Describe the picture.":
            assert scenes.COLOURS[colour] in answer and all(name in answer for name in names)
        elif question in told:
            parts = [tuple(part.rsplit(" ", 1)) for part in answer.rstrip(".").split(", ")]
            assert parts and all(told[question][about] == said for about, said in parts)
        else:
            assert answer == scenes.sentence(right[question])


@given(seeds)
def test_what_is_told_of_a_scene_is_right(seed):
    scene = scenes.make_scene(seed)
    turns = drills.tell_scene(scene)
    occupied, empty = scenes.clear_cells(scene)
    if turns is None:
        assert not occupied and not empty
        return
    question, answer = (turn["value"].removeprefix("<image>\n") for turn in turns)
    parts = [part.rsplit(" ", 1) for part in answer.rstrip(".").split(", ")]
    if question == "What is where?":
        told = {scenes.PLACES.index(place): name for place, name in parts}
        assert {cell: thing.name for cell, thing in occupied.items()}.items() <= told.items()
        assert all(told[cell] == "nothing" and cell in empty for cell in told if cell not in occupied)
    else:
        assert question == "How many of what?" and len(parts) > 1
        assert parts.pop(0) == ["things", scenes.NUMBER_WORDS[len(scene.things)]]
        assert all(scenes.NUMBER_WORDS[scene.count(kind)] == number for kind, number in parts)


@given(st.lists(st.text(max_size=30), max_size=60))
def test_rows_of_like_length_stand_beside_each_other(rows):
    order = pretrain_language.by_length(rows, chunk=16, batch=4)
    assert sorted(order) == list(range(len(rows)))
    for start in range(0, len(rows) // 16 * 16, 16):
        part = order[start : start + 16]
        assert sorted(part) == list(range(start, start + 16))  # each chunk of its own rows
        lengths = [len(str(rows[row])) for row in part]
        batches = [lengths[i : i + 4] for i in range(0, 16, 4)]
        assert sorted(lengths) == [length for batch in sorted(batches) for length in batch]


def test_the_optimizer_is_muon_for_hidden_matrices_and_goes_on_where_it_was(checkpoint):
    def make():
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        model.model.vision_tower.requires_grad_(False)
        return model, MuonAndAdamW(model, lr=1e-3, weight_decay=0.1)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    model, optimizer = make()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    muon, adamw = optimizer.optimizers
    names = {parameter: name for name, parameter in model.named_parameters()}
    in_muon, in_adamw = ({names[p] for group in part.param_groups for p in group["params"]} for part in (muon, adamw))
    assert in_muon and all(len(shapes[name]) == 2 and "embed" not in name for name in in_muon)
    assert {"lm_head.weight", "model.query_transformer.query", "model.language_model.embed_tokens.weight"} & in_adamw
    assert in_muon | in_adamw == {name for name in shapes if "vision_tower" not in name} and not in_muon & in_adamw

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in muon.param_groups} == {1e-3} and {
        group["lr"] for group in adamw.param_groups
    } == {5e-4}
    del scheduler
    step(model, optimizer, 0)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parts in ((model, optimizer), (other, resumed)):
        step(*parts, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


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


@needs_fonts
@pytest.mark.slow
def test_every_stage_runs_resumes_and_ships(tmp_path):
    data = tmp_path / "data"
    run(make_data, "--output_dir", data, "--pictures", 16)
    vision, start = tmp_path / "vision", tmp_path / "start"
    small = ("--num_hidden_layers", 1, "--hidden_size", 32, "--num_attention_heads", 2)
    vision_data = ("--data_path", data, "--output_dir", vision, "--remove_unused_columns", False)
    run(pretrain_vision, *vision_data, "--max_steps", 2, *small, *TRAINING)
    language = ("--data_path", data, "--vision_tower", vision, "--output_dir", start, "--drills", 8)
    query_transformer = ("--query_transformer_num_attention_heads", 2)
    run(pretrain_language, *language, "--max_steps", 4, *small, *query_transformer, *TRAINING)
    images = ("--image_folder", data / "images", "--bf16", False, "--gradient_accumulation_steps", 1)
    stage1 = ("--stage", 1, "--model", start, "--data_path", data / "captions.json", *images)
    run(train, *stage1, "--output_dir", tmp_path / "stage1", "--max_steps", 2, *TRAINING)
    stage2 = ("--stage", 2, "--model", tmp_path / "stage1", "--data_path", data / "conversations.json", *images)
    run(train, *stage2, "--output_dir", tmp_path / "unbroken", "--max_steps", 4, *TRAINING)

    # Broken off after two steps (a fixed learning rate, so that the schedule is the same), and resumed
    constant = ("--lr_scheduler_type", "constant", *TRAINING)
    run(tune, *stage2, "--output_dir", tmp_path / "whole", "--max_steps", 4, *constant)
    run(tune, *stage2, "--output_dir", tmp_path / "broken", "--max_steps", 2, *constant)
    run(tune, *stage2, "--output_dir", tmp_path / "broken", "--max_steps", 4, "--resume", *constant)
    whole, broken = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage1").state_dict()
    changed = {name.split(".")[1] for name in whole if not torch.equal(whole[name], before[name])}
    assert changed == {"query_transformer", "language_model", "weight"}  # the last is lm_head.weight

    run(export, "--model", tmp_path / "unbroken", "--output_dir", tmp_path / "shipped")
    links = list((tmp_path / "shipped").glob("*.py"))
    assert len(links) == 6 and all(path.is_symlink() and path.exists() for path in links)  # one copy of the code
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
