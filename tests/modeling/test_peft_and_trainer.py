"""The model trained with transformers and PEFT: gradient checkpointing, PEFT's methods, `generate` during training."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.modeling.common import IMAGE_TOKEN_ID, new_tokens, prepare
from tests.small_model import NUM_QUERY_TOKENS, make_model


def loss_and_gradients(model, m):
    inputs = prepare(m=7)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE_TOKEN_ID, -100)
    calls = []
    for layers in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    loss = model(**inputs, labels=labels, num_visual_tokens=m).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, len(calls)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # the new name is not in 5.19
@pytest.mark.parametrize("m", [1, NUM_QUERY_TOKENS])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["all_train", "only_query_transformer_trains"])
def test_gradient_checkpointing(m, use_reentrant, frozen):
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if frozen:
            model.requires_grad_(False)
            model.model.query_transformer.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        results.append(loss_and_gradients(model, m))
    (loss, gradients, calls), (checkpointed_loss, checkpointed_gradients, checkpointed_calls) = results
    torch.testing.assert_close(checkpointed_loss, loss, atol=1e-6, rtol=0)
    assert checkpointed_calls > calls  # layers did run again in the backward pass
    assert gradients.keys() == checkpointed_gradients.keys()
    assert {"model.query_transformer.query", "model.query_transformer.v_proj.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, atol=1e-5, rtol=1e-4)


PEFT_METHODS = {
    "dora": LoraConfig(target_modules=r".*language_model.*q_proj", use_dora=True, init_lora_weights=False),
    "vera": VeraConfig(target_modules=r".*language_model.*q_proj", init_weights=False),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses the old name of the cache
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_methods_of_peft(model, method):
    """The model trains and generates with each; `num_visual_tokens` equals a prompt that was prepared with that m."""
    tuned = get_peft_model(model, PEFT_METHODS[method])
    few, many = prepare([2, 3], m=3), prepare([2, 3], m=9)
    labels = few["input_ids"].masked_fill(few["input_ids"] <= IMAGE_TOKEN_ID, -100)
    tuned(**few, labels=labels).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    if method == "prompt tuning":  # PEFT makes embeddings of the prompt
        with pytest.raises(ValueError, match="`num_visual_tokens` needs `input_ids`"):
            tuned(**many, num_visual_tokens=3)
    else:
        with torch.no_grad():
            logits = tuned(**many, num_visual_tokens=3).logits
            torch.testing.assert_close(logits, tuned(**few).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = new_tokens(tuned.generate(**few, **options), few)
    assert new_tokens(tuned.generate(**many, **options, num_visual_tokens=3), many) == expected


def test_generate_in_a_callback_of_trainer(model, tmp_path):
    """As when samples are logged during training: the same weights give the same answers afterwards."""
    inputs, options = prepare([2, 3], m=7), {"max_new_tokens": 4, "do_sample": False, "num_visual_tokens": 3}
    answers = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            was_training = model.training
            model.eval()
            answers.append(model.generate(**inputs, **options).tolist())
            model.train(was_training)

    batch = {name: inputs[name] for name in inputs}
    batch["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE_TOKEN_ID, -100)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.05, use_cpu=True, report_to=[], save_strategy="no", bf16=False
    )
    trainer = Trainer(model, arguments, lambda rows: batch, train_dataset=[0] * 8, callbacks=[Ask()])
    trainer.train()
    assert len(answers) == 2 and answers[0] != answers[1]
    assert model.eval().generate(**inputs, **options).tolist() == answers[1]
