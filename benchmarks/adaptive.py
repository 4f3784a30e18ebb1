"""What `num_visual_tokens="auto"` brings on questions that nothing was trained or calibrated on.

    python -m benchmarks.adaptive --output_dir docs/benchmarks

The checkpoint's schedule is asked about the pictures of the published accuracy table (`--pictures`), beside every fixed number of
visual tokens. Tokens and passes are those that the language model was given: text, repeats and drafts are counted, padding is not.
Times are of batches and of single questions, interleaved, and include encoding the images. That calibration keeps its promise is
simulated on these and as many other pictures (`--calibration_pictures`), with a larger tolerance, which needs fewer pictures.
"""

import argparse
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mqt_llava
from benchmarks.measure import interleave, machine, peak_memory, seconds
from examples import lora_new_skill
from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, VisualTokenSchedule
from mqt_llava.calibration import Answers, calibrate, collect, doubling, propose
from mqt_llava.evaluation import Question, answer_questions
from mqt_llava.training.adapters import load_adapter
from recipes.tiny import evaluate, families, make_data, scenes


CALIBRATION_SEED = 30_000_000


class Asked:
    """What the language model is given: real tokens and passes, question by question."""

    def __init__(self, model):
        self.tokens = self.passes = 0
        self.handle = model.model.language_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        columns = kwargs["inputs_embeds"].shape[1]
        mask = kwargs["attention_mask"]
        new = (
            mask[:, -columns:].sum(-1) if mask is not None else torch.full(kwargs["inputs_embeds"].shape[:1], columns)
        )
        self.tokens += int(new.sum())
        self.passes += int((new > 0).sum())


def table_of(model, processor, samples, picture, sizes):
    questions = [
        Question(str(i), [{"role": "user", "content": "<image>\n" * len(pictures) + question}], pictures, [answer])
        for i, (pictures, _, question, answer) in enumerate(samples)
    ]
    answers = answer_questions(model, processor, questions, sizes, 80, 96)
    answers = tqdm(answers, total=len(questions) * len(sizes), unit="answer", mininterval=10)
    expected = [evaluate.read_answer(answer) for *_, answer in samples]

    def right(i, text, _):
        return evaluate.read_answer(text) == expected[i]

    return collect(answers, len(questions), sizes, picture, right)


def questions(num_pictures, first_seed):
    """Those about one picture, and which picture that is."""
    samples = [s for s in evaluate.evaluation_set(num_pictures, first_seed=first_seed) if s[1] != "pair"]
    pictures = {id(sample[0]): i for i, sample in enumerate(samples)}
    return samples, np.unique([pictures[id(sample[0])] for sample in samples], return_inverse=True)[1]


def bootstrap(answers, stop, draws=2000):
    """95 % interval of the difference to always M, in points, over pictures."""
    picture = np.unique(answers.picture, return_inverse=True)[1]
    gains, counts = np.bincount(picture, answers.accuracy(stop) - answers.right[-1]), np.bincount(picture)
    drawn = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    means = 100 * gains[drawn].sum(1) / counts[drawn].sum(1)
    return np.quantile(means, [0.025, 0.975])


