"""`mqt-llava finetune DATA --output-dir DIR`: LoRA that keeps the model elastic."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError
from .models import ModelOption, load_config, load_processor, loading, name_checkpoint
from .runs import OPTIONS, check_memory, running


TINY = 1e-12  # the least of what must be above 0


def finetune(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="LLaVA conversations or chat messages: JSON or JSON Lines."),
    ],
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes.")],
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images are. Default: beside each data file.")
    ] = None,
    model: ModelOption = None,
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="Evaluate on this after each epoch.")] = None,
    eval_num_visual_tokens: Annotated[
        str, typer.Option(metavar="M,M,...", help="... at these numbers of visual tokens. Default: 1, a quarter, all.")
    ] = "",
    targets: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="language_model, query_transformer (LoRA) or query_transformer_full (all of it), vision_tower.",
        ),
    ] = "language_model",
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of LoRA.")] = 16,
    alpha: Annotated[float, typer.Option(min=TINY, help="Scale of LoRA.")] = 32,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Dropout of LoRA.")] = 0.05,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) (rsLoRA).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Tune magnitudes apart from directions (DoRA).")] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="QLoRA: the language model in 4 bits (needs bitsandbytes).")
    ] = False,
    num_visual_tokens: Annotated[
        str,
        typer.Option(
            metavar="DISTRIBUTION",
            help="How m is drawn for each step: even (2, 4, ..., M: the paper's), uniform, log-uniform, fixed (M), a "
            "number, or numbers M,M,...",
        ),
    ] = "even",
    epochs: Annotated[float, typer.Option(min=TINY, help="Passes over the data.")] = 1,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per device and batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", min=TINY, help="Its peak.")] = 2e-4,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest sample in tokens. Default: as the model has positions.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Shorten longer ones at their last turns.")] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Warn of broken samples and leave them out. Default: stop.")
    ] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    use_cpu: Annotated[bool, typer.Option("--use-cpu", help="Leave GPUs alone.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more compute.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and m.")] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="A checkpoint every so many steps.")] = 500,
    logging_steps: Annotated[int, typer.Option(min=1, help="A line every so many steps.")] = 10,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, wandb ...")] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the adapter with its card when done.")
    ] = None,
):
    """Tune with LoRA on conversations about images, with m drawn anew at every step, and save the adapter.

    On several GPUs: accelerate launch -m mqt_llava.cli finetune ...

    \b
    mqt-llava finetune data.json --image-folder images --output-dir adapter
    mqt-llava finetune data.jsonl --output-dir adapter --targets language_model,query_transformer -r 32 --bf16
    mqt-llava finetune data.json --output-dir adapter --num-visual-tokens 1,4,16,64 --load-in-4bit
    """
    if eval_num_visual_tokens and eval_data is None:
        raise UsageError("--eval-num-visual-tokens needs --eval-data")
    checkpoint = name_checkpoint(model)
    config = load_config(checkpoint)
    num_query_tokens = config.num_query_tokens
    try:
        import peft
        import torch
        from huggingface_hub.utils import validate_repo_id
        from transformers import AutoModelForImageTextToText, TrainingArguments, set_seed

        from ..hub import check_base_is_on_hub
        from ..training.adapters import check_resumed
        from ..training.collator import MQTLlavaDataCollator
        from ..training.data import load_conversations, refuse_broken, with_num_visual_tokens
        from ..training.lora import check_targets, load_quantized, make_lora_config, with_exact_weights
        from ..training.output import prepare_output_dir, remove_checkpoints
        from ..training.sampling import VisualTokenSampler, evaluation_num_visual_tokens, parse_distribution
        from ..training.trainer import MQTLlavaTrainer
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[train]'") from None

    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    with running(output_dir, OPTIONS):
        targets = check_targets([target.strip() for target in targets.split(",")])
        if push_to_hub is not None:
            validate_repo_id(push_to_hub)
            check_base_is_on_hub(checkpoint)
        training = TrainingArguments(
            output_dir=output_dir,
            num_train_epochs=epochs,
            max_steps=-1 if max_steps is None else max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            eval_strategy="no" if eval_data is None else "epoch",
            dataloader_num_workers=num_workers,
            accelerator_config={"non_blocking": True},  # batches are pinned: copied while the GPU computes
            bf16=bf16,
            use_cpu=use_cpu,
            seed=seed,
            save_steps=save_steps,
            save_total_limit=2,
            logging_steps=logging_steps,
            report_to=report_to,
            **({checkpointing: True} if gradient_checkpointing else {}),
        )
        sampler = VisualTokenSampler(parse_distribution(num_visual_tokens), num_query_tokens, seed)
        if eval_data is not None:
            with running(output_dir, dict.fromkeys(OPTIONS, "--eval-num-visual-tokens")):
                eval_num_visual_tokens = evaluation_num_visual_tokens(eval_num_visual_tokens, num_query_tokens)
        with training.main_process_first():  # the others find in the cache what the first one has read
            last_checkpoint = prepare_output_dir(output_dir, resume, overwrite)
            train_dataset = load_conversations(data, image_folder)
            eval_dataset = None
            if eval_data is not None:
                rows = load_conversations(eval_data, image_folder)
                eval_dataset = {f"m{m}": with_num_visual_tokens(rows, m) for m in eval_num_visual_tokens}
            if not skip_broken:
                for rows in (train_dataset, *([rows] if eval_data is not None else [])):
                    refuse_broken(rows)

        set_seed(seed)
        processor = load_processor(checkpoint)
        dtype = torch.bfloat16 if bf16 or load_in_4bit else torch.float32
        check_memory(
            training, checkpoint, config, dtype, less="--bf16, --load-in-4bit", num_bits=4 if load_in_4bit else None
        )
        with loading(checkpoint):
            load = load_quantized if load_in_4bit else AutoModelForImageTextToText.from_pretrained
            base = load(
                checkpoint,
                trust_remote_code=False,
                **({} if load_in_4bit else {"dtype": dtype}),
            )
        if load_in_4bit:
            base = peft.prepare_model_for_kbit_training(
                base, gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        lora_config = make_lora_config(base, targets, rank, alpha, dropout, use_rslora=rslora, use_dora=dora)
        if last_checkpoint is not None:
            check_resumed(lora_config, last_checkpoint)
        network = with_exact_weights(peft.get_peft_model(base, lora_config))
        network.print_trainable_parameters()

        trainer = MQTLlavaTrainer(
            network,
            training,
            data_collator=MQTLlavaDataCollator(
                processor,
                sampler,
                max_length=getattr(base.config.text_config, "max_position_embeddings", None)
                if max_length is None
                else max_length,
                truncate=truncate,
                on_error="skip" if skip_broken else "raise",
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        if overwrite and trainer.is_world_process_zero():
            remove_checkpoints(output_dir)
        trainer.train(resume_from_checkpoint=last_checkpoint)
        trainer.save_adapter(repo_id=push_to_hub)
    if trainer.is_world_process_zero():
        print(f"The adapter is in {output_dir}")
