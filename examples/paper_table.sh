#!/usr/bin/env bash
# The table of the paper (arXiv 2405.19315): 11 benchmarks at eight numbers of visual tokens, through lmms-eval 0.7.3, beside the
# paper's figures.
#
#     pip install "mqt-llava[lmms]"
#     hf auth login    # lmms-eval's tasks ask for a token
#     bash examples/paper_table.sh MODEL [FOLDER]
#
# MODEL is a folder or a repository, FOLDER (results by default) where results go. Called again, it goes on with the numbers of
# visual tokens that have none. Two environment variables:
#
#     BATCH_SIZE  questions at once, 16 by default
#     LMMS_EVAL   how lmms-eval is started, such as "accelerate launch --num_processes 8 -m lmms_eval"
#
# LLaVA-Wild and MM-Vet are judged by GPT and are left out unless OPENAI_API_KEY is set.
# It has been run up to the downloads, of data and of a model; the figures that it makes were not compared with the paper's.
#
# What lmms-eval asks, beside LLaVA-1.5's scripts, which are the authors' too:
#
#     VQAv2       same suffix; here on the validation split, there on test-dev by a server
#     GQA         same suffix and split
#     VizWiz      same suffix; here the question's capitals become small, and the split is val, there test by a server
#     SQA-IMG     same suffix, behind context, question and options; that order there is in a file that was not seen
#     POPE        same suffix; F1 over the three subsets together, there its mean over them; only a bare yes or no counts
#     MME         same suffix, in place of "Please answer yes or no."
#     MMBench     same suffix behind an empty line; here "There are several options:" stands between question and options, and hint and
#                 question share a line; letters are read without GPT, from the dev split
#     MMMU        suffix behind an empty line; images stand in front of the text, as everywhere in LLaVA-1.5. LLaVA-1.5 has no script for
#                 it, and the authors used VLMEvalKit's
#     LLaVA-Wild  the bare question in both; another judge than GPT-4 of 2023, by MODEL_VERSION
#     MM-Vet      here lmms-eval asks for reasoning first; that is taken away below, for LLaVA-1.5 asks the bare question
set -euo pipefail
model=${1:?"usage: paper_table.sh MODEL [FOLDER]"}
results=${2:-results}
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -ra lmms_eval <<< "${LMMS_EVAL:-lmms-eval}"

cat > "$work/mmvet_llava.yaml" <<YAML
include: $(python -c "from importlib.util import find_spec; print(find_spec('lmms_eval').submodule_search_locations[0])")/tasks/mmvet/mmvet.yaml
task: mmvet_llava
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: ""}}
YAML
tasks=vqav2_val,gqa,vizwiz_vqa_val,scienceqa_img,pope,mme,mmbench_en_dev_static,mmmu_val
if [ -n "${OPENAI_API_KEY:-}" ]; then
    tasks+=,llava_in_the_wild,mmvet_llava
else
    echo "OPENAI_API_KEY is not set: without LLaVA-Wild and MM-Vet" >&2
fi

# Results of other models or tasks would be taken for these
mkdir -p "$results"
echo "$model $tasks" > "$work/setting"
[ -e "$results/setting" ] || cp "$work/setting" "$results/setting"
if ! cmp -s "$work/setting" "$results/setting"; then
    echo "$results has results of $(cat "$results/setting"), not of $(cat "$work/setting"): choose another FOLDER" >&2
    exit 2
fi

for m in 2 4 8 16 36 64 144 256; do
    compgen -G "$results/$m/*/*_results.json" > /dev/null && continue
    "${lmms_eval[@]}" --model mqt_llava --model_args "pretrained=$model,num_visual_tokens=$m" --batch_size "${BATCH_SIZE:-16}" \
        --include_path "$work" --tasks "$tasks" --output_path "$results/$m" --log_samples
    # lmms-eval ends well whatever happened
    compgen -G "$results/$m/*/*_results.json" > /dev/null || { echo "There are no results for m = $m." >&2; exit 1; }
done
python "$here/paper_table.py" "$results"