def prepare(processor, samples, **options):
    """The prompts of questions about one picture."""
    turns = [[{"role": "user", "content": f"<image>\n{question}"}] for _, _, question, _ in samples]
    prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
    options |= {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    return processor(images=[pictures[0] for pictures, *_ in samples], text=prompts, **options)


@torch.no_grad()
def ask_for_real(model, processor, samples, way, batch_size):
    """Answers by `generate`; seconds, and tokens and passes of the language model, for each question."""
    asked, texts, start = Asked(model), [""] * len(samples), time.perf_counter()
    order = sorted(range(len(samples)), key=lambda i: len(samples[i][3]))
    if batch_size == 1:
        order = list(range(len(samples)))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = prepare(processor, [samples[i] for i in rows])
        outputs = model.generate(**inputs, num_visual_tokens=way, max_new_tokens=40, do_sample=False)
        answers = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, answers):
            texts[row] = text.strip()
    asked.handle.remove()
    number = len(samples)
    return texts, (time.perf_counter() - start) / number, asked.tokens / number, asked.passes / number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mqt_llava.TINY_CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--calibration_pictures", type=int, default=600)
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the simulated calibrations, as a share of 1")
    parser.add_argument("--splits", type=int, default=200, help="simulated calibrations")
    parser.add_argument("--timed", type=int, default=384, help="questions that times are taken of")
    parser.add_argument("--caption_adapter", help="tuned on `captions.json` of recipes/tiny: long answers")
    parser.add_argument("--new_skill_adapter", help="the elastic one of examples/lora_new_skill.py")
    parser.add_argument("--rounds", type=int, default=5, help="of the times at full size")
    arguments = parser.parse_args()
    load = partial(AutoModelForImageTextToText.from_pretrained, arguments.model, dtype=torch.float32)
    model = load()
    processor = AutoProcessor.from_pretrained(arguments.model)
    sizes = doubling(model.config.num_query_tokens)

    samples, picture = questions(arguments.calibration_pictures, CALIBRATION_SEED)
    calibrating = table_of(model, processor, samples, picture, sizes)
    schedule = VisualTokenSchedule(**model.generation_config.visual_token_schedule)
    samples, picture = questions(arguments.pictures, evaluate.EVALUATION_SEED)
    answers = table_of(model, processor, samples, picture, sizes)
    long = [(model, "List everything.", scenes.list_all, same)]
    if arguments.caption_adapter:
        captioner = load_adapter(load(), arguments.caption_adapter).merge_and_unload()
        long.append((captioner, "Describe the picture.", scenes.caption, f1_of_phrases))
    sections = [
        lambda: curve(model, processor, samples, answers, schedule, arguments.timed),
        lambda: promise(calibrating, answers, arguments.tolerance, arguments.splits),
        lambda: elsewhere(model, processor, samples[: len(samples) // 5], schedule),
        lambda: long_answers(long, processor, arguments.pictures, sizes),
        lambda: full_size(arguments.rounds),
    ]
    if arguments.new_skill_adapter:
        skilled = load_adapter(load(), arguments.new_skill_adapter).merge_and_unload()
        sections.append(lambda: tuned(skilled, processor, schedule, arguments.pictures, arguments.tolerance, sizes))
    lines = [machine(model.device)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for section in sections:
        lines += ["", *section()]
        (arguments.output_dir / "adaptive.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def sliding(window):
    def confidence(log_probs, _):
        total = np.cumsum(log_probs)
        total[window:] -= total[:-window].copy()
        return np.exp(total.min())

    return confidence


def of_sentences(log_probs, ends):
    return np.exp(min(part.sum() for part in np.split(log_probs, np.flatnonzero(ends)[:-1] + 1)))


MEASURES = {f"least product of {n} in a row": sliding(n) for n in (1, 4, 8, 16, 32)}
MEASURES |= {
    "product of all": lambda log_probs, _: np.exp(log_probs.sum()),
    "product of the first 8": lambda log_probs, _: np.exp(log_probs[:8].sum()),
    "least product of a sentence": of_sentences,
    "geometric mean of all": lambda log_probs, _: np.exp(log_probs.mean()),
}


@torch.no_grad()
def say(model, processor, samples, m, batch_size=96):
    """`(text, log-probabilities of its tokens, whether each ends a sentence)` of the answers with m visual tokens, and how many
    tokens of text the prompts have."""
    said, counts = [], []
    for first in range(0, len(samples), batch_size):
        rows = samples[first : first + batch_size]
        inputs = prepare(processor, rows, num_visual_tokens=m)
        outputs = model.generate(
            **inputs, max_new_tokens=80, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        scores = model.compute_transition_scores(outputs.sequences, outputs.logits, normalize_logits=True)
        counts += (inputs["attention_mask"].sum(-1) - m).tolist()
        for tokens, log_probs in zip(outputs.sequences[:, inputs["input_ids"].shape[1] :].tolist(), scores.numpy()):
            length = next((i + 1 for i, t in enumerate(tokens) if t == processor.tokenizer.eos_token_id), len(tokens))
            ends = np.array(["." in processor.decode([token]) for token in tokens[:length]])
            text = processor.decode(tokens[:length], skip_special_tokens=True).strip()
            said.append((text, log_probs[:length].astype(float), ends))
    return said, np.array(counts)


def same(answer, expected):
    return float(evaluate.read_answer(answer) == evaluate.read_answer(expected))


def f1_of_phrases(answer, expected):
    """Of a description: what is where. All of it is hardly ever right."""
    said, told = (
        {part.strip() for part in re.split(r",|\band\b|\.", text.lower())} - {""} for text in (answer, expected)
    )
    return 2 * len(said & told) / max(1, len(said) + len(told))


def long_answers(ways, processor, num_pictures, sizes):
    """Long answers by several measures of confidence: the cheapest schedule that loses at most half a point on one half of the pictures,
    on the other. `ways` are `(model, question, what is right of a scene, how right an answer is from 0 to 1)`."""
    lines = [
        "Long answers, by measure of confidence: the cheapest schedule that loses at most half a point on one "
        "half of the pictures, asked about the other half. A list is right or wrong; a description, after LoRA "
        "on descriptions, counts by the F1 score of its phrases.",
        "",
        "| question | tokens of an answer | always M, % | confidence | rank correlation with being right, m = 4 | auto, % | visual tokens | language model tokens "
        "| always M |",
        "| --- | ---: | ---: | --- |" + " ---: |" * 5,
    ]
    for model, question, tell, score in ways:
        samples = []
        for seed in range(CALIBRATION_SEED + 1_000_000, CALIBRATION_SEED + 1_000_000 + num_pictures):
            scene = scenes.make_scene(seed)
            if len(scene.things) > 2:
                picture = make_data.prepare(scenes.draw(scene), processor.image_processor.side)
                samples.append(([picture], "list", question, tell(scene)))
        said, counts = zip(*(say(model, processor, samples, m) for m in sizes))
        right = [[score(text, answer) for (text, *_), (*_, answer) in zip(row, samples)] for row in said]
        lengths = np.array([[len(log_probs) for _, log_probs, _ in row] for row in said])
        half = np.arange(len(samples)) % 2 == 0
        for name, measure in MEASURES.items():
            confidence = np.array([[measure(*rest) for _, *rest in row] for row in said])
            answers = Answers(sizes, confidence, np.array(right, float), counts[0], lengths, np.arange(len(samples)))
            proposer, tester = answers.select(half), answers.select(~half)
            kept = [s for s in propose(proposer) if proposer.loss(proposer.stops(s)) <= 0.005]
            stop, every = tester.stops(kept[-1]), np.full((~half).sum(), len(sizes) - 1)
            always = tester.language_model_tokens(VisualTokenSchedule([sizes[-1]], []), every).mean()
            cells = [f"{lengths[-1].mean():.1f}", f"{100 * tester.right[-1].mean():.1f}", name]
            cells += [f"{rank_correlation(confidence[sizes.index(4)], answers.right[sizes.index(4)]):.3f}"]
            cells += [f"{100 * tester.accuracy(stop).mean():.1f}", f"{tester.visual_tokens(stop).mean():.1f}"]
            cells += [f"{tester.language_model_tokens(kept[-1], stop).mean():.1f}", f"{always:.1f}"]
            lines.append(f"| {question} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return lines


def rank_correlation(first, second):
    """Spearman's."""

    def ranks(values):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return np.corrcoef(ranks(first), ranks(second))[0, 1]


def tuned(model, processor, schedule, num_pictures, tolerance, sizes):
    """A new skill's adapter with the schedule of the checkpoint, and calibrated on questions about the new skill."""

    def ask(first_seed):
        samples = lora_new_skill.evaluation_of_new(num_pictures, first_seed)
        return table_of(model, processor, samples, np.arange(len(samples)) // 2, sizes)

    answers, calibrating = ask(evaluate.EVALUATION_SEED), ask(CALIBRATION_SEED + 2_000_000)
    recalibrated = calibrate(calibrating, tolerance, 0.95)
    lines = [
        "A new skill's adapter, asked about the new kinds of objects with the schedule of the checkpoint, and "
        "with one calibrated on other such questions:",
        "",
        "| new kinds, after LoRA | right, % | visual tokens | language model tokens | mean confidence, % |",
        "| --- |" + " ---: |" * 4,
    ]
    ways = {"always M": VisualTokenSchedule(sizes[-1:], []), "schedule of the checkpoint": schedule}
    ways[f"calibrated anew, tolerance {100 * tolerance:g}"] = recalibrated
    for name, way in ways.items():
        stop = answers.stops(way)
        confidence = answers.confidence[stop, np.arange(len(stop))].mean()
        stages = ", ".join(f"{m} ({t:g})" for m, t in zip(way.num_visual_tokens, way.thresholds))
        stages += (", " if stages else "") + str(way.num_visual_tokens[-1])
        figures = [f"{100 * answers.accuracy(stop).mean():.1f}", f"{answers.visual_tokens(stop).mean():.1f}"]
        figures += [f"{answers.language_model_tokens(way, stop).mean():.1f}", f"{100 * confidence:.1f}"]
        lines.append(f"| {name}: {stages} | " + " | ".join(figures) + " |")
    return lines


class Scripted(LogitsProcessor):
    """Every answer says the same, surely, but for its last token."""

    def __init__(self, prompt_length, num_new_tokens):
        self.last = prompt_length + num_new_tokens - 1

    def __call__(self, input_ids, scores):
        token = 100 + input_ids.shape[1] % 100
        scores = torch.zeros_like(scores)
        scores[:, token] = 5.0 if input_ids.shape[1] == self.last else 50.0
        return scores


def full_size(rounds):
    """One escalation from 8 to 64 visual tokens, of an answer that is doubted at its last token and then confirmed, beside asking at
    64 at once: a language model of 0.4 B with random weights, M = 256."""
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=32064,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = MQTLlavaConfig(vision_config=vision, text_config=text, query_transformer_num_attention_heads=4)
    model = MQTLlavaForConditionalGeneration(config).eval()
    # Text before the image as long as LLaVA 1.5's system prompt, a short question behind it
    ids = torch.cat([torch.arange(1000, 1035), torch.full((64,), config.image_token_id), torch.arange(2000, 2020)])[
        None
    ]
    features = BaseModelOutputWithPooling(pooler_output=[torch.randn(64, text.hidden_size)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": features}}
    schedules = {"8": 8, "64": 64, "8 -> 64": VisualTokenSchedule([8, 64], [0.99])}

    def ask(m, number):
        script = Scripted(ids.shape[1], number)
        options = {"logits_processor": [script], "do_sample": False, "return_dict_in_generate": True}
        outputs = model.generate(**inputs, num_visual_tokens=m, max_new_tokens=number, **options)
        assert not isinstance(m, VisualTokenSchedule) or outputs.stages.tolist() == [1]

    ways = {
        (name, number): partial(seconds, partial(ask, m, number), model.device)
        for number in (4, 20)
        for name, m in schedules.items()
    }
    taken, _ = interleave(ways, rounds)
    lines = [
        "One escalation at full size, time and peak memory beside the weights: the answer is doubted at its last token and then "
        "confirmed. A language model of 0.4 B with random weights, M = 256.",
        "",
    ]
    columns = [*(f"{name}, s" for name in schedules), "8 -> 64 / 64", *(f"{name}, MB" for name in schedules)]
    lines += ["| tokens of the answer | " + " | ".join(columns) + " |", "| ---: |" + " ---: |" * len(columns)]
    for number in (4, 20):
        cells = [f"{np.median(taken[name, number]):.2f}" for name in schedules]
        cells.append(f"{np.median(taken['8 -> 64', number] / taken['64', number]):.2f}")
        cells += [f"{peak_memory(partial(ask, m, number), model.device) / 1e6:.1f}" for m in schedules.values()]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return lines


def elsewhere(model, processor, samples, schedule):
    """The same schedule on pictures that it was not calibrated for, against always M, and what its confidence is worth there."""
    sizes = sorted({*schedule.num_visual_tokens, model.config.num_query_tokens})
    blank, half = Image.new("RGB", (128, 128), (128, 128, 128)), len(samples) // 2
    sets = {
        "blank": [evaluate.about_nothing(sample, blank) for sample in samples],
        "another picture": [(samples[i - half][0], *rest) for i, (_, *rest) in enumerate(samples)],
        "line drawings of kinds never drawn so": evaluate.line_drawings(scenes.HELD_OUT, 224),
    }
    for family in families.FAMILIES:
        painted = [(seed, families.paint(family, seed)) for seed in range(60)]
        sets[f"family {family}"] = [
            ([picture], kind, question, answer if isinstance(answer, str) else families.say(answer))
            for seed, (picture, colour, things) in painted
            for kind, question, answer in families.questions(colour, things, seed)
        ]
    lines = [
        "The same schedule on pictures that it was not calibrated on:",
        "",
        "| pictures | always M, % | auto, % | visual tokens | mean confidence, % | confidence of at least 90, % right |",
    ]
    lines.append("| --- |" + " ---: |" * 5)
    for name, some in sets.items():
        answers = table_of(model, processor, some, np.arange(len(some)), sizes)
        stop = answers.stops(schedule)
        confidence = answers.confidence[stop, np.arange(len(stop))]
        right = answers.accuracy(stop)
        sure = right[confidence >= 0.9]
        figures = [answers.right[-1].mean(), right.mean(), None, confidence.mean(), sure.mean() if len(sure) else None]
        cells = ["" if figure is None else f"{100 * figure:.1f}" for figure in figures]
        cells[2] = f"{answers.visual_tokens(stop).mean():.1f}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def promise(calibrating, answers, tolerance, num_splits):
    """How often a schedule, calibrated on pictures drawn from all that there are, loses more than it may on the others."""
    joined = {
        name: np.concatenate([getattr(calibrating, name), getattr(answers, name)], axis=-1)
        for name in ("confidence", "right", "new_tokens", "text_tokens")
    }
    picture = np.concatenate([calibrating.picture, answers.picture + calibrating.picture.max() + 1])
    both = Answers(answers.num_visual_tokens, picture=picture, **joined)
    pictures, rng = np.unique(picture), np.random.default_rng(0)
    found = []
    for split in range(num_splits):
        chosen = np.isin(picture, rng.permutation(pictures)[: len(pictures) // 2])
        schedule = calibrate(both.select(chosen), tolerance, 0.95, seed=split)
        if len(schedule.num_visual_tokens) > 1 or schedule.num_visual_tokens[0] < both.num_visual_tokens[-1]:
            others = both.select(~chosen)
            stop = others.stops(schedule)
            found.append((others.loss(stop), others.visual_tokens(stop).mean()))
    said = f"Calibrated with a tolerance of {100 * tolerance:g} points: of {num_splits} random halves of {len(pictures)} pictures, "
    if not found:
        return [said + "none gave a schedule."]
    lost, tokens = np.array(found).T
    return [
        f"{said}{len(found)} gave a schedule ({tokens.mean():.1f} visual tokens on average); {int((lost > tolerance).sum())} of them lost "
        f"more than {100 * tolerance:g} points on the other half (mean {100 * lost.mean():+.2f}, largest {100 * lost.max():+.2f}). Allowed are "
        "one in twenty."
    ]


def curve(model, processor, samples, answers, schedule, timed):
    sizes, number = answers.num_visual_tokens, len(samples)
    expected = [evaluate.read_answer(answer) for *_, answer in samples]
    stop = answers.stops(schedule)
    texts, _, tokens, passes = ask_for_real(model, processor, samples, schedule, 96)
    right = np.mean([evaluate.read_answer(text) == e for text, e in zip(texts, expected)])
    rng = np.random.default_rng(0)
    subset = [samples[i] for i in rng.permutation(number)[:timed]]
    ways = {**{str(m): m for m in sizes}, "auto": schedule}
    durations = {(name, size): [] for name in ways for size in (48, 1)}
    for _ in range(3):
        for (name, size), taken in durations.items():
            some = subset if size > 1 else subset[: timed // 4]
            taken.append(ask_for_real(model, processor, some, ways[name], size)[1])
    stages = " -> ".join(map(str, schedule.num_visual_tokens))
    lines = [
        f"{number} questions about {len(np.unique(answers.picture))} pictures. Schedule {stages}, thresholds {schedule.thresholds}.",
        "",
        "| m | accuracy, % | against M, 95 % interval | visual tokens | language model tokens | passes | ms, batch of 48 | ms, one by one |",
        "| --- |" + " ---: |" * 7,
    ]

    def row(name, accuracy, stop, *figures):
        low, high = bootstrap(answers, stop)
        visual = answers.visual_tokens(stop).mean()
        cells = [f"{100 * accuracy:.2f}", f"{low:+.2f} to {high:+.2f}", f"{visual:.2f}", *figures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for i, m in enumerate(sizes):
        fixed = np.full(number, i)
        single = VisualTokenSchedule([m], [])
        figures = [answers.language_model_tokens(single, fixed).mean(), answers.new_tokens[i].mean()]
        times = [1000 * min(durations[str(m), size]) for size in (48, 1)]
        row(m, answers.right[i].mean(), fixed, *(f"{figure:.2f}" for figure in (*figures, *times)))
    times = [1000 * min(durations["auto", size]) for size in (48, 1)]
    row("auto", right, stop, *(f"{figure:.2f}" for figure in (tokens, passes, *times)))
    row("the same at random", answers.accuracy(rng.permutation(stop)).mean(), rng.permutation(stop), *[""] * 4)
    oracle = np.where(answers.right.any(0), answers.right.argmax(0), 0)
    row("oracle", answers.accuracy(oracle).mean(), oracle, *[""] * 4)
    return lines


if __name__ == "__main__":
    main()
