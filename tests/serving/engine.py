"""Answers requests with vLLM in a process of its own, since vLLM changes transformers' classes in the one it runs in.

    python -m tests.serving.engine JOB.json ANSWERS.json

See `tests.serving.common.answer_with_vllm` for what a job holds and what is written.
"""

import json
import sys

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(job, answers_file):
    llm = LLM(job["model"], trust_remote_code=True, **job["options"])
    rows = []
    if job["options"].get("tensor_parallel_size", 1) == 1:  # else the model is in other processes
        llm.apply_model(lambda model: record_rows(model, rows))
    # `generate` suppresses the placeholder, vLLM does not read `suppress_tokens`
    bias = {job["image_token_id"]: -100}
    sampling = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"], logit_bias=bias)
    lora = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    options = {"sampling_params": sampling, "lora_request": lora, "use_tqdm": False}

    passes = []
    for way in job["passes"]:
        if way == "chat":
            outputs = [output for request in job["requests"] for output in chat(llm, request, options)]
        else:
            prompts = [to_prompt(request) for request in job["requests"]]
            groups = [prompts] if way == "together" else [[prompt] for prompt in prompts]
            outputs = [output for group in groups for output in llm.generate(group, **options)]
        passes.append([list(output.outputs[0].token_ids) for output in outputs])
    with open(answers_file, "w") as file:
        json.dump({"passes": passes, "rows": rows}, file)


def to_prompt(request):
    prompt = {"prompt": request["prompt"]}
    if request["images"]:
        prompt["multi_modal_data"] = {"image": [Image.open(path) for path in request["images"]]}
    if request["num_visual_tokens"] is not None:
        prompt["mm_processor_kwargs"] = {"num_visual_tokens": request["num_visual_tokens"]}
    return prompt


def chat(llm, request, options):
    """The request's turns, with its images in the first."""
    pictures = [{"type": "image_pil", "image_pil": Image.open(path)} for path in request["images"]]
    first, *others = request["turns"]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": first}]}]
    for number, text in enumerate(others):
        messages.append({"role": "user" if number % 2 else "assistant", "content": text})
    m = request["num_visual_tokens"]
    return llm.chat(messages, mm_processor_kwargs=None if m is None else {"num_visual_tokens": m}, **options)


def record_rows(model, rows):
    """Note how many visual tokens `get_image_features` makes of each image that it is given."""
    encode = model.model.get_image_features

    def get_image_features(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        rows.extend(len(tokens) for tokens in outputs.pooler_output)
        return outputs

    model.model.get_image_features = get_image_features


if __name__ == "__main__":
    with open(sys.argv[1]) as job_file:
        main(json.load(job_file), sys.argv[2])
