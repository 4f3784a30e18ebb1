#!/usr/bin/env bash
# How mqt-llava-tiny was trained: from scratch, on two CPU cores. Each step is one command, and goes on where it was broken off
# when called again. Needs `pip install -c constraints.txt -e ".[train,evaluate]"` and Debian's fonts-noto-color-emoji and
# fonts-symbola.
#
#     bash recipes/tiny/train.sh runs
set -euo pipefail
runs=${1:?"usage: train.sh FOLDER"}
python=${PYTHON:-python}
# One process a core, each with half of the batch. glibc's allocator takes a third of a step, once it is fragmented; Debian's
# libtcmalloc-minimal4, where it is installed, does not
tcmalloc=$(ldconfig -p | sed -n 's/.*libtcmalloc_minimal\.so\.4 .*=> //p' | head -n 1)
launch=(env OMP_NUM_THREADS=1 ${tcmalloc:+LD_PRELOAD="$tcmalloc"} "$python" -m torch.distributed.run --nproc_per_node 2 -m)
on_cpu=(--use_cpu --bf16 --max_grad_norm 1 --lr_scheduler_type cosine --learning_rate 1e-3 --save_total_limit 2 --report_to none)

# A stage as `mqt-llava train` has it, gone on with where there is a checkpoint: its folder, then its options. The paper's values
# that are meant for GPUs and 7B parameters are undone. Layers are compiled one by one, for any length
tune() {
    local resume=()
    if compgen -G "$runs/$1/checkpoint-*" > /dev/null; then resume=(--resume); fi
    [ -e "$runs/$1/model.safetensors" ] ||
        ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true ACCELERATE_DYNAMO_USE_DYNAMIC=true \
            "${launch[@]}" recipes.tiny.tune --output_dir "$runs/$1" --image_folder "$runs/data/images" "${resume[@]}" "${on_cpu[@]}" \
            --torch_compile --ddp_backend gloo --per_device_train_batch_size 32 --gradient_accumulation_steps 1 \
            --gradient_checkpointing false --attn_implementation eager --dataloader_num_workers 0 --logging_steps 10 --save_steps 200 \
            "${@:2}"
}

# 150,000 pictures with captions and one to six questions each, and 15,000 pairs
[ -e "$runs/data/patches.npy" ] || OMP_NUM_THREADS=1 $python -m recipes.tiny.make_data --output_dir "$runs/data"

# In place of CLIP: a tower that names what every patch shows
[ -e "$runs/vision/model.safetensors" ] ||
    "${launch[@]}" recipes.tiny.pretrain_vision --data_path "$runs/data" --output_dir "$runs/vision" "${on_cpu[@]}" --torch_compile \
        --ddp_backend gloo --max_steps 4000 --per_device_train_batch_size 64 --per_device_eval_batch_size 250 \
        --warmup_steps 200 --weight_decay 0.05 --remove_unused_columns False \
        --logging_steps 20 --eval_strategy steps --eval_steps 500 --save_steps 500

# In place of Vicuna: a language model that answers from visual tokens, made of labels. Takes the place of stage 1, too
[ -e "$runs/start/model.safetensors" ] ||
    "${launch[@]}" recipes.tiny.pretrain_language --data_path "$runs/data" --vision_tower "$runs/vision" --output_dir "$runs/start" \
        "${on_cpu[@]}" --learning_rate 2e-3 --ddp_backend gloo --max_steps 4000 --per_device_train_batch_size 32 --warmup_steps 40 \
        --weight_decay 0.01 --logging_steps 20 --save_steps 250

# Stage 2: query transformer and language model, conversations. Small m are drawn as often as large ones, m = 1 among them, which
# the paper never draws
tune stage2 --stage 2 --model "$runs/start" --data_path "$runs/data/conversations.json" --max_steps 7000 --warmup_steps 50 \
    --num_visual_tokens 1,1,1,2,2,2,3,4,4,6,8,8,12,16,16,24,32,32,48,64,64,64

[ -e "$runs/mqt-llava-tiny" ] || $python -m recipes.tiny.export --model "$runs/stage2" --output_dir "$runs/mqt-llava-tiny"

# What `num_visual_tokens="auto"` means for it
$python -m recipes.tiny.make_questions --output_dir "$runs/calibration" --first_seed 30000000 --pictures 4500
$python -m mqt_llava.cli calibrate "$runs/calibration/questions.json" --model "$runs/mqt-llava-tiny" --tolerance 0.5

$python -m recipes.tiny.evaluate --model "$runs/mqt-llava-tiny" --output_dir "$runs/accuracy"
$python -m recipes.tiny.families --model "$runs/mqt-llava-tiny" --output_dir "$runs/accuracy"
