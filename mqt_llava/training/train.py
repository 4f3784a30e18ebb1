"""Training: the two stages of MQT-LLaVA (arXiv 2405.19315, section 3), and LoRA.

Stage 1 (alignment) trains only the query transformer, on captions, with all M visual tokens. Stage 2 (instruction tuning) trains the
query transformer and the language model on conversations, with m drawn from {2, 4, ..., M} at every step. The vision tower is frozen
in both. LoRA trains adapters on the chosen parts, with m drawn as in stage 2.

    mqt-llava train --stage 1 --model start --data-path captions.json --image-folder images --output-dir stage1
    mqt-llava train --stage 2 --model stage1 --data-path conversations.json --image-folder images --output-dir stage2
    mqt-llava finetune conversations.json --model stage2 --image-folder images --output-dir adapter

On several GPUs: `accelerate launch --config_file FILE -m mqt_llava.cli train ...`, with a FILE of `configs/accelerate`.
"""

import torch
from transformers import TrainingArguments, set_seed

from .. import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaProcessor
from .arguments import DataArguments, LoraArguments, StageArguments, parse_arguments
from .collator import MQTLlavaDataCollator
from .data import load_conversations, refuse_broken, with_num_visual_tokens
from .distillation import DistillationTrainer
from .lengths import with_lengths
from .output import prepare_output_dir, remove_checkpoints
from .sampling import VisualTokenSampler, evaluation_num_visual_tokens, parse_distribution
from .trainer import MQTLlavaTrainer


def train(
    arguments: StageArguments | LoraArguments,
    training: TrainingArguments,
    callbacks=None,
    optimizer_cls_and_kwargs=None,
):
    """
    Train a stage or an adapter, and save the model and its processor, or the adapter, in `training.output_dir`.

    Args:
        arguments (`StageArguments` or `LoraArguments`), training: as returned by [`parse_arguments`].
        callbacks (`list[TrainerCallback]`, *optional*): for the trainer.
        optimizer_cls_and_kwargs (`tuple`, *optional*): for the trainer, instead of the optimizer in `training`.

    Returns:
        [`MQTLlavaTrainer`]: the trainer, with the trained model and the log.

    Raises:
        `ValueError`: for `num_visual_tokens`, files and folders that cannot be used, before any work; later for a sample that
            cannot be used.
    """
    if isinstance(arguments, LoraArguments):
        check_adapter(arguments, training)
        is_lora, default = True, "even"
    else:
        is_lora, default = False, "even" if arguments.stage == 2 else "fixed"
    config = MQTLlavaConfig.from_pretrained(arguments.model)
    distribution = arguments.num_visual_tokens or [default]
    sampler = VisualTokenSampler(parse_distribution(",".join(distribution)), config.num_query_tokens, training.seed)
    eval_num_visual_tokens = evaluation_num_visual_tokens(
        ",".join(arguments.eval_num_visual_tokens or []), config.num_query_tokens
    )
    trainer_class, losses = MQTLlavaTrainer, {}
    if arguments.distill_weight:
        trainer_class = DistillationTrainer
        losses = {"weight": arguments.distill_weight, "temperature": arguments.distill_temperature}

    with training.main_process_first():  # the other processes reuse the first one's cache
        checkpoint = training.resume_from_checkpoint
        checkpoint = checkpoint or prepare_output_dir(training.output_dir, arguments.resume, arguments.overwrite)
        processor = MQTLlavaProcessor.from_pretrained(arguments.model)
        train_dataset = load_conversations(arguments.data_path, arguments.image_folder)
        eval_dataset = None
        if arguments.eval_data_path:
            eval_dataset = load_conversations(arguments.eval_data_path, arguments.image_folder)
        if not arguments.skip_broken:
            for dataset in filter(None, (train_dataset, eval_dataset)):
                refuse_broken(dataset)
        if training.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            train_dataset = with_lengths(train_dataset, processor, sampler.max_num_visual_tokens)
            eval_dataset = eval_dataset and with_lengths(eval_dataset, processor, sampler.max_num_visual_tokens)
        if eval_dataset is not None:
            eval_dataset = {f"m{m}": with_num_visual_tokens(eval_dataset, m) for m in eval_num_visual_tokens}

    set_seed(training.seed)
    if isinstance(arguments, LoraArguments):
        model = load_with_adapter(arguments, training, checkpoint)
    else:
        model = load_stage(arguments, training)
    max_length = arguments.max_length
    if max_length is None:
        max_length = getattr(config.text_config, "max_position_embeddings", None)
    on_error = "skip" if arguments.skip_broken else "raise"
    trainer = trainer_class(
        model,
        training,
        data_collator=MQTLlavaDataCollator(processor, sampler, max_length, arguments.truncate, on_error),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=None if is_lora else processor,  # saved with every checkpoint
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        **losses,
    )
    if arguments.overwrite and trainer.is_world_process_zero():
        remove_checkpoints(training.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if is_lora:
        trainer.save_adapter(repo_id=training.hub_model_id)
        return trainer
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(
            "FULL_STATE_DICT"
        )  # the format that `from_pretrained` reads
    trainer.save_model()
    return trainer


def weights_dtype(arguments: DataArguments, training: TrainingArguments) -> torch.dtype:
    """Dtype of the weights in memory. By default float32, or the compute dtype for the base model of an adapter."""
    in_bfloat16 = isinstance(arguments, LoraArguments) and (training.bf16 or arguments.load_in_4bit)
    return getattr(torch, arguments.dtype or ("bfloat16" if in_bfloat16 else "float32"))


def load_stage(arguments: StageArguments, training: TrainingArguments):
    """Load the model and enable gradients for the parts that the stage trains."""
    model = MQTLlavaForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=weights_dtype(arguments, training),
        attn_implementation=arguments.attn_implementation,
    )
    schedule = getattr(model.generation_config, "visual_token_schedule", None)
    if schedule:  # it was calibrated with other weights
        reset = schedule | {"calibration": None}
        model.generation_config.visual_token_schedule = reset  # type: ignore[attr-defined]  # it keeps what it does not know
    model.requires_grad_(False)
    model.model.query_transformer.requires_grad_(True)
    if arguments.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    return model


