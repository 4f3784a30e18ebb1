"""As many visual tokens as the question needs: `generate(num_visual_tokens="auto")`.

Visual token i is the same for every m. So a question can be answered with few tokens and, if the confidence is low, again with
m' > m: tokens m + 1 to m' are appended to those in the cache, the image is not encoded again, and the answer so far is a draft
that is verified in one forward pass."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .budget_mqt_llava import CACHE_NAME, count_visual_tokens, rebudget, resolve_visual_token_counts


AUTO = "auto"


@dataclass
class VisualTokenSchedule:
    """
    The stages of `generate(num_visual_tokens="auto")`: their numbers of visual tokens, and the confidence at which an answer is
    accepted.

    The confidence in an answer is the product of its tokens' probabilities; if the answer is longer than `window` tokens, the
    smallest product over `window` consecutive tokens. It can only fall as the answer grows, so a stage stops as soon as its
    confidence is below the threshold. The answer of the last stage is always accepted.

    Args:
        num_visual_tokens (`list[int]`): m of each stage, in ascending order.
        thresholds (`list[float]`): the lowest confidence, from 0 to 1, at which the answer of a stage is accepted. One for each
            stage but the last.
        window (`int`, *optional*, defaults to 32): number of answer tokens that the confidence is computed over.
        calibration (`dict`, *optional*): what the thresholds were calibrated on, as written by `mqt-llava calibrate`; `None`
            for default thresholds.

    Raises:
        `ValueError`: if `num_visual_tokens` doesn't ascend, for a wrong number of thresholds, and for values out of range.
    """

    num_visual_tokens: list[int]
    thresholds: list[float]
    window: int = 32
    calibration: dict | None = None

    def __post_init__(self):
        stages, thresholds = self.num_visual_tokens, self.thresholds

        def is_integer(value):
            return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1

        if not isinstance(stages, (list, tuple)) or not stages or not all(map(is_integer, stages)):
            raise ValueError(f"A schedule's `num_visual_tokens` must be a list of positive integers; got {stages!r}.")
        if any(m >= larger for m, larger in pairwise(stages)):
            raise ValueError(f"A schedule's `num_visual_tokens` must be in ascending order; got {list(stages)}.")
        if (
            not isinstance(thresholds, (list, tuple))
            or len(thresholds) != len(stages) - 1
            or not all(isinstance(t, Real) and not isinstance(t, bool) and 0 <= t <= 1 for t in thresholds)
        ):
            raise ValueError(
                f"A schedule of {len(stages)} stages needs {len(stages) - 1} `thresholds` from 0 to 1; got {thresholds!r}."
            )
        if not is_integer(self.window):
            raise ValueError(f"A schedule's `window` must be a positive integer; got {self.window!r}.")
        if not isinstance(self.calibration, (dict, NoneType)):
            raise ValueError(f"A schedule's `calibration` must be a dict; got {self.calibration!r}.")
        # Python numbers, so that JSON can store them
        self.num_visual_tokens, self.window = [int(m) for m in stages], int(self.window)
        self.thresholds = [float(threshold) for threshold in thresholds]

    @classmethod
    def default(cls, num_query_tokens: int) -> "VisualTokenSchedule":
        """The schedule of a checkpoint without calibration: M / 32, M / 8 and M = `num_query_tokens` visual tokens, with
        conservative thresholds."""
        stages = sorted({max(1, num_query_tokens // 32), max(1, num_query_tokens // 8), num_query_tokens})
        return cls(stages, [0.95, 0.75][: len(stages) - 1])

    def to_dict(self) -> dict:
        """The value to store as `generation_config.visual_token_schedule`, which is saved with the checkpoint."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def resolve_schedule(num_visual_tokens, generation_configs, num_query_tokens: int) -> VisualTokenSchedule | None:
    """The schedule that `generate(num_visual_tokens=...)` was given, or the checkpoint's own for `"auto"`; `None` for anything else.

    Raises:
        `ValueError`: for any other string, for `"auto"` if no generation config has a schedule, and for a schedule beyond M.
    """
    if isinstance(num_visual_tokens, str):
        if num_visual_tokens != AUTO:
            raise ValueError(
                f'`num_visual_tokens` must be an integer, a list of them, one per image, or "auto"; got {num_visual_tokens!r}.'
            )
        schedules = (getattr(config, "visual_token_schedule", None) for config in generation_configs)
        settings = next((schedule for schedule in schedules if schedule is not None), None)
        if settings is None:
            raise ValueError(
                '`num_visual_tokens="auto"` needs a `visual_token_schedule` in the generation config, and this checkpoint has none. '
                "Calibrate one on your own questions with `mqt-llava calibrate`, or pass the uncalibrated "
                f"`num_visual_tokens=VisualTokenSchedule.default({num_query_tokens})`."
            )
        try:
            num_visual_tokens = VisualTokenSchedule(**settings)
        except TypeError:
            raise ValueError(
                "A generation config's `visual_token_schedule` must be a dict with `num_visual_tokens`, `thresholds` and, optionally, "
                f"`window` and `calibration`; got {settings!r}."
            ) from None
    if not isinstance(num_visual_tokens, VisualTokenSchedule):
        return None
    resolve_visual_token_counts(num_visual_tokens.num_visual_tokens[-1], 1, num_query_tokens)
    return num_visual_tokens


