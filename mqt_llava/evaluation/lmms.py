"""lmms-eval's tasks, without a fork of it: `lmms-eval --model mqt_llava --model_args pretrained=DIR,num_visual_tokens=16 ...`

lmms-eval finds this module through `manifest.py`. It creates the model from `--model_args`, builds the requests of all tasks and passes
each rank its share of them at once.
"""

import contextlib
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..cli.errors import UsageError
from ..cli.models import load_config, load_model, name_checkpoint, resolve_device
from ..cli.options import Dtype
from ..cost import CostModel
from ..modeling.adaptive_mqt_llava import resolve_schedule
from ..modeling.budget_mqt_llava import default_num_visual_tokens, resolve_visual_token_counts
from ..placement import Placement, stored_dtype
from ..training.data import SampleError, open_image
from .answers import NUM_BATCHES, VisualTokenCache


# Other settings in tasks are for certain models, such as `image_aspect_ratio`
GENERATION_SETTINGS = (
    "min_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
    "early_stopping",
)
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k")


@dataclass
class VisualTokenCounts(TokenCounts):
    """Token counts of an answer for `--log_samples`. `input_tokens` includes `visual_tokens`, those of all images."""

    visual_tokens: int | None = None

    def to_dict(self):
        return super().to_dict() | {"visual_tokens": self.visual_tokens}


