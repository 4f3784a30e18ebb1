"""TRL's trainers on images and on mixed data, with a model and a processor that know nothing of them."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from transformers import AutoProcessor

import mqt_llava
from mqt_llava import MQTLlavaForConditionalGeneration
from mqt_llava.conversion.authors import load_llama_tokenizer
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import load_conversations
from mqt_llava.training.lora import make_lora_config
from tests.documentation import ROOT, run_python
from tests.reference import REFERENCE, official_layout
from tests.small_model import NUM_QUERY_TOKENS, make_config, make_images


trl = pytest.importorskip("trl")
M = NUM_QUERY_TOKENS


def say(role, text):
    return {"role": role, "content": text}


def make_rows(kind, mixed=False):
    """Rows whose questions tell the grey level of their image, two of them without one if `mixed`."""
    rows = []
    for index in range(4):
        level = 40 * (index + 1)
        images = [] if mixed and index in (0, 2) else [PILImage.new("RGB", (20, 20), (level,) * 3)]
        prompt = [say("user", f"level {level}?")]
        row = {"images": images, "prompt": prompt}
        if kind == "SFT":
            row = {"images": images, "messages": [*prompt, say("assistant", "Grey.")]}
        elif kind == "DPO":
            row |= {"chosen": [say("assistant", "Grey.")], "rejected": [say("assistant", "A cat, no.")]}
        elif kind == "KTO":
            row |= {"completion": [say("assistant", "Grey." if index % 2 else "A cat.")], "label": bool(index % 2)}
        rows.append(row)
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def make_trainer(kind, model, processor, folder, dataset=None, mixed=False, **settings):
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    extra = {}
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    if kind in ("GRPO", "RLOO"):
        extra["reward_funcs"] = lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]
        common |= {"num_generations": 2, "max_completion_length": 3, "beta": 0.04, "num_iterations": 2}
        common["gradient_accumulation_steps"] = 2  # so that TRL shuffles and splits what it has rolled out
    for name in ("peft_config", "data_collator", "callbacks"):
        if name in settings:
            extra[name] = settings.pop(name)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | common | settings
    dataset = make_rows(kind, mixed) if dataset is None else dataset
    return trainer_class(
        model, args=config_class(str(folder), **settings), train_dataset=dataset, processing_class=processor, **extra
    )


def watch(model, processor):
    """All that the model is given from now on, as `(how, [(question's level, number of placeholders, image's level), ...])`."""
    seen = []
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]

    def note(how, input_ids, pixel_values):
        images, rows = iter(() if pixel_values is None else pixel_values), []
        for row in input_ids:
            count = int((row == processor.image_token_id).sum())
            level = int(re.search(r"level (\d+)", processor.tokenizer.decode(row)).group(1))
            image = round(float(next(images)[0].mean() * std + mean) * 255) if count else None
            rows.append((level, count, image))
        assert next(images, None) is None
        seen.append((how, rows))

    generate = model.generate

    def watched_generate(*args, **kwargs):
        note("generate", kwargs["input_ids"], kwargs.get("pixel_values"))
        model.generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            model.generating = False

    def before_forward(module, args, kwargs):
        if not getattr(module, "generating", False):
            note("forward", kwargs["input_ids"], kwargs.get("pixel_values"))

    model.generate = watched_generate
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    return seen


@pytest.mark.parametrize("mixed", [False, True], ids=["images", "mixed"])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_trainers_pair_images_with_their_prompts(kind, mixed, checkpoint, tmp_path):
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint, num_visual_tokens=4)
    trainer = make_trainer(kind, model, processor, tmp_path, mixed=mixed)
    seen = watch(trainer.model, processor)
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert {how for how, _ in seen} == {"forward", *(["generate"] if kind in ("GRPO", "RLOO") else [])}
    levels = [40, 80, 120, 160]
    with_images = {level for level in levels if not mixed or level in (80, 160)}
    for how, rows in seen:
        for level, count, image in rows:
            assert (count, image) == ((4, level) if level in with_images else (0, None)), (how, rows)
    assert len({level for _, rows in seen for level, *_ in rows}) >= 2


@pytest.fixture(scope="session")
def folder_without_code(checkpoint, tmp_path_factory):
    """A checkpoint like the one that the package ships."""
    folder = tmp_path_factory.mktemp("without_code") / "checkpoint"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.py"))
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        content.pop("auto_map", None)
        file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("has_code", [True, False])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_trainers_load_a_checkpoint_by_its_path(kind, has_code, checkpoint, folder_without_code, tmp_path):
    folder = str(checkpoint if has_code else folder_without_code)
    trainer = make_trainer(kind, folder, AutoProcessor.from_pretrained(folder), tmp_path)
    models = [trainer.model] if kind == "SFT" else [trainer.model, trainer.ref_model]
    assert {type(model) for model in models} == {MQTLlavaForConditionalGeneration}


def test_a_config_without_code_says_so():
    config = mqt_llava.MQTLlavaConfig()
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
    config.auto_map["AutoModel"] = "changes no other config"
    assert mqt_llava.MQTLlavaConfig().auto_map == {}
    with pytest.raises(AttributeError, match="no attribute 'num_queries'"):
        config.num_queries


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_trainers_tune_adapters(kind, checkpoint, tmp_path):
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint)
    config = make_lora_config(model, ["language_model", "query_transformer"], r=2)
    trainer = make_trainer(kind, model, AutoProcessor.from_pretrained(checkpoint), tmp_path, peft_config=config)
    trainer.train()
    adapters = [value for name, value in trainer.model.named_parameters() if "lora_B" in name and "ref" not in name]
    assert all(value.abs().sum() > 0 for value in adapters)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_answers_are_scored_with_the_visual_tokens_they_were_made_with(kind, checkpoint, tmp_path):
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint, num_visual_tokens=3)
    # one step, so that the weights are the same in all
    trainer = make_trainer(
        kind, model, processor, tmp_path, mixed=True, max_steps=1, generation_kwargs={"num_visual_tokens": 3}
    )
    visual_tokens = {"generate": [], "forward": []}
    encode, generate = model.model.get_image_features, model.generate
    how = ["forward"]

    def watched_encode(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        visual_tokens[how[-1]] += [tokens.detach() for tokens in outputs.pooler_output]
        return outputs

    def watched_generate(*args, **kwargs):
        how.append("generate")
        try:
            return generate(*args, **kwargs)
        finally:
            how.pop()

    model.model.get_image_features, model.generate = watched_encode, watched_generate
    trainer.train()
    assert visual_tokens["generate"] and visual_tokens["forward"]
    for tokens in visual_tokens["forward"]:
        assert tokens.shape[0] == 3
        assert any(torch.allclose(tokens, others, atol=1e-5) for others in visual_tokens["generate"])


@pytest.mark.parametrize("where", ["generation_kwargs", "generation_config"])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rollouts_with_other_visual_tokens_than_the_prompts_are_refused(kind, where, checkpoint, tmp_path):
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint)
    settings = {}
    if where == "generation_kwargs":
        settings["generation_kwargs"] = {"num_visual_tokens": 3}
    else:
        model.generation_config.num_visual_tokens = 3
    trainer = make_trainer(kind, model, AutoProcessor.from_pretrained(checkpoint), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"sets `num_visual_tokens` to 3.*AutoProcessor.*num_visual_tokens"):
        trainer.train()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
def test_answers_have_the_tokens_of_a_chat_with_llamas_tokenizer(kind, legacy, tmp_path):
    """TRL tokenizes prompts and answers apart."""
    official_layout.write_tokenizer(str(tmp_path), str(REFERENCE / "tokenizer.model"), 2048, legacy)
    side = {"height": 30, "width": 30}
    image_processor = mqt_llava.MQTLlavaImageProcessor(size=side, crop_size=side, num_visual_tokens=M)
    tokenizer = load_llama_tokenizer(tmp_path, legacy=legacy)
    processor = mqt_llava.MQTLlavaProcessor(image_processor, tokenizer, num_query_tokens=M)
    config = make_config(image_token_id=processor.image_token_id)
    config.text_config.vocab_size = len(tokenizer)
    rows = make_rows("DPO" if kind == "DPO" else "KTO", mixed=True)
    if kind == "SFT":
        rows = rows.remove_columns("label")
    MQTLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")  # TRL loads a second one
    trainer = make_trainer(kind, str(tmp_path / "model"), processor, tmp_path / "run", rows)
    batch = next(iter(trainer.get_train_dataloader()))
    answers = [answer for row in rows for name in ("completion", "chosen", "rejected") for answer in row.get(name, [])]
    chats = [{"messages": [*row["prompt"], a], "images": row["images"]} for row in rows for a in answers]
    expected = MQTLlavaDataCollator(processor)(chats)
    expected = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(expected["input_ids"], expected["attention_mask"])}
    got = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])}
    assert got <= expected


def test_texts_that_are_no_answers_keep_their_space(tmp_path):
    official_layout.write_tokenizer(str(tmp_path), str(REFERENCE / "tokenizer.model"), 2048, True)
    tokenizer = load_llama_tokenizer(tmp_path, legacy=True)
    processor = mqt_llava.MQTLlavaProcessor(mqt_llava.MQTLlavaImageProcessor(), tokenizer)
    for text in (" a", "a", " </s>", "</s>", "a</s>"):
        for special in (True, False):
            ids = processor(text=text, add_special_tokens=special)["input_ids"]
            assert ids == [tokenizer(text, add_special_tokens=special)["input_ids"]]
    assert processor(text=" a</s>")["input_ids"] == [tokenizer(" a</s>")["input_ids"]]
    assert processor(text=" a</s>", add_special_tokens=False)["input_ids"] == [
        tokenizer("a</s>", add_special_tokens=False)["input_ids"]
    ]


def test_recipes_of_the_docs_run(folder_without_code, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mqt_llava, "TINY_CHECKPOINT", str(folder_without_code))
    short = '"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"'
    namespace = run_python("docs/trl.md", {'"max_steps": 100': short})
    assert namespace["trainer"].state.global_step == 1


@pytest.mark.parametrize("form", ["images", "image", "parts", "prompt and completion", "load_conversations"])
def test_sft_with_our_collator_has_its_labels_whatever_the_rows(form, checkpoint, tmp_path):
    image = make_images(1)[0]
    image.save(tmp_path / "a.png")
    path, turns = str(tmp_path / "a.png"), [say("user", "What?"), say("assistant", "A cat.")]
    parts = [{"type": "image", "path": path, "text": None}, {"type": "text", "path": None, "text": "What?"}]
    row = {
        "images": {"messages": turns, "images": [path]},
        "image": {"messages": turns, "image": path},
        "parts": {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[1]]}]},
        "prompt and completion": {"prompt": turns[:1], "completion": turns[1:], "images": [path]},
        "load_conversations": {"messages": turns, "images": ["a.png"]},
    }[form]
    if form == "load_conversations":
        (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
        data = load_conversations(tmp_path / "rows.json")
    else:
        data = Dataset.from_list([row] * 4)
        if form == "images":
            data = data.cast_column("images", List(Image()))
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = MQTLlavaForConditionalGeneration.from_pretrained(checkpoint)
    trainer = make_trainer(
        "SFT",
        model,
        processor,
        tmp_path / "run",
        data,
        data_collator=MQTLlavaDataCollator(processor, 3),
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    batch = next(iter(trainer.get_train_dataloader()))
    answer = "What?" if form == "parts" else "A cat."
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        assert processor.decode(labels[labels != -100]) == f" {answer}</s>"
        assert (ids == processor.image_token_id).sum() == 3
    assert torch.equal(
        batch["pixel_values"][0], processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    )
    trainer.train()
