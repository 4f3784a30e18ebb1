#!/usr/bin/env bash
# How mqt-llava-tiny was trained: from scratch, on two CPU cores. Each step is one command, and goes on where it was broken
# off when called again. Needs `pip install -c constraints.txt -e ".[train]"` and Debian's fonts-noto-color-emoji.
#
#     bash examples/train_tiny.sh runs
#
# The logs of the run that made the shipped checkpoint are in docs/training/.
set -euo pipefail
runs=${1:?"usage: train_tiny.sh FOLDER"}
on_cpu=(--use_cpu --bf16 --max_grad_norm 1 --lr_scheduler_type cosine --save_total_limit 2 --report_to none)
python=${PYTHON:-python}

# A run of `mqt-llava train`, gone on with where there is a checkpoint: its folder, then its options. The paper's values that
# are meant for GPUs and 7B parameters are undone.
train() {
    local resume=()
    if compgen -G "$runs/$1/checkpoint-*" > /dev/null; then resume=(--resume); fi
    $python -m mqt_llava.training.train --output_dir "$runs/$1" --image_folder "$runs/data/images" "${resume[@]}" "${on_cpu[@]}" \
        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --gradient_checkpointing false \
        --train_sampling_strategy random --dataloader_num_workers 0 --logging_steps 10 "${@:2}"
}

# 100,000 pictures with a caption and up to eight questions each, and 100,000 scenes told in words
[ -e "$runs/data/text.json" ] || $python -m mqt_llava.training.make_data --output_dir "$runs/data"

# In place of CLIP: a tower that names what every patch shows (38 minutes)
$python -m mqt_llava.training.pretrain_vision --output_dir "$runs/vision" "${on_cpu[@]}" --torch_compile \
    --num_pictures 120000 --num_train_epochs 5 --per_device_train_batch_size 128 --per_device_eval_batch_size 250 \
    --learning_rate 1e-3 --warmup_steps 200 --weight_decay 0.05 --remove_unused_columns False \
    --logging_steps 20 --eval_strategy steps --eval_steps 500 --save_steps 500

# In place of Vicuna: a language model that answers questions about scenes told in words (16 minutes)
$python -m mqt_llava.training.pretrain_text --data_path "$runs/data/text.json" --output_dir "$runs/text" "${on_cpu[@]}" \
    --max_steps 450 --per_device_train_batch_size 64 --learning_rate 2e-3 --warmup_steps 50 --weight_decay 0.01 \
    --adam_beta2 0.98 --remove_unused_columns False --logging_steps 10 --save_steps 200

# Stage 1: the query transformer alone, captions, m = M (3 minutes)
[ -e "$runs/start/processor_config.json" ] || $python -m recipes.tiny.assemble --output_dir "$runs/start" \
    --vision_tower "$runs/vision" --language_model "$runs/text"
train stage1 --stage 1 --model "$runs/start" --data_path "$runs/data/captions.json" \
    --max_steps 300 --learning_rate 1e-3 --warmup_steps 20 --save_steps 200

# Stage 2 of the paper: m drawn from {2, 4, ..., 64} at every step (23 minutes). The shipped run was planned for 3,400
# steps and broken off after 1,200, with the learning rate still at 7.5e-4; hence the constant rate here.
train stage2-even --stage 2 --model "$runs/stage1" --data_path "$runs/data/conversations.json" \
    --lr_scheduler_type constant_with_warmup --max_steps 1200 --learning_rate 1e-3 --warmup_steps 100 --save_steps 300

num_visual_tokens=1,1,2,2,4,4,8,8,16,16,24,32,32,48,64,64,64
# Stage 2 once more, with small m drawn as often as large ones: the paper's stage hardly ever meets them, and never
# m = 1 (40 minutes)
train stage2-small --stage 2 --model "$runs/stage2-even" --data_path "$runs/data/conversations.json" --seed 43 \
    --num_visual_tokens "$num_visual_tokens" --max_steps 1900 --learning_rate 1e-3 --warmup_steps 50 --save_steps 300

# And with fewer questions in any order: "List everything." has come last so far, after answers that help (13 minutes)
train stage2 --stage 2 --model "$runs/stage2-small" --data_path "$runs/data/short.json" --seed 44 \
    --num_visual_tokens "$num_visual_tokens" --max_steps 1300 --learning_rate 7e-4 --warmup_steps 30 --save_steps 400

$python -m recipes.tiny.export --model "$runs/stage2" --output_dir "$runs/mqt-llava-tiny"
$python -m mqt_llava.training.evaluate --model "$runs/mqt-llava-tiny" --output_dir "$runs/accuracy"