class MQTLlavaLmms(lmms):
    """
    An MQT-LLaVA model for lmms-eval. With several processes (`accelerate launch`, `torchrun`), each loads the whole model and answers
    its share of the questions.

    Args:
        pretrained (`str`): a folder or a Hub repository. Defaults to the base model of `adapter`.
        num_visual_tokens (`int` or `"auto"`): m of every image, or as many as each question needs, by the schedule in the
            checkpoint's generation config. Defaults to that config's `num_visual_tokens`, or M.
        batch_size (`int`): number of questions per batch. Set by lmms-eval's `--batch_size`.
        device (`str`): "cpu", "cuda:1" and so on; "auto" uses a GPU if there is one. Set by lmms-eval's `--device`.
        device_map (`str`): "auto", "balanced" and so on, to split the model across several GPUs.
        dtype (`str`): of the weights. "auto": float32 on a CPU, else that of the checkpoint.
        attn_implementation (`str`): as for `from_pretrained`.
        adapter (`str`): a LoRA adapter to merge, a folder or a Hub repository.
        max_new_tokens (`int`): the maximum length of an answer if the task doesn't set it.
        system_prompt (`str`): a text, or a file with it, that replaces the chat template's.

    Raises:
        `ValueError`: for invalid arguments, before the weights are read.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        num_visual_tokens: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        adapter: str | None = None,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"mqt_llava has no model argument {', '.join(unknown)}; it takes pretrained, num_visual_tokens, batch_size, device, "
                "device_map, dtype, attn_implementation, adapter, max_new_tokens and system_prompt."
            )
        if pretrained is None and adapter is None:
            raise ValueError("A model is needed: --model_args pretrained=DIR_OR_REPO.")
        self.batch_size = _positive_integer("batch_size", batch_size)
        self.max_new_tokens = _positive_integer("max_new_tokens", max_new_tokens)
        if dtype not in list(Dtype):
            raise ValueError(f"dtype must be one of {', '.join(Dtype)}; got {dtype!r}.")
        self.system_prompt = system_prompt and self._resolve_system_prompt(system_prompt.replace("\\n", "\n"))
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and device_map is not None:
            raise ValueError("device_map splits one model across GPUs: start a single process.")
        try:
            checkpoint = name_checkpoint(pretrained, adapter)
            config = load_config(checkpoint)
            self.num_visual_tokens, self.schedule = _resolve_num_visual_tokens(num_visual_tokens, checkpoint, config)
            self.device = self.accelerator.device if self._world_size > 1 else resolve_device(device or "auto")
            default_dtype = torch.float32 if self.device.type == "cpu" else stored_dtype(config)
            dtype = default_dtype if dtype == Dtype.auto else getattr(torch, dtype)
            options = {"device_map": device_map or {"": self.device}, "attn_implementation": attn_implementation}
            self.processor, self._model = load_model(checkpoint, self.device, Placement(dtype, options), adapter)
        except UsageError as error:
            raise ValueError(error.message) from None
        self.device = self._model.device  # that of the embeddings, for the inputs
        self.max_length = getattr(config.get_text_config(), "max_position_embeddings", float("inf"))
        self.count_flops = cache(
            partial(_count_flops, CostModel(config), self.schedule)
        )  # many answers have the same cost
        self.totals = Counter()
        self.encoded = VisualTokenCache(self._model, self.num_visual_tokens)

    # ------------------------------------------------------------------------------------------------------ answers

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answers in the order of the requests. Requests with equal settings share batches, sorted by length a few batches at a time:
        tasks ask about an image in successive requests, and it is encoded once for them."""
        settings = [json.dumps(self.settings_of(request), sort_keys=True, default=str) for request in requests]
        results = [None] * len(requests)
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for setting in dict.fromkeys(settings):
                group = [row for row in range(len(requests)) if settings[row] == setting]
                generation = self.read_settings(self.settings_of(requests[group[0]]))
                for rows in self.batches_of(group, requests):
                    asked = [self.read_messages(self.messages_of(requests[row])) for row in rows]
                    begin = time.perf_counter()
                    answers = self.answer(asked, **generation)
                    self.totals["seconds"] += time.perf_counter() - begin
                    for row, answer in zip(rows, answers):
                        results[row] = self.note(requests[row], answer)
                    progress.update(len(rows))
        return results

    def batches_of(self, rows: list[int], requests):
        """Batches of rows, sorted by length a few batches at a time. The visual tokens of the last images are kept for the next ones."""
        size = NUM_BATCHES * self.batch_size
        for start in range(0, len(rows), size):
            some = sorted(rows[start : start + size], key=lambda row: -len(requests[row].args[0]))
            for first in range(0, len(some), self.batch_size):
                yield some[first : first + self.batch_size]
            self.encoded.keep(list(self.encoded.visual_tokens)[-size:])

    def settings_of(self, request) -> dict:
        return request.args[2]

    def messages_of(self, request) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def read_settings(self, settings: dict) -> dict:
        """Convert a task's `generation_kwargs` to arguments of [`answer`]."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        temperature = settings.get("temperature")
        do_sample = settings.get("do_sample", bool(temperature)) and temperature != 0  # 0 means greedy decoding
        num_beams = settings.get("num_beams") or 1
        if self.schedule is not None and (do_sample or num_beams > 1):
            raise ValueError(
                f"num_visual_tokens=auto supports only greedy decoding, but the task asks for {'sampling' if do_sample else 'beam search'}."
            )
        names = GENERATION_SETTINGS + (SAMPLING_SETTINGS if do_sample else ())
        generation = {name: settings[name] for name in names if settings.get(name) is not None}
        return {
            "until": until,
            "max_new_tokens": settings.get("max_new_tokens") or self.max_new_tokens,
            "generation": generation | {"do_sample": bool(do_sample), "num_beams": num_beams},
        }

    def read_messages(self, messages: list[dict]) -> tuple[str, list]:
        """The prompt for chat messages, and their images, which are not opened yet."""
        messages = ChatMessages(messages=messages)
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"MQT-LLaVA takes images and text; the task has {'videos' if videos else 'audio'}.")
        messages, token = messages.to_hf_messages(), self.processor.image_token
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        texts = [[part["text"] for part in message["content"] if part["type"] == "text"] for message in messages]
        num_named = sum(text.count(token) for parts in texts for text in parts)
        if num_named == len(images):  # the texts have the placeholders already
            messages = [message | {"content": "".join(parts)} for message, parts in zip(messages, texts)]
        elif num_named:
            raise ValueError(f"A question has {num_named} {token} in its text, but {len(images)} images.")
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), images

    def answer(self, asked: list[tuple[str, list]], until, max_new_tokens, generation) -> list[dict]:
        """Answer prompts about images in one batch. If one of them has a damaged image or is too long, they are answered one by one,
        and that one gets an `error`."""
        try:
            return self.answer_batch(asked, until, max_new_tokens, generation)
        except SampleError as error:
            if len(asked) == 1:
                logger.error(f"A question cannot be answered and counts as wrong: {error}")
                return [{"text": "", "error": str(error)}]
            return [self.answer([one], until, max_new_tokens, generation)[0] for one in asked]

    @torch.no_grad()
    def answer_batch(self, asked, until, max_new_tokens, generation) -> list[dict]:
        inputs = self.prepare([prompt for prompt, _ in asked], [image for _, images in asked for image in images])
        length, tokenizer = inputs["input_ids"].shape[1], self.processor.tokenizer
        if "pixel_values" in inputs:
            pixel_values = inputs.pop("pixel_values")
            # By content: tasks make a new object for each question
            names = [hash(image.numpy().tobytes()) for image in pixel_values]
            inputs["mm_encoder_outputs"] = {"image": self.encoded.encode(pixel_values.to(self.device), names)}
        inputs = inputs.to(self.device)
        criteria = [StopStringCriteria(tokenizer, until)] if until else []
        outputs = self._model.generate(
            **inputs,
            num_visual_tokens=self.schedule or self.num_visual_tokens,
            max_new_tokens=int(min(max_new_tokens, self.max_length - length)),
            stopping_criteria=StoppingCriteriaList(criteria),
            return_dict_in_generate=True,
            **generation,
        )
        new = outputs.sequences[:, length:].cpu()
        is_placeholder = inputs["input_ids"] == self._model.config.image_token_id
        num_text_tokens = (inputs["attention_mask"].bool() & ~is_placeholder).sum(-1).tolist()
        num_new_tokens = (new != tokenizer.pad_token_id).sum(-1).tolist()
        num_images = [len(images) for _, images in asked]
        counts = [self.num_visual_tokens] * sum(num_images)
        stages = [None] * len(asked)
        if self.schedule is not None:
            counts, stages = outputs.visual_token_counts.tolist(), outputs.stages.tolist()
        answers = []
        for i, text in enumerate(self.processor.batch_decode(new, skip_special_tokens=True)):
            for stop in until:
                text = text.partition(stop)[0]
            visual_tokens, counts = sum(counts[: num_images[i]]), counts[num_images[i] :]
            flops = self.count_flops(stages[i], visual_tokens, num_images[i], num_text_tokens[i], num_new_tokens[i])
            tokens = VisualTokenCounts(
                num_text_tokens[i] + visual_tokens, num_new_tokens[i], visual_tokens=visual_tokens
            )
            answers.append({"text": text.strip(), "tokens": tokens, "flops": flops})
        return answers

    def prepare(self, prompts: list[str], images: list):
        """The model's inputs, with m placeholders for each image; with a schedule, m of its last stage."""
        inputs = self.processor(
            images=[open_image(image) for image in images] or None,
            text=prompts,
            num_visual_tokens=self.num_visual_tokens,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template writes the BOS
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        if length >= self.max_length:
            raise SampleError(f"the prompt has {length} tokens, but the model supports at most {self.max_length}")
        return inputs

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("mqt_llava doesn't support multi-round tasks.")

    # ------------------------------------------------------------------------------------------------ log-likelihoods

    @torch.no_grad()
    def loglikelihood(self, requests) -> list[GenerationResult]:
        """
        Score given continuations, such as the options of a question: `(loss, whether it is what greedy decoding gives)`. lmms-eval
        documents a log-probability, but chooses the option with the lowest value; its models return the loss, averaged over tokens,
        and so does this one.

        Tasks of this kind need `--force_simple`. The images of a document are encoded once for all its continuations.
        """
        asked = defaultdict(list)
        for row, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            asked[task, split, doc_id, context].append(row)
        results = [None] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", disable=self.rank != 0) as progress:
            for (task, split, doc_id, context), rows in asked.items():
                _, _, doc_to_visual, *_ = requests[rows[0]].args
                doc = self.task_dict[task][split][doc_id]
                targets = [requests[row].args[1] for row in rows]
                targets = [target(doc) if callable(target) else target for target in targets]
                begin = time.perf_counter()
                prompt, images = self.read_messages(_user_turn(context, doc_to_visual and doc_to_visual(doc)))
                for row, result in zip(rows, self.score(prompt, images, targets)):
                    results[row] = GenerationResult(result)  # lmms-eval 0.7.3 would convert a plain tuple to text
                self.totals["seconds"] += time.perf_counter() - begin
                progress.update(len(rows))
        return results

    def score(self, prompt: str, images: list, targets: list[str]) -> list[tuple[float, bool]]:
        """`(loss, is_greedy)` of each answer to a prompt."""
        inputs, eos = self.prepare([prompt], images).to(self.device), self.processor.tokenizer.eos_token
        # Answers as in the chat template, which the processor tokenizes right; their end-of-sequence token is not scored
        answers = [f" {str(target).strip()}{eos}" for target in targets]
        answers = [self.processor(text=text, add_special_tokens=False)["input_ids"][0][:-1] for text in answers]
        image_outputs = None
        if images:
            image_outputs = self._model.get_image_features(
                inputs["pixel_values"], self.num_visual_tokens, return_dict=True
            )
        results = []
        for start in range(0, len(answers), self.batch_size):
            results += self.score_batch(inputs, image_outputs, answers[start : start + self.batch_size])
        return results

    def score_batch(self, inputs, image_outputs, answers: list[list[int]]) -> list[tuple[float, bool]]:
        number, lengths = len(answers), torch.tensor([len(ids) for ids in answers], device=self.device)
        pad = self.processor.tokenizer.pad_token_id or 0
        padded = [ids + [pad] * (int(lengths.max()) - len(ids)) for ids in answers]
        ids = torch.tensor(padded, dtype=torch.long, device=self.device)
        is_answer = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        prompt = inputs["input_ids"].expand(number, -1)
        batch = {
            "input_ids": torch.cat([prompt, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(prompt), is_answer.long()], dim=1),
        }
        if image_outputs is not None:
            outputs = BaseModelOutputWithPooling(pooler_output=list(image_outputs.pooler_output) * number)
            batch["mm_encoder_outputs"] = {"image": outputs}
        if "visual_token_counts" in inputs:
            batch["visual_token_counts"] = inputs["visual_token_counts"].repeat(number)
        logits = self._model(**batch, logits_to_keep=ids.shape[1] + 1).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].masked_fill(~is_answer, 0)
        losses = -log_probs.sum(-1) / lengths.clamp(min=1)
        is_greedy = ((logits.argmax(-1) == ids) | ~is_answer).all(-1)
        return list(zip(losses.tolist(), is_greedy.tolist()))

    # -------------------------------------------------------------------------------------------------------- figures

    def note(self, request, answer: dict) -> GenerationResult:
        """Count an answer. Ranks with fewer questions than others get some of them twice, which are counted once."""
        tokens = answer.get("tokens")
        if not (request.metadata or {}).get("__padding_only__"):
            self.totals["answers"] += 1
            self.totals["failed"] += tokens is None
            if tokens is not None:
                self.totals["visual_tokens"] += tokens.visual_tokens
                self.totals["new_tokens"] += tokens.output_tokens
                self.totals["flops"] += answer["flops"]
        return GenerationResult(answer["text"], tokens)

    def clean(self):
        """Called by lmms-eval on every rank after all requests. Adds figures of the run to its table and, as `throughput`, to its
        results file."""
        ranks = gather_object([self.totals])
        totals, seconds = sum(ranks, Counter()), max(rank["seconds"] for rank in ranks)
        answered = totals["answers"] - totals["failed"]
        if answered and self.rank == 0:
            figures = {
                "visual_tokens": totals["visual_tokens"] / answered,
                "gflops": totals["flops"] / answered / 1e9,
                "failed": totals["failed"],
            }
            # lmms-eval prefixes the names with avg_, since it averages over calls of `log_metrics`. This is the only call
            log_metrics(seconds, totals["new_tokens"], totals["new_tokens"] / max(seconds, 1e-9), figures)
        self.totals.clear()
        self.encoded.keep([])
        super().clean()


