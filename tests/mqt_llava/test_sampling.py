"""Matryoshka sampling: m is that of the step, however batches are collated."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import with_num_visual_tokens
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


M = NUM_QUERY_TOKENS


def test_distributions():
    names = ("even", "uniform", "log-uniform", "fixed")
    num_visual_tokens = {name: VisualTokenSampler(name, M).num_visual_tokens for name in names}
    assert num_visual_tokens["even"] == list(range(2, M + 1, 2))
    assert num_visual_tokens["uniform"] == num_visual_tokens["log-uniform"] == list(range(1, M + 1))
    assert num_visual_tokens["fixed"] == [M]
    assert VisualTokenSampler(4, M).num_visual_tokens == [4]
    assert VisualTokenSampler([1, 4, 4], M).num_visual_tokens == [1, 4, 4]
    assert VisualTokenSampler("even", 1).num_visual_tokens == [1]
    for distribution in ("even", "uniform", [1, 16]):
        sampler = VisualTokenSampler(distribution, M)
        counts = Counter(map(sampler.sample, range(4000)))
        assert set(counts) == set(sampler.num_visual_tokens)
        assert max(counts.values()) < 1.5 * min(counts.values())
    counts = Counter(map(VisualTokenSampler("log-uniform", M).sample, range(4000)))
    assert abs(counts[1] / 4000 - 0.245) < 0.03 and abs(counts[16] / 4000 - 0.021) < 0.01


def test_m_depends_on_seed_and_step_alone():
    first, second = (VisualTokenSampler("uniform", M, seed=3) for _ in range(2))
    expected = [first.sample(step) for step in range(50)]
    assert [second.sample(step) for step in reversed(range(50))] == expected[::-1]
    assert [VisualTokenSampler("uniform", M, seed=4).sample(step) for step in range(50)] != expected


@pytest.mark.parametrize("bad", ["evn", "", [], 0, True, 2.0, M + 1, [1, M + 1], [1, 2.5]])
def test_bad_distributions_are_refused(bad):
    with pytest.raises(ValueError, match=r"distribution|num_visual_tokens"):
        VisualTokenSampler(bad, M)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 14

    def __getitem__(self, index):
        return index


class Collate:
    """Stands in for the collator: what the sampler says."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, samples):
        return self.sampler.next()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_bare_loop(workers, persistent):
    """Seven batches an epoch, which no number of workers above 1 divides."""
    sampler = VisualTokenSampler("uniform", M)
    loader = DataLoader(
        Numbers(), 2, collate_fn=Collate(sampler), num_workers=workers, persistent_workers=persistent and workers > 0
    )
    for epoch in range(3):
        sampler.set_step(7 * epoch)
        assert list(loader) == [sampler.sample(7 * epoch + i) for i in range(7)]
    sampler.set_step(100, gradient_accumulation_steps=2)
    assert list(loader) == [sampler.sample(100 + i // 2) for i in range(7)]


def test_without_workers_a_bare_loop_counts_on():
    sampler = VisualTokenSampler("uniform", M)
    loader = DataLoader(Numbers(), 2, collate_fn=Collate(sampler))
    assert [*loader, *loader] == [sampler.sample(i) for i in range(14)]


def numbers(shards):
    for _ in shards:
        yield from ({"n": n} for n in range(6))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_streams_whose_shards_are_fewer_than_workers(num_shards):
    sampler = VisualTokenSampler("uniform", M)
    stream = IterableDataset.from_generator(numbers, gen_kwargs={"shards": list(range(num_shards))})
    loader = DataLoader(stream, 2, collate_fn=Collate(sampler), num_workers=2)
    assert list(loader) == [sampler.sample(i) for i in range(3 * num_shards)]


# With a `Trainer` ---------------------------------------------------------------------------------------------------------

NUM_SAMPLES = 14


def samples(shards=(0,)):
    for _ in shards:
        for i in range(NUM_SAMPLES):
            messages = [{"role": "user", "content": f"<image>{i}?"}, {"role": "assistant", "content": f"{i}."}]
            yield {"messages": messages, "images": [f"{i}.png"]}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def train(folder, monkeypatch, kill_at=-1, resume=None, stream=False, cls=Trainer, sampler=None, **settings):
    """Runs a trainer on the small model. Returns it, its sampler and [(m, pixels), ...] of the batches that trained."""
    monkeypatch.setattr(
        "mqt_llava.training.collator.open_image", lambda path: make_images(1, seed=int(path.split(".")[0]))[0]
    )
    eval_dataset = settings.pop("eval_dataset", None)
    seen = []
    model = make_model()

    def remember(module, args, kwargs):
        if module.training:
            (m,) = set(kwargs["visual_token_counts"].tolist())
            seen.append((m, kwargs["pixel_values"].sum().item()))

    model.register_forward_pre_hook(remember, with_kwargs=True)
    sampler = sampler or VisualTokenSampler("uniform", M, seed=1)
    arguments = {
        "output_dir": folder,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "save_steps": 5,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    trainer = cls(
        model,
        TrainingArguments(**(arguments | settings)),
        data_collator=MQTLlavaDataCollator(make_processor(), sampler),
        train_dataset=(IterableDataset if stream else Dataset).from_generator(samples),
        eval_dataset=eval_dataset,
        callbacks=[sampler, KillAt(kill_at)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, sampler, seen


SETTINGS = {
    "plain": {},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers, accumulation": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "gradient_accumulation_steps": 3,
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "data not skipped": {"ignore_data_skip": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trainer_draws_by_the_step_and_after_a_kill(settings, tmp_path, monkeypatch):
    """Ten steps, in which an epoch of seven batches ends at least once; killed at step 8, resumed from step 5."""
    trainer, sampler, whole = train(tmp_path / "whole", monkeypatch, **settings)
    steps_per_epoch = -(-7 // settings.get("gradient_accumulation_steps", 1))
    sizes = [min(settings.get("gradient_accumulation_steps", 1), 7)] * (steps_per_epoch - 1)
    sizes.append(7 - sum(sizes))
    expected = [(step, sampler.sample(step)) for step in range(10) for _ in range(sizes[step % steps_per_epoch])]
    assert [m for m, _ in whole] == [m for _, m in expected]
    logged = [entry["num_visual_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [sampler.sample(step) for step in range(10)]

    with pytest.raises(Killed):
        train(tmp_path / "broken", monkeypatch, kill_at=8, **settings)
    resumed, _, rest = train(tmp_path / "broken", monkeypatch, resume=tmp_path / "broken/checkpoint-5", **settings)
    if "ignore_data_skip" in settings:
        assert [m for m, _ in rest] == [sampler.sample(step) for step in range(5, 10)]
        return
    assert rest == whole[-len(rest) :] and len(rest) == sum(step >= 5 for step, _ in expected)
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in resumed.model.state_dict().items())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_and_their_resume(workers, tmp_path, monkeypatch):
    settings = {
        "stream": True,
        "accelerator_config": {"dispatch_batches": False},
        "dataloader_num_workers": workers,
        "save_steps": 3,
    }
    _, sampler, whole = train(tmp_path, monkeypatch, **settings)
    assert [m for m, _ in whole] == [sampler.sample(step) for step in range(10)]
    _, _, rest = train(tmp_path, monkeypatch, resume=tmp_path / "checkpoint-3", **settings)
    assert rest == whole[3:]


def test_streams_that_accelerate_would_cut_up_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="dispatch_batches"):
        train(tmp_path, monkeypatch, stream=True)


def test_evaluation_at_several_m_leaves_the_sampler_alone(tmp_path, monkeypatch):
    rows = Dataset.from_generator(samples)
    trainer, sampler, seen = train(
        tmp_path,
        monkeypatch,
        eval_dataset={f"m{m}": with_num_visual_tokens(rows, m) for m in (1, M)},
        eval_strategy="steps",
        eval_steps=2,
    )
    assert [m for m, _ in seen] == [sampler.sample(step) for step in range(10)]
    losses = trainer.evaluate()
    assert losses["eval_m1_loss"] != losses["eval_m16_loss"]


def test_own_trainer_evaluates_at_all_tokens(tmp_path, monkeypatch):
    rows = Dataset.from_generator(samples)
    trainer, sampler, seen = train(
        tmp_path, monkeypatch, cls=MQTLlavaTrainer, eval_dataset=rows, eval_strategy="steps", eval_steps=2, max_steps=6
    )
    assert [m for m, _ in seen] == [sampler.sample(step) for step in range(6)]
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.evaluate(with_num_visual_tokens(rows, M))["eval_loss"])
    assert trainer.model.config.use_cache and trainer.state.log_history[0]["num_visual_tokens"] == sampler.sample(0)


def test_evaluation_by_the_sampler_upsets_one_step_at_most(tmp_path, monkeypatch):
    _, sampler, seen = train(
        tmp_path, monkeypatch, eval_dataset=Dataset.from_generator(samples), eval_strategy="steps", eval_steps=5
    )
    wrong = [step for step, (m, _) in enumerate(seen) if m != sampler.sample(step)]
    assert set(wrong) <= {6}  # the fifth step's successor was collated before


TWO_RANKS = """
import sys
from pathlib import Path
import pytest
from tests.mqt_llava.test_sampling import train
import json, os
folder = Path(sys.argv[1])
with pytest.MonkeyPatch.context() as monkeypatch:
    trainer, sampler, seen = train(folder / "run", monkeypatch, dataloader_num_workers=int(sys.argv[2]), gradient_accumulation_steps=2)
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps([seen, [sampler.sample(step) for step in range(10)]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_all_ranks_of_a_step_draw_the_same(workers, tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path, str(workers)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (first, expected), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [m for m, _ in first] == [m for m, _ in second] == [expected[step] for step in range(10) for _ in range(2)]
    assert all(a[1] != b[1] for a, b in zip(first, second))  # of other samples
