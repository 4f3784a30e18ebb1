"""lmms-eval itself with our model, on the task of `examples/lmms_eval`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

from mqt_llava import TINY_CHECKPOINT, VisualTokenSchedule
from mqt_llava.cost import CostModel
from mqt_llava.evaluation import answer_questions, load_metric, read_questions
from mqt_llava.evaluation.lmms import MQTLlavaLmms, MQTLlavaSimpleLmms
from mqt_llava.training.lora import make_lora_config


pytestmark = pytest.mark.lmms

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "lmms_eval"
PICTURES = sorted((TASK / "images").glob("*.png"))
NUM_VISUAL_TOKENS = (1, 4, 16, 64)
GREEDY = {"until": ["\n\n"], "max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="session")
def tasks():
    return TaskManager(include_path=str(TASK))


@pytest.fixture(scope="session")
def lm():
    return MQTLlavaLmms(TINY_CHECKPOINT, num_visual_tokens=16, batch_size=4)


def ask(lm, messages, settings=GREEDY):
    """Hand a model requests as lmms-eval does, one for each list of messages."""
    lm.task_dict = {"task": {"test": messages}}
    requests = []
    for doc_id, turns in enumerate(messages):
        text = "".join(part["text"] for part in turns[-1]["content"] if part["type"] == "text")
        arguments = (text, lambda doc: doc, settings, doc_id, "task", "test")
        metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
        requests.append(Instance("generate_until", arguments, idx=0, metadata=metadata))
    return lm.generate_until(requests)


def user(text, *images, kind="image"):
    parts = [{"type": kind, "url": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def ours():
    """Our own evaluator's answers to the same questions: `{(m, index): answer}`."""
    model = MQTLlavaLmms(TINY_CHECKPOINT)
    questions = read_questions(TASK / "questions.json", TASK)
    answers = answer_questions(model._model, model.processor, questions, list(NUM_VISUAL_TOKENS), max_new_tokens=40)
    return {(answer.num_visual_tokens, answer.index): answer for answer in answers}


@pytest.mark.parametrize("m", NUM_VISUAL_TOKENS)
def test_accuracy_is_that_of_our_evaluator_question_by_question(m, tasks, ours):
    model_args = f"pretrained={TINY_CHECKPOINT},num_visual_tokens={m}"
    results = evaluator.simple_evaluate(
        "mqt_llava", model_args, tasks=["mqt_scenes"], task_manager=tasks, batch_size=8
    )
    samples, metric = results["samples"]["mqt_scenes"], load_metric("exact_match")
    questions = read_questions(TASK / "questions.json", TASK)
    assert len(samples) == len(questions) == 60
    scores = []
    for index, (sample, question) in enumerate(zip(samples, questions)):
        assert sample["filtered_resps"] == [ours[m, index].text]
        assert sample["token_counts"] == [
            {
                "input_tokens": ours[m, index].num_text_tokens + m,
                "output_tokens": ours[m, index].num_new_tokens,
                "visual_tokens": m,
            }
        ]
        scores.append(metric(ours[m, index].text, question.references))
    assert results["results"]["mqt_scenes"]["exact_match,none"] == pytest.approx(sum(scores) / 60)
    costs = CostModel(get_config())
    flops = [
        costs(m, num_text_tokens=said.num_text_tokens, num_new_tokens=said.num_new_tokens).flops
        for (size, _), said in ours.items()
        if size == m
    ]
    assert results["throughput"]["avg_visual_tokens"] == m
    assert results["throughput"]["avg_gflops"] == pytest.approx(sum(flops) / 60 / 1e9)
    assert results["throughput"]["avg_failed"] == 0


def get_config():
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(TINY_CHECKPOINT)


