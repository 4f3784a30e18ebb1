"""Two m in a step: one vision pass, and a loss that is what its docstring says."""

import pytest
import torch
from transformers import TrainingArguments

from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.distillation import DistillationTrainer, divergence_at_labels
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


M = NUM_QUERY_TOKENS


def samples():
    """Rows of two images, of one and of none, with answers of different lengths."""
    images = make_images(3)
    for number, answer in ((2, "Two."), (1, "It is one."), (0, "None at all.")):
        messages = [
            {"role": "user", "content": "<image>" * number + "How many?"},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": messages, "images": images[:number]}


def make_trainer(folder, m=9, cls=DistillationTrainer, **settings):
    trainer = cls(
        make_model(),
        TrainingArguments(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2),
        data_collator=MQTLlavaDataCollator(make_processor(), m),
        train_dataset=list(samples()),
        **settings,
    )
    trainer.model.train()
    return trainer


def make_batch(m):
    return MQTLlavaDataCollator(make_processor(), m, always_image=True)(list(samples()))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_and_gradients_equal_a_computation_by_hand(temperature, num_items, tmp_path):
    trainer = make_trainer(tmp_path, m=9, weight=0.3, temperature=temperature)
    trainer.state.global_step = 4
    small = VisualTokenSampler(9, M, trainer.args.seed).sample_below(4, 9)
    assert 1 <= small < 9
    passes = []
    trainer.model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    num_items = num_items if num_items is None else torch.tensor(num_items)
    loss = trainer.compute_loss(trainer.model, make_batch(9), num_items_in_batch=num_items)
    loss.backward()
    assert len(passes) == 1

    model = make_model().train()
    outputs = [model(**make_batch(m), num_items_in_batch=num_items) for m in (9, small)]
    total = outputs[0].loss + 0.3 * outputs[1].loss
    labels = [make_batch(m)["labels"] for m in (9, small)]
    divergences = []
    for row in range(3):
        places = [[i - 1 for i in range(label.shape[1]) if label[row, i] != -100] for label in labels]
        assert len(places[0]) == len(places[1]) > 0
        for i, j in zip(*places):
            teacher, student = ((out.logits[row, k] / temperature).softmax(-1) for out, k in zip(outputs, (i, j)))
            teacher = teacher.detach()
            divergences.append((teacher * (teacher / student).log()).sum())
    mean = sum(divergences) / (len(divergences) if num_items is None else num_items)
    total = total + 0.3 * temperature**2 * mean
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    expected = gradients(model)
    assert gradients(trainer.model).keys() == expected.keys() and "model.query_transformer.query" in expected
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_weight_zero_one_token_and_evaluation_have_the_plain_loss(tmp_path):
    plain = make_trainer(tmp_path, cls=MQTLlavaTrainer)
    expected = plain.compute_loss(plain.model, make_batch(9))
    distilling = make_trainer(tmp_path, weight=0.0)
    assert torch.equal(distilling.compute_loss(distilling.model, make_batch(9)), expected)
    distilling.weight = 1.0
    assert distilling.compute_loss(distilling.model, make_batch(9)) > expected + 1
    distilling.model.eval()
    torch.testing.assert_close(distilling.compute_loss(distilling.model, make_batch(9)), expected)
    single = make_trainer(tmp_path, m=1)
    torch.testing.assert_close(
        single.compute_loss(single.model, make_batch(1)), plain.compute_loss(plain.model, make_batch(1))
    )


def test_equal_answers_do_not_diverge():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    divergence, count = divergence_at_labels(logits, labels, logits, labels)
    assert divergence == 0 and count == 6


def test_training_logs_both_m(tmp_path):
    trainer = make_trainer(tmp_path, m=VisualTokenSampler([2, 8], M), weight=0.5)
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for step, entry in enumerate(logs):
        m = trainer.sampler.sample(step)
        assert entry["num_visual_tokens"] == m and entry["divergence"] > 0
        assert entry["num_visual_tokens_below"] == trainer.sampler.sample_below(step, m) < m


def test_the_smaller_m_comes_from_num_visual_tokens():
    sampler = VisualTokenSampler([1, 4, 4, M], M, seed=2)
    assert {sampler.sample_below(step, M) for step in range(40)} == {1, 4}
    assert {sampler.sample_below(step, 4) for step in range(40)} == {1}
    assert {VisualTokenSampler("fixed", M).sample_below(step, M) for step in range(400)} == set(range(1, M))


@pytest.mark.parametrize("bad", [{"weight": -1.0}, {"weight": float("nan")}, {"temperature": 0.0}])
def test_bad_settings_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="Distillation needs"):
        make_trainer(tmp_path, **bad)