def refuse_all_but_greedy(model, inputs: dict, args: tuple, generation_configs):
    """Several passes have no single set of scores and no single cache, and beams and samples cannot be verified as a draft."""

    def setting(name):
        values = (inputs.get(name), *(getattr(config, name, None) for config in generation_configs))
        return next((value for value in values if value is not None), None)

    flags: tuple[str, ...] = (
        "do_sample",
        "output_scores",
        "output_logits",
        "output_attentions",
        "output_hidden_states",
        "token_healing",
    )
    flags += (
        "cache_implementation",
        "stop_strings",
        "prompt_lookup_num_tokens",
        "watermarking_config",
        "prefill_chunk_size",
    )
    refused = [f"{name}={setting(name)!r}" for name in flags if setting(name)]
    numbers = ("num_beams", "num_return_sequences", "guidance_scale")
    refused += [f"{name}={setting(name)}" for name in numbers if (setting(name) or 1) != 1]
    refused += [f"use_cache={setting('use_cache')}"] if setting("use_cache") is False else []
    objects: tuple[str, ...] = (
        "assistant_model",
        "custom_generate",
        "inputs_embeds",
        "position_ids",
        "token_type_ids",
    )
    objects += ("max_length", "min_length", "negative_prompt_ids", CACHE_NAME, "past_key_values")
    refused += [f"`{name}`" for name in dict.fromkeys(objects) if inputs.get(name) is not None]
    refused += ["`synced_gpus`"] if inputs.get("synced_gpus") else []
    refused += [f"{len(args)} positional arguments after `prefix_allowed_tokens_fn`"] if args else []
    if inputs.get("streamer") is not None and len(inputs.get("input_ids", ())) > 1:
        refused.append("a `streamer` for several rows")
    if "prepare_inputs_for_generation" in vars(model):  # how PEFT prepends virtual tokens
        refused.append("an adapter with virtual tokens, such as prompt or prefix tuning")
    if refused:
        raise ValueError(
            f'`num_visual_tokens="auto"` supports only greedy decoding of prompts given as `input_ids`; got {", ".join(refused)}. '
            "(Instead of `stop_strings`, pass a `StopStringCriteria` in `stopping_criteria`.)"
        )
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        raise ValueError('`num_visual_tokens="auto"` needs full attention in every layer of the language model.')