def run_command(*command, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_command_and_ranks(tmp_path):
    """The command of the README, and the same shared by two processes."""
    arguments = ["--model", "mqt_llava", "--model_args", f"pretrained={TINY_CHECKPOINT},num_visual_tokens=4"]
    arguments += [
        "--batch_size",
        "8",
        "--include_path",
        str(TASK),
        "--tasks",
        "mqt_scenes",
        "--log_samples",
        "--limit",
        "9",
    ]
    runs = {
        "one": [str(Path(sys.executable).parent / "lmms-eval")],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "lmms_eval",
        ],
    }
    found = {}
    for name, command in runs.items():
        log = run_command(*command, *arguments, "--output_path", str(tmp_path / name))
        (results,) = (tmp_path / name).glob("*/*_results.json") or [log]
        (samples,) = (tmp_path / name).glob("*/*_samples_mqt_scenes.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[name] = json.loads(results.read_text()), [(row["filtered_resps"], row["token_counts"]) for row in rows]
        assert "avg_visual_tokens" in log
    assert found["one"][1] == found["two"][1]
    assert len(found["one"][1]) == 9
    one, two = (results for results, _ in found.values())
    assert one["results"] == two["results"]
    for name in ("total_gen_tokens", "avg_visual_tokens", "avg_gflops"):
        assert one["throughput"][name] == pytest.approx(two["throughput"][name])


def test_registered_under_its_name():
    assert get_model("mqt_llava") is get_model("mqt-llava") is MQTLlavaLmms
    assert get_model("mqt_llava", force_simple=True) is MQTLlavaSimpleLmms


def test_registered_whatever_is_imported_first():
    code = "import mqt_llava.evaluation.lmms as ours; from lmms_eval.models import get_model; "
    done = run_command(sys.executable, "-c", f"{code}print(get_model('mqt_llava') is ours.MQTLlavaLmms)")
    assert done.splitlines()[-1] == "True" and "Failed" not in done


def test_each_image_is_encoded_once(lm):
    lm.encoded.keep([])
    seen = []
    hook = lm._model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    questions = [
        user(text, Image.open(path)) for path in PICTURES[:6] for text in ("List everything.", "Is there a dog?")
    ]
    questions += [user("What differs?", *map(Image.open, PICTURES[4:8])), user("Is there a dog?")]
    answers = ask(lm, questions)
    hook.remove()
    assert sum(seen) == 8
    for question, answer in zip(questions, answers):
        lm.encoded.keep([])
        assert ask(lm, [question]) == [answer]


def test_images_that_differ_by_their_palette_are_two(lm):
    pictures = []
    for colour in ((200, 45, 45), (50, 90, 200)):
        pictures.append(Image.new("P", (64, 64)))
        pictures[-1].putpalette(colour)
    answers = ask(lm, [user("What colour is the background?", picture) for picture in pictures])
    assert [answer.text for answer in answers] == ["Red.", "Blue."]


def test_visual_tokens_of_few_images_are_kept(lm):
    ask(lm, [user("Is there a dog?", Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(40)])
    assert len(lm.encoded.visual_tokens) == len(lm.encoded.seconds) == 16  # four batches of four


def test_batches_are_of_one_kind_and_answers_in_order(lm):
    texts = ["List everything.", "Is there a number?", "What colour is the background?"]
    questions = [user(texts[i % 3], Image.open(PICTURES[i % 7])) for i in range(11)] + [user("Is there a dog?")]
    together = [answer.text for answer in ask(lm, questions)]
    assert together == [ask(lm, [question])[0].text for question in questions]
    assert len(set(together)) > 3


def test_images_may_be_named_in_the_text(lm):
    first, second = map(Image.open, PICTURES[:2])
    apart = ask(lm, [user("List everything.", first)])[0]
    assert ask(lm, [user("<image>\nList everything.", first)])[0] == apart
    pair = ask(lm, [user("List everything.", first, second)])[0]
    assert pair == ask(lm, [user("<image>\n<image>\nList everything.", first, second)])[0]
    assert pair.token_counts.visual_tokens == 32
    with pytest.raises(ValueError, match="has 2 <image> in its text, but 1 images"):
        ask(lm, [user("<image> or <image>?", first)])


def test_settings_of_a_task(lm):
    question = user("List everything.", Image.open(PICTURES[3]))
    (whole,) = ask(lm, [question], GREEDY | {"image_aspect_ratio": "original", "temperature": 0.2, "top_p": 1.0})
    assert len(whole.text.split()) > 2
    second = whole.text.split()[1]
    (cut,) = ask(lm, [question], GREEDY | {"until": ["\n\n", second]})
    assert cut.text == whole.text.split(second)[0].strip()
    assert cut.token_counts.output_tokens < whole.token_counts.output_tokens
    (short,) = ask(lm, [question], {"max_new_tokens": 2})
    assert short.token_counts.output_tokens == 2
    torch.manual_seed(0)
    sampled = {ask(lm, [question], {"max_new_tokens": 24, "temperature": 5.0})[0].text for _ in range(4)}
    assert len(sampled) > 1
    assert ask(lm, [question], GREEDY | {"temperature": 0, "do_sample": True})[0] == whole


def test_auto(tmp_path):
    base = MQTLlavaLmms(TINY_CHECKPOINT, num_visual_tokens=64)
    base._model.generation_config.visual_token_schedule = VisualTokenSchedule([1, 64], [0.99]).to_dict()
    base._model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    lm = MQTLlavaLmms(str(tmp_path), num_visual_tokens="auto", batch_size=8)
    questions = [user("List everything.", Image.open(path)) for path in PICTURES] + [user("Is there a dog?")]
    answers = ask(lm, questions)
    counts = [answer.token_counts.visual_tokens for answer in answers]
    assert counts[-1] == 0 and set(counts[:-1]) == {1, 64}
    full = ask(base, questions)
    assert all(a.text == b.text for a, b, count in zip(answers, full, counts) if count == 64)
    assert lm.totals["visual_tokens"] == sum(counts)
    with pytest.raises(ValueError, match="asks for sampling"):
        ask(lm, questions[:1], {"temperature": 1.0})
    with pytest.raises(ValueError, match="asks for beam search"):
        ask(lm, questions[:1], {"num_beams": 2})


def test_adapter(tmp_path):
    from peft import get_peft_model

    base = MQTLlavaLmms(TINY_CHECKPOINT, num_visual_tokens=16)
    question = [user("List everything.", Image.open(PICTURES[3]))]
    before = ask(base, question)[0].text
    torch.manual_seed(0)
    tuned = get_peft_model(base._model, make_lora_config(base._model, r=4))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path)
    lm = MQTLlavaLmms(adapter=str(tmp_path), num_visual_tokens=16)
    assert ask(lm, question)[0].text != before


def test_a_system_prompt_takes_the_place_of_the_templates(lm, tmp_path):
    (tmp_path / "prompt.txt").write_text("Answer briefly.\n")
    other = MQTLlavaLmms(TINY_CHECKPOINT, system_prompt=str(tmp_path / "prompt.txt"))
    prompt, _ = other.read_messages(user("Is there a dog?"))
    assert prompt == "<s>Answer briefly. USER: Is there a dog? ASSISTANT:"
    assert lm.read_messages(user("Is there a dog?"))[0] == "<s>USER: Is there a dog? ASSISTANT:"


def test_what_cannot_be_asked(lm, tmp_path):
    (tmp_path / "damaged.png").write_bytes(PICTURES[0].read_bytes()[:200])
    lm.totals.clear()
    questions = [user("Is there a dog?", Image.open(path)) for path in PICTURES[:2]]
    broken = [user("Is there a dog?", str(tmp_path / "damaged.png")), user("dog " * 3000, Image.open(PICTURES[0]))]
    answers = ask(lm, [questions[0], *broken, questions[1]])
    assert [answer.text for answer in answers[1:3]] == ["", ""]
    assert [answers[0], answers[3]] == ask(lm, questions)
    assert (lm.totals["answers"], lm.totals["failed"]) == (6, 2)
    for kind, name in (("video", "videos"), ("audio", "audio")):
        with pytest.raises(ValueError, match=f"takes images and text; the task has {name}"):
            ask(lm, [user("What is there?", "clip", kind=kind)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "A model is needed"),
        ({"pretrained": TINY_CHECKPOINT, "visual_tokens": 4}, "has no model argument visual_tokens"),
        ({"pretrained": TINY_CHECKPOINT, "num_visual_tokens": 65}, "from 1 to 64.* got 65"),
        ({"pretrained": TINY_CHECKPOINT, "num_visual_tokens": 1.5}, "from 1 to 64.* got 1.5"),
        ({"pretrained": TINY_CHECKPOINT, "num_visual_tokens": "all"}, "or .auto.; got 'all'"),
        ({"pretrained": TINY_CHECKPOINT, "batch_size": "auto"}, "batch_size must be a positive integer; got 'auto'"),
        ({"pretrained": TINY_CHECKPOINT, "max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"pretrained": TINY_CHECKPOINT, "dtype": "int8"}, "dtype must be one of auto, bfloat16"),
        ({"pretrained": TINY_CHECKPOINT, "attn_implementation": "fast"}, "fast"),
        ({"pretrained": TINY_CHECKPOINT, "device": "cuda:77"}, "cannot use the device 'cuda:77'"),
        ({"pretrained": "no/such/folder"}, "there is no such folder"),
        ({"adapter": "no/such/folder"}, "cannot load the adapter"),
    ],
)
def test_arguments_that_are_wrong(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        MQTLlavaLmms(**arguments)
    assert "\n" not in str(error.value)


def test_options_by_their_likelihood(tmp_path, tasks):
    """A task of output type `multiple_choice`, and losses against those of the model with labels."""
    (tmp_path / "utils.py").write_text(
        (TASK / "utils.py").read_text().replace("Path(__file__).parent", f"Path({str(TASK)!r})")
    )
    rows = [row for row in json.loads((TASK / "questions.json").read_text()) if row["category"] == "number?"]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    task = yaml.load((TASK / "mqt_scenes.yaml").read_text().replace("!function ", ""), yaml.SafeLoader)
    lines = [f"task: mqt_options\noutput_type: multiple_choice\ntest_split: test\ndataset_path: json\n"
             f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.json'}}}}}\n"
             "doc_to_choice: ['Yes.', 'No.']\nmetric_list: [{metric: acc}]\n"]  # fmt: skip
    lines += [f"{name}: !function {task[name]}\n" for name in ("doc_to_visual", "doc_to_text", "doc_to_target")]
    (tmp_path / "mqt_options.yaml").write_text("".join(lines))
    results = evaluator.simple_evaluate(
        "mqt_llava",
        f"pretrained={TINY_CHECKPOINT},num_visual_tokens=64",
        tasks=["mqt_options"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        force_simple=True,
    )
    samples = results["samples"]["mqt_options"]
    assert len(samples) == len(rows)
    right = []
    lm = MQTLlavaLmms(TINY_CHECKPOINT, num_visual_tokens=64)
    for sample, row in zip(samples, rows):
        (yes, _), (no, _) = sample["filtered_resps"]
        right.append((yes < no) == (row["conversations"][1]["value"] == "Yes."))
        image = Image.open(TASK / row["image"])
        prompt, _ = lm.read_messages(user(sample["arguments"][0], image))
        for answer, loss in (("Yes.", yes), ("No.", no)):
            inputs = lm.processor(images=image, text=f"{prompt} {answer}", return_tensors="pt")
            start = lm.prepare([prompt], [image])["input_ids"].shape[1]
            labels = inputs["input_ids"].clone()
            labels[:, :start] = -100
            with torch.no_grad():
                assert float(lm._model(**inputs, labels=labels).loss) == pytest.approx(loss, abs=1e-4)
    assert results["results"]["mqt_options"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_likelihoods_encode_a_documents_images_once():
    lm = MQTLlavaSimpleLmms(TINY_CHECKPOINT, num_visual_tokens=4, batch_size=2)
    pictures, seen = [Image.open(path) for path in PICTURES[:2]], []
    lm.task_dict = {"task": {"test": [{}, {}]}}
    lm._model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    requests = []
    for doc_id, images in ((0, pictures), (1, pictures[:1])):
        for option in (" A cat.", " A dog.", " Nothing."):
            arguments = ("List everything.", option, lambda doc, images=images: images, doc_id, "task", "test")
            metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
            requests.append(Instance("loglikelihood", arguments, idx=0, metadata=metadata))
    together = lm.loglikelihood(requests)
    assert seen == [2, 1]
    apart = [lm.loglikelihood([request])[0] for request in requests]
    assert [one.text[0] for one in together] == pytest.approx([one.text[0] for one in apart], abs=1e-5)
    (said,) = ask_simple(lm, "List everything.", pictures[:1])
    greedy = Instance("loglikelihood", ("List everything.", said.text, lambda doc: pictures[:1], 1, "task", "test"), 0,
                      {"task": "task", "doc_id": 1, "repeats": 1})  # fmt: skip
    assert lm.loglikelihood([greedy])[0].text[1] is True


def ask_simple(lm, text, images):
    arguments = (text, GREEDY, lambda doc: images, 1, "task", "test")
    return lm.generate_until([Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 1, "repeats": 1})])