def check_adapter(arguments: LoraArguments, training: TrainingArguments):
    """
    Raises:
        `ValueError`: for unknown targets, and if the adapter is to be uploaded and its base model is not on the Hub.
    """
    from huggingface_hub.utils import validate_repo_id

    from ..hub import check_base_is_on_hub
    from .lora import check_targets

    check_targets(arguments.targets)
    if training.hub_model_id is not None:
        validate_repo_id(training.hub_model_id)
        check_base_is_on_hub(arguments.model)


def load_with_adapter(arguments: LoraArguments, training: TrainingArguments, checkpoint=None):
    """Load the model and add a new adapter. Its settings must equal those of a checkpoint that is resumed."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    from .adapters import check_resumed
    from .lora import load_quantized, make_lora_config, with_exact_weights

    dtype, attn_implementation = weights_dtype(arguments, training), arguments.attn_implementation
    if arguments.load_in_4bit:
        base = load_quantized(arguments.model, dtype, attn_implementation=attn_implementation)
        base = prepare_model_for_kbit_training(
            base, training.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        base = MQTLlavaForConditionalGeneration.from_pretrained(
            arguments.model, dtype=dtype, attn_implementation=attn_implementation
        )
    lora = make_lora_config(
        base,
        arguments.targets,
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        use_rslora=arguments.rslora,
        use_dora=arguments.dora,
    )
    if checkpoint is not None:
        check_resumed(lora, checkpoint)
    model = with_exact_weights(get_peft_model(base, lora))
    model.print_trainable_parameters()
    return model


def main(command_line=None):
    train(*parse_arguments(command_line))


if __name__ == "__main__":
    main()
