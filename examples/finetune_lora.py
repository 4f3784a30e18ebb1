"""Tune MQT-LLaVA with LoRA on your own conversations, and keep it elastic: m is drawn anew at every step.

    python examples/finetune_lora.py --data conversations.json --image_folder images --output_dir my-adapter

Needs `pip install -e ".[train]"`. On several GPUs: `accelerate launch examples/finetune_lora.py ...`. The data is LLaVA's
JSON, or chat messages; see `load_conversations`.
"""

import argparse

from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed

import mqt_llava
from mqt_llava.training.collator import MQTLlavaDataCollator
from mqt_llava.training.data import load_conversations
from mqt_llava.training.lora import TARGETS, load_quantized, make_lora_config, with_exact_weights
from mqt_llava.training.output import prepare_output_dir
from mqt_llava.training.sampling import VisualTokenSampler
from mqt_llava.training.trainer import MQTLlavaTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=mqt_llava.TINY_CHECKPOINT)
parser.add_argument("--data", nargs="+", required=True)
parser.add_argument("--image_folder")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["language_model"])
parser.add_argument("--load_in_4bit", action="store_true", help="QLoRA")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--max_steps", type=int, default=-1)
parser.add_argument("--batch_size", type=int, default=8)
arguments = parser.parse_args()

set_seed(0)
prepare_output_dir(arguments.output_dir)
processor = AutoProcessor.from_pretrained(arguments.model)
if arguments.load_in_4bit:
    model = load_quantized(arguments.model)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
else:
    dtype = "bfloat16" if arguments.bf16 else "float32"
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype)

# Which layers: by name. Also use_rslora=True, use_dora=True, ...
config = make_lora_config(model, arguments.targets, r=16, lora_alpha=32, lora_dropout=0.05)
model = with_exact_weights(get_peft_model(model, config))
model.print_trainable_parameters()

# How m is drawn: "even" is the paper's {2, 4, ..., M}; "log-uniform" or [1, 4, 16, 64] favour few tokens
sampler = VisualTokenSampler("even", model.config.num_query_tokens)
trainer = MQTLlavaTrainer(
    model,
    TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=arguments.bf16,
        logging_steps=10,
        report_to="none",
    ),
    data_collator=MQTLlavaDataCollator(processor, sampler, max_length=2048, on_error="skip"),
    train_dataset=load_conversations(arguments.data, arguments.image_folder),
)
trainer.train()
trainer.save_adapter()

# A folder like any adapter's: `PeftModel.from_pretrained(base, folder)`, or `mqt_llava.training.adapters.load_adapter`, which
# refuses one that was made for another base