@dataclass
class AdaptiveGenerateOutput(ModelOutput):
    """
    Output of `generate(num_visual_tokens="auto", return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the caller's prompt and the answer.
        visual_token_counts (`torch.LongTensor` of shape `(num_images,)`): the number of visual tokens of each image in the
            stage whose answer was accepted.
        stages (`torch.LongTensor` of shape `(batch_size,)`): the index of that stage, from 0.
        confidences (`torch.FloatTensor` of shape `(batch_size,)`): the confidence in each answer in that stage, from 0 to 1.
    """

    sequences: torch.Tensor | None = None
    visual_token_counts: torch.Tensor | None = None
    stages: torch.Tensor | None = None
    confidences: torch.Tensor | None = None


class AdaptiveDecoding:
    """
    A decoding loop for `generate(custom_generate=...)`, which prepares logits processors and stopping criteria.

    The prompt is laid out in columns that all rows share, so that the cache can be cropped at one length for all rows:

        [text before the first image, left-padded][its m visual tokens][the rest and the draft, left-padded]

    To continue with m', the cache is cropped after the first m visual tokens. The next m' - m visual tokens, the rest (whose
    images have m' tokens too) and the draft are then run. Rows whose answer was accepted are dropped from the batch before.

    Args:
        schedule (`VisualTokenSchedule`): the stages.
        visual_tokens (`list[torch.Tensor]`): of each image, of shape `(m, text_hidden_size)` with m of the last stage.
        config (`MQTLlavaConfig`): the model's config.
        streamer (`BaseStreamer`, *optional*): gets only tokens that are final: those of the last stage one by one, the answer of
            an earlier stage once it is accepted. (`generate` streams the prompt, but doesn't pass its streamer to a custom
            loop.)
    """

    def __init__(self, schedule, visual_tokens, config, streamer=None):
        self.schedule, self.visual_tokens, self.config, self.streamer = schedule, visual_tokens, config, streamer

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        self.model, self.prompt = model, input_ids
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        mask = inputs.get("attention_mask")
        self.mask = torch.ones_like(input_ids) if mask is None else mask
        self.before_first_image = 0  # columns
        batch_size, device = len(input_ids), input_ids.device
        # The answers: token ids, their log-probabilities in the current stage, lengths, and whether they have ended
        self.answer = input_ids.new_zeros(batch_size, 0)
        self.log_probs = torch.zeros(batch_size, 0, device=device)
        self.length = input_ids.new_zeros(batch_size)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)

        stages = self.schedule.num_visual_tokens
        self.images_of_row = (input_ids == self.config.image_token_id).sum(-1) // stages[0]
        stage_of_row = input_ids.new_zeros(batch_size)
        rows, cache = torch.arange(batch_size, device=device), DynamicCache(config=self.config.get_text_config())
        for stage, m in enumerate(stages):
            is_last = stage == len(stages) - 1
            # Rows without images have the same answer for every m
            threshold = (self.images_of_row[rows] > 0) * (0.0 if is_last else self.schedule.thresholds[stage])
            stage_of_row[rows] = stage
            self.answer_with(m, stages[stage - 1] if stage else 0, rows, cache, threshold, is_last)
            doubtful = self.confidence()[rows] < threshold
            if not doubtful.any():
                break
            cache.crop(self.before_first_image + m - cache.get_seq_length())
            kept = doubtful.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows = rows[kept]
        if self.streamer is not None:
            if not is_last:
                self.streamer.put(self.answer[0, : self.length[0]].cpu())
            self.streamer.end()
        eos_token_id = generation_config.eos_token_id
        eos_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
        pad_token_id = next((i for i in (generation_config.pad_token_id, eos_token_id) if i is not None), 0)
        is_padding = torch.arange(self.answer.shape[1], device=device) >= self.length[:, None]
        answer = self.answer.masked_fill(is_padding, pad_token_id)
        sequences = torch.cat([input_ids, answer[:, : int(self.length.max())]], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        counts = torch.tensor(stages, device=device)[stage_of_row].repeat_interleave(self.images_of_row)
        return AdaptiveGenerateOutput(sequences, counts, stage_of_row, self.confidence())

    def answer_with(self, m, num_cached, rows, cache, threshold, is_last):
        """Decode `rows` with m visual tokens, the first `num_cached` of which are in the cache, until each answer has ended or
        its confidence is below its `threshold`."""
        draft_length, had_ended = self.length[rows], self.ended[rows]
        longest = int(draft_length.max())
        draft = self.answer[rows, :longest]
        ids, mask, tokens, ends_in_image = self.lay_out(m, rows, draft, draft_length)
        ids = ids[:, self.before_first_image + num_cached if num_cached else 0 :]
        tokens = [t[num_cached:] if is_first else t for t, is_first in tokens]
        # The logits that predict the draft's tokens and the one after them. The draft ends in the last column, and the prompt
        # right before it, unless the prompt ends in the image: then its last logits are those of the last visual token
        ending = int(ends_in_image.any())
        kept = torch.arange(ids.shape[1] - longest - 1 - ending, ids.shape[1])
        if ending:
            kept[0] = self.before_first_image + m - 1 - (mask.shape[1] - ids.shape[1])
        logits = self.forward(ids, mask, cache, kept, tokens)
        predictions: list[tuple[torch.Tensor, torch.Tensor]] = []
        for position in range(longest + 1):
            if (had_ended & (draft_length <= position)).all():  # no row needs a token here
                predictions.append((torch.zeros_like(draft_length), torch.zeros_like(predictions[0][1])))
                continue
            column = (ending + longest - draft_length + position).clamp(max=ending + longest)
            column = column if position else column.masked_fill(ends_in_image, 0)
            logits_here = logits.gather(1, column[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0]
            predictions.append(self.choose(logits_here, rows, position))
        choices, log_probs = (torch.stack(columns, dim=1) for columns in zip(*predictions))
        agrees = (choices[:, :-1] == draft) & (torch.arange(longest, device=draft.device) < draft_length[:, None])
        num_kept = agrees.long().cumprod(-1).sum(-1)
        # The first token that differs from the draft, or the one after it, is this stage's choice
        is_whole = had_ended & (num_kept == draft_length)
        self.make_room(longest + 1)
        self.answer[rows, : longest + 1], self.log_probs[rows, : longest + 1] = choices, log_probs
        self.length[rows] = num_kept + (~is_whole).long()
        self.ended[rows] = is_whole
        self.check_end(rows[~is_whole])
        # Rejected tokens stay in the cache, but are masked
        column = torch.arange(mask.shape[1], device=mask.device)
        mask = mask * (column < mask.shape[1] - (draft_length - num_kept)[:, None])
        num_streamed = 0
        while True:
            if self.streamer is not None and is_last:
                self.streamer.put(self.answer[0, num_streamed : self.length[0]].cpu())
                num_streamed = int(self.length[0])
            running = ~self.ended[rows] & (self.confidence()[rows] >= threshold)
            if not running.any():
                return
            mask = torch.cat([mask, running[:, None].to(mask.dtype)], dim=1)
            last = self.answer[rows].gather(1, self.length[rows][:, None] - 1)
            logits = self.forward(last, mask, cache, 1)[:, -1]
            self.extend(logits, rows, running)

    def lay_out(self, m, rows, draft, draft_length):
        """Lay out `rows` with m visual tokens per image.

        Returns:
            ids and mask of shape `(len(rows), columns)`; for each image its visual tokens and whether it is its row's first
            image; and for each row whether its prompt ends in its first image.
        """
        ids, mask = self.prompt[rows], self.mask[rows]
        is_of_rows = torch.zeros_like(self.images_of_row, dtype=torch.bool).index_fill_(0, rows, True).tolist()
        images_of_row = self.images_of_row.tolist()
        image_rows = [row for row, number in enumerate(images_of_row) for _ in range(number)]
        tokens = [
            (tokens, i == 0 or image_rows[i - 1] != row)
            for i, (tokens, row) in enumerate(zip(self.visual_tokens, image_rows))
            if is_of_rows[row]
        ]
        if tokens:
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=[t for t, _ in tokens])}  # type: ignore[arg-type]  # a list, as LLaVA's
            first_m = self.schedule.num_visual_tokens[0]
            inputs = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": encoded}
            inputs["visual_token_counts"] = [first_m] * len(tokens)
            inputs = rebudget(inputs, m, self.config, "left")
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            cut = inputs["mm_encoder_outputs"]["image"].pooler_output
            tokens = [(t, is_first) for t, (_, is_first) in zip(cut, tokens)]
        is_placeholder, length = ids == self.config.image_token_id, ids.shape[1]
        start = (mask != 0).int().argmax(-1, keepdim=True)
        has_image = is_placeholder.any(-1, keepdim=True)
        first = torch.where(has_image, is_placeholder.int().argmax(-1, keepdim=True), start)
        behind = first + m * has_image
        if m == self.schedule.num_visual_tokens[0]:
            self.before_first_image = int((first - start).max())
        num_rest = int((length - behind[:, 0] + draft_length).max())

        def columns(number):
            return torch.arange(number, device=ids.device)

        before = first - self.before_first_image + columns(self.before_first_image)
        image = first + columns(m)
        rest = length + draft_length[:, None] - num_rest + columns(num_rest)
        source = torch.cat([before, image, rest], dim=1).clamp(0, length + draft.shape[1] - 1)
        is_real = torch.cat([before >= start, has_image.expand(-1, m), rest >= behind], dim=1)
        ids = torch.cat([ids, draft], dim=1).gather(1, source)
        mask = torch.cat([mask, torch.ones_like(draft)], dim=1).gather(1, source)
        pad_token_id = self.config.get_text_config().pad_token_id
        pad_token_id = pad_token_id if isinstance(pad_token_id, int) and pad_token_id >= 0 else 0
        ends_in_image = (has_image & (behind == length))[:, 0]
        return ids.masked_fill(~is_real, pad_token_id), mask * is_real, tokens, ends_in_image

    def forward(self, input_ids, mask, cache, logits_to_keep, visual_tokens=()):
        """Logits of shape `(rows, logits_to_keep, vocab_size)`."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, CACHE_NAME: cache}
        if visual_tokens:
            outputs = BaseModelOutputWithPooling(pooler_output=visual_tokens)
            inputs["mm_encoder_outputs"] = {"image": outputs}
        outputs = self.model(**inputs, use_cache=True, logits_to_keep=logits_to_keep, return_dict=True)
        return outputs.logits.to(self.prompt.device)

    def choose(self, logits, rows, position):
        """The most likely token after the first `position` tokens of each answer, and its log-probability."""
        scores = logits.to(torch.float32, copy=True)
        if self.logits_processor:  # they get all rows, since they may rely on row indices
            scores = scores.new_zeros(len(self.prompt), scores.shape[1]).index_copy_(0, rows, scores)
            scores = self.logits_processor(self.rows_with(position), scores)[rows]
        scores[:, self.config.image_token_id] = -torch.inf  # a generated placeholder would have no image
        log_probs, choices = scores.log_softmax(-1).max(-1)
        return choices, log_probs

    def extend(self, logits, rows, running):
        """Append a token to the answers of the running rows, whose lengths may differ after a draft."""
        lengths = self.length[rows]
        self.make_room(int(lengths.max()) + 1)
        for length in lengths[running].unique().tolist():
            chosen = running & (lengths == length)
            choices, log_probs = self.choose(logits, rows, length)
            self.answer[rows[chosen], length] = choices[chosen]
            self.log_probs[rows[chosen], length] = log_probs[chosen]
        self.length[rows[running]] += 1
        self.check_end(rows[running])

    def make_room(self, length):
        missing = max(0, length - self.answer.shape[1])
        self.answer = torch.nn.functional.pad(self.answer, (0, missing))
        self.log_probs = torch.nn.functional.pad(self.log_probs, (0, missing))

    def check_end(self, rows):
        for length in self.length[rows].unique().tolist():
            chosen = rows[self.length[rows] == length]
            self.ended[chosen] = self.stopping_criteria(self.rows_with(length), None)[chosen]

    def rows_with(self, length):
        """All prompts, each with the first `length` tokens of its answer."""
        return torch.cat([self.prompt, self.answer[:, :length]], dim=1)

    def confidence(self):
        """The confidence in each answer, `(batch_size,)`: see [`VisualTokenSchedule`]."""
        column = torch.arange(self.log_probs.shape[1], device=self.log_probs.device)
        total = self.log_probs.masked_fill(column >= self.length[:, None], 0).cumsum(-1)
        window = self.schedule.window
        if total.shape[1] > window:
            total = torch.cat([total[:, :window], total[:, window:] - total[:, :-window]], dim=1)
        return total.amin(-1).exp()


def limit_schedule(schedule, budgets: dict, model, inputs: dict, generation_configs) -> VisualTokenSchedule:
    """The schedule, cut to the stages that fit in the budgets for the prompts in `inputs`."""
    try:  # the cost model is part of the package, not of a checkpoint's code
        from mqt_llava.cost import schedule_within
    except ImportError:
        raise ValueError("`max_flops` and `max_seconds` need the cost model: pip install mqt-llava") from None
    numbers = [
        inputs.get("max_new_tokens"),
        *(getattr(config, "max_new_tokens", None) for config in generation_configs),
    ]
    number = next((number for number in numbers if number is not None), None)
    if number is None:
        raise ValueError(
            "`max_flops` and `max_seconds` need `max_new_tokens`: without it an answer may have any length."
        )
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    is_image = input_ids == model.config.image_token_id
    is_text = ~is_image if mask is None else ~is_image & (mask != 0)
    images = (inputs.get("mm_encoder_outputs") or {}).get("image")
    images = inputs.get("pixel_values") if images is None else images.pooler_output
    num_images = 1
    if images is not None and len(images):  # in the row with the most images
        counts = count_visual_tokens(is_image, len(images), inputs.get("visual_token_counts"))
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
        row = torch.searchsorted(is_image.sum(-1).cumsum(0).cpu(), starts, right=True)
        num_images = int(row.bincount().max())
    request = {"num_text_tokens": int(is_text.sum(-1).max()), "num_new_tokens": number, "batch_size": len(input_ids)}
    request |= {"num_images": num_images, "dtype": model.dtype}
    return schedule_within(model.config, schedule, **budgets, **request)


def begin_schedule(model, inputs: dict, args: tuple, num_visual_tokens, generation_configs):
    """Prepare the inputs of `generate` for a schedule: encode the images with as many visual tokens as its last stage uses.

    Returns:
        The inputs, with [`AdaptiveDecoding`] as `custom_generate`, and m of the first stage. Both are returned unchanged if
        `num_visual_tokens` is not a schedule.
    """
    schedule = resolve_schedule(num_visual_tokens, generation_configs, model.config.num_query_tokens)
    if schedule is None:
        return inputs, num_visual_tokens
    refuse_all_but_greedy(model, inputs, args, generation_configs)
    budgets = {name: inputs[name] for name in ("max_flops", "max_seconds") if inputs.get(name) is not None}
    inputs = {name: value for name, value in inputs.items() if name not in ("max_flops", "max_seconds")}
    if budgets:
        schedule = limit_schedule(schedule, budgets, model, inputs, generation_configs)
    first, last = schedule.num_visual_tokens[0], schedule.num_visual_tokens[-1]
    inputs = model.encode_images(rebudget(inputs, last, model.config, "left"))
    image_outputs = (inputs.get("mm_encoder_outputs") or {}).get("image")
    visual_tokens = [] if image_outputs is None else image_outputs.pooler_output
    inputs["visual_token_counts"] = [last] * len(visual_tokens)
    decoding = AdaptiveDecoding(schedule, visual_tokens, model.config, inputs.get("streamer"))
    return {**inputs, "custom_generate": decoding}, first


__all__ = ["AdaptiveDecoding", "AdaptiveGenerateOutput", "VisualTokenSchedule"]
