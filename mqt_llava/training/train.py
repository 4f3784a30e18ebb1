"""The two stages of MQT-LLaVA's training (arXiv 2405.19315, section 3), the vision tower frozen in both.

Stage 1 aligns: only the query transformer trains, on captions, with all M visual tokens. Stage 2 tunes: the query
transformer and the language model train on conversations, with m drawn from {2, 4, ..., M} at every step.

    mqt-llava train --stage 1 --model start --data_path captions.json --image_folder images --output_dir stage1
    mqt-llava train --stage 2 --model stage1 --data_path conversations.json --image_folder images --output_dir stage2

On several GPUs: `accelerate launch --config_file FILE -m mqt_llava.cli train ...`, with a FILE of `configs/accelerate`.
"""

from transformers import TrainingArguments

from .. import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaProcessor
from .arguments import StageArguments, parse_arguments
from .collator import MQTLlavaDataCollator
from .data import load_conversations, refuse_broken, with_num_visual_tokens
from .distillation import DistillationTrainer
from .lengths import with_lengths
from .output import prepare_output_dir, remove_checkpoints
from .sampling import VisualTokenSampler, evaluation_num_visual_tokens, parse_distribution
from .trainer import MQTLlavaTrainer


def train(arguments: StageArguments, training: TrainingArguments, callbacks=None, optimizer_cls_and_kwargs=None):
    """
    Train a stage, and save model and processor in `training.output_dir`.

    Args:
        arguments, training: as [`parse_arguments`] reads them.
        callbacks (`list[TrainerCallback]`, *optional*): for the trainer.
        optimizer_cls_and_kwargs (`tuple`, *optional*): for the trainer, in place of the optimizer of `training`.

    Returns:
        [`MQTLlavaTrainer`]: with the trained model and the log.

    Raises:
        `ValueError`: before any work for `num_visual_tokens`, files and folders that cannot be used; later for a
        sample that cannot.
    """
    config = MQTLlavaConfig.from_pretrained(arguments.model)
    distribution = parse_distribution(
        ",".join(arguments.num_visual_tokens or ["fixed" if arguments.stage == 1 else "even"])
    )
    sampler = VisualTokenSampler(distribution, config.num_query_tokens, training.seed)
    eval_num_visual_tokens = evaluation_num_visual_tokens(
        ",".join(arguments.eval_num_visual_tokens or []), config.num_query_tokens
    )
    trainer_class, losses = MQTLlavaTrainer, {}
    if arguments.distill_weight:
        trainer_class = DistillationTrainer
        losses = {"weight": arguments.distill_weight, "temperature": arguments.distill_temperature}

    with training.main_process_first():  # the others find in the cache what the first one has read
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

    model = MQTLlavaForConditionalGeneration.from_pretrained(
        arguments.model, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
    )
    schedule = getattr(model.generation_config, "visual_token_schedule", None)
    if schedule:  # what was calibrated were other weights
        model.generation_config.visual_token_schedule = schedule | {"calibration": None}
    model.requires_grad_(False)
    model.model.query_transformer.requires_grad_(True)
    if arguments.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)

    trainer = trainer_class(
        model,
        training,
        data_collator=MQTLlavaDataCollator(
            processor,
            sampler,
            max_length=getattr(config.text_config, "max_position_embeddings", None)
            if arguments.max_length is None
            else arguments.max_length,
            truncate=arguments.truncate,
            on_error="skip" if arguments.skip_broken else "raise",
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,  # saved with every checkpoint
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        **losses,
    )
    if arguments.overwrite and trainer.is_world_process_zero():
        remove_checkpoints(training.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # what `from_pretrained` reads
    trainer.save_model()
    return trainer


def main(command_line=None):
    train(*parse_arguments(command_line))


if __name__ == "__main__":
    main()