class MQTLlavaSimpleLmms(MQTLlavaLmms):
    """
    The same for `--force_simple`, where a request is a text with images in front of it. lmms-eval's tasks with `output_type:
    multiple_choice` or `loglikelihood` need it.
    """

    is_simple = True

    def settings_of(self, request) -> dict:
        return request.args[1]

    def messages_of(self, request) -> list[dict]:
        context, _, doc_to_visual, doc_id, task, split = request.args
        return _user_turn(context, doc_to_visual and doc_to_visual(self.task_dict[task][split][doc_id]))


def _user_turn(text: str, visuals: list | None) -> list[dict]:
    content = []
    for visual in visuals or []:
        if isinstance(visual, (str, dict)):  # paths of videos, and audio
            raise ValueError("MQT-LLaVA takes images and text; the task has videos or audio.")
        content.append({"type": "image", "url": visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _positive_integer(name: str, value) -> int:
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(value, (bool, float)) and int(value) >= 1:
            return int(value)
    raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _resolve_num_visual_tokens(num_visual_tokens, checkpoint: str, config):
    """m and `None`, or for "auto" m of the last stage and the schedule."""
    generation_config = GenerationConfig()
    with contextlib.suppress(OSError):  # there is none
        generation_config = GenerationConfig.from_pretrained(checkpoint)
    if num_visual_tokens is None:
        num_visual_tokens = default_num_visual_tokens(generation_config)
    schedule = resolve_schedule(num_visual_tokens, [generation_config], config.num_query_tokens)
    if schedule is not None:
        return schedule.num_visual_tokens[-1], schedule
    return resolve_visual_token_counts(num_visual_tokens, 1, config.num_query_tokens)[0], None


def _count_flops(costs, schedule, stage, num_visual_tokens, num_images, num_text_tokens, num_new_tokens) -> int:
    """FLOPs of an answer. With a schedule, an estimate up to the stage that gave it: earlier drafts are assumed to be as long."""
    request = {"num_text_tokens": num_text_tokens, "num_images": num_images, "num_new_tokens": max(1, num_new_tokens)}
    if stage is None or not num_images:
        return costs(num_visual_tokens // num_images if num_images else 1, **request).flops
    return sum(cost.flops for cost in costs.stages(schedule, **request)[: stage + 1])
