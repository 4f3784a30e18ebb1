"""What `mqt-llava ask` should answer with the small model; the fixtures are in conftest.py."""

from tests.small_model import make_model, make_processor


LENGTH = 12  # new tokens


def expected_answer(images, turns, m, length=LENGTH):
    """The answer to the last of `turns`, by the model called directly on the written-out prompt."""
    model, processor = make_model(), make_processor()
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. "
    )
    prompt = "<s>" + system + "USER: " + "<image>\n" * len(images) + turns[0] + " ASSISTANT:"
    for answer, question in zip(turns[1::2], turns[2::2]):
        prompt += f" {answer}</s>USER: {question} ASSISTANT:"
    inputs = processor(images=images, text=prompt, num_visual_tokens=m, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
