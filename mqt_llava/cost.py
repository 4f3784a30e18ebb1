"""Estimate FLOPs, memory and time of an MQT-LLaVA model for any number of visual tokens, without running it.

No formula is specific to an architecture: the model is built and run on the meta device, where tensors have no data, under torch's
FLOP counter. That takes about a second at 7B sizes and needs no weights.

    costs = CostModel(AutoConfig.from_pretrained("my-mqt-llava"))
    costs(64, num_text_tokens=40).flops                      # FLOPs up to the first token
    costs(64, num_new_tokens=100).latency(measure_device())  # seconds up to the last one
    num_visual_tokens_for(config, memory_bytes=16e9)         # the largest m that fits
"""

import bisect
import copy
import itertools
import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .modeling.adaptive_mqt_llava import VisualTokenSchedule
from .modeling.budget_mqt_llava import CACHE_NAME, resolve_visual_token_counts
from .modeling.configuration_mqt_llava import MQTLlavaConfig
from .modeling.modeling_mqt_llava import MQTLlavaForConditionalGeneration
from .speed import DeviceSpeed, measure_device, resolve_dtype


COST_MODELS: dict[str, "CostModel"] = {}  # only the last one that `schedule_within` used, keyed by its config


@dataclass(frozen=True)
class Cost:
    """The cost of one batch of prompts with m visual tokens per image.

    Args:
        num_visual_tokens (`int`): m.
        num_prompt_tokens (`int`): number of text and visual tokens of each prompt.
        prefill_flops (`dict[str, int]`): FLOPs of each part of the model up to the first token, for the whole batch.
        prefill_tokens (`dict[str, int]`): number of tokens that each part processes at once in the prefill.
        decode_flops (`int`): FLOPs of one decoding step for the whole batch, at the mean length.
        num_decode_steps (`int`): number of decoding steps after the first token.
        weight_bytes (`dict[str, int]`): weights of each part, in bytes. An `lm_head` tied to the embeddings has none.
        prefill_read_bytes (`dict[str, int]`): weights that each part reads in the prefill, in bytes.
        decode_read_bytes (`int`): weights and cache that one decoding step reads, in bytes.
        kv_cache_bytes (`int`): size of the cache at the last token, in bytes. Sliding windows are not deducted.
        activation_bytes (`int`): estimate of the largest tensors alive at once, in bytes; see [`CostModel`].
    """

    num_visual_tokens: int
    num_prompt_tokens: int
    prefill_flops: dict[str, int]
    prefill_tokens: dict[str, int]
    decode_flops: int
    num_decode_steps: int
    weight_bytes: dict[str, int]
    prefill_read_bytes: dict[str, int]
    decode_read_bytes: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations up to the last token, for the whole batch; a multiply-add counts as two."""
        return sum(self.prefill_flops.values()) + self.decode_flops * self.num_decode_steps

    @property
    def memory_bytes(self) -> int:
        """Weights, cache and activations, in bytes."""
        return sum(self.weight_bytes.values()) + self.kv_cache_bytes + self.activation_bytes

    def time_to_first_token(self, speed: DeviceSpeed) -> float:
        """Seconds up to the first token, without preparing the inputs."""
        tower = speed if speed.image_rate is None else DeviceSpeed(speed.image_rate, speed.bytes_per_second)
        return sum(
            (tower if part == "vision_tower" else speed).seconds(
                flops, self.prefill_read_bytes[part], self.prefill_tokens[part]
            )
            for part, flops in self.prefill_flops.items()
        )

    def time_per_token(self, speed: DeviceSpeed) -> float:
        """Seconds per decoding step."""
        return speed.seconds(self.decode_flops, self.decode_read_bytes, self.prefill_tokens["lm_head"])

    def latency(self, speed: DeviceSpeed) -> float:
        """Seconds up to the last token, without preparing the inputs."""
        return self.time_to_first_token(speed) + self.num_decode_steps * self.time_per_token(speed)


class CostModel:
    """Estimates the cost of the model that a config describes. Needs no weights.

    Works for any vision and text config of a standard transformer with full attention: the language model's FLOPs are then
    `b * length + c * length ** 2`, which two short runs determine. Attention is counted in full, as torch's counter does, although
    kernels may skip the half that a causal mask hides.

    Activations are estimated per token as two tensors of the hidden size (residual and input) and three of the MLP's width (gate,
    up, product), in the vision tower or in the language model, whichever needs more. Attention scores are not counted, since only
    `eager` attention stores them.

    Args:
        config (`MQTLlavaConfig`): the model's config.
    """

    def __init__(self, config: MQTLlavaConfig):
        self.config = config
        with torch.device("meta"):
            # The counter knows only plain matrix products on every device, which eager attention uses. The model writes its
            # attention implementation into the config, hence the copy
            model = MQTLlavaForConditionalGeneration._from_config(
                copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
            ).eval()
        parts = model.model
        self.query_transformer = parts.query_transformer
        self.num_parameters = {
            "vision_tower": count_parameters(parts.vision_tower),
            "query_transformer": count_parameters(parts.query_transformer),
            "embeddings": count_parameters(model.get_input_embeddings()),
            "language_model": count_parameters(parts.language_model) - count_parameters(model.get_input_embeddings()),
            "lm_head": 0 if config.tie_word_embeddings else count_parameters(model.lm_head),
        }
        self.head_parameters = count_parameters(model.lm_head)

        vision, text = config.vision_config, config.text_config
        pixels = torch.empty(
            1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size, device="meta"
        )
        seen = []
        hook = parts.query_transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.get_image_features(pixels, 1)
        hook.remove()
        self.num_patches = seen[0][1]
        self.vision_flops = counter.get_total_flops() - self.count_query_transformer(1, 1)

        flops = []
        for length in (1, 2):
            embeddings = torch.empty(1, length, text.hidden_size, device="meta")
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                outputs = parts.language_model(inputs_embeds=embeddings, use_cache=True)
            flops.append(counter.get_total_flops())
        self.flops_per_pair = (flops[1] - 2 * flops[0]) // 2
        self.flops_per_token = flops[0] - self.flops_per_pair
        cache = [tensor for layer in outputs[CACHE_NAME].layers for tensor in (layer.keys, layer.values)]
        self.cache_elements_per_token = sum(tensor.numel() for tensor in cache) // length
        self.vision_width = activation_width(parts.vision_tower, vision.hidden_size)
        self.text_width = activation_width(parts.language_model, text.hidden_size)

    def count_query_transformer(self, num_visual_tokens: int, num_images: int) -> int:
        """FLOPs of the query transformer. It is small enough to be run each time."""
        width = self.config.vision_config.hidden_size
        features = torch.empty(num_images, self.num_patches, width, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.query_transformer(features, num_visual_tokens)
        return counter.get_total_flops()

    def count_text(self, length: int) -> int:
        """FLOPs of the language model, without its head, for one prompt of `length` text and visual tokens."""
        return self.flops_per_token * length + self.flops_per_pair * length**2

    def __call__(
        self,
        num_visual_tokens: int | None = None,
        num_text_tokens: int = 40,
        num_images: int = 1,
        batch_size: int = 1,
        num_new_tokens: int = 1,
        dtype: torch.dtype | str = torch.bfloat16,
        num_cached_tokens: int = 0,
    ) -> Cost:
        """
        Args:
            num_visual_tokens (`int`, *optional*): m of every image. Defaults to M.
            num_text_tokens (`int`, *optional*, defaults to 40): number of text tokens of each prompt. 40 is a short question in the
                chat template.
            num_images (`int`, *optional*, defaults to 1): number of images in each prompt.
            batch_size (`int`, *optional*, defaults to 1): number of prompts.
            num_new_tokens (`int`, *optional*, defaults to 1): number of tokens of each answer. The prefill gives the first.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.bfloat16`): of weights, cache and activations.
            num_cached_tokens (`int`, *optional*, defaults to 0): number of text tokens at the beginning of each prompt that are in
                the cache already, as from a [`PrefixCache`].

        Returns:
            [`Cost`]: the cost of answering the whole batch.

        Raises:
            `ValueError`: for m that is not an integer from 1 to M, and for sizes that are too small.
        """
        m = resolve_visual_token_counts(num_visual_tokens, 1, self.config.num_query_tokens)[0]
        sizes = {"num_text_tokens": (num_text_tokens, 0), "num_images": (num_images, 0)}
        sizes |= {"batch_size": (batch_size, 1), "num_new_tokens": (num_new_tokens, 1)}
        sizes |= {"num_cached_tokens": (num_cached_tokens, 0)}
        for name, (size, least) in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ValueError(f"`{name}` must be an integer, at least {least}; got {size!r}.")
        length, images, steps = num_text_tokens + num_images * m, num_images * batch_size, num_new_tokens - 1
        if length == 0:
            raise ValueError("The prompt is empty: `num_text_tokens` and `num_images` are both 0.")
        if num_cached_tokens > num_text_tokens:
            raise ValueError(
                f"`num_cached_tokens` must be at most `num_text_tokens`, {num_text_tokens}; got {num_cached_tokens}."
            )
        itemsize = resolve_dtype(dtype).itemsize
        weights = {part: number * itemsize for part, number in self.num_parameters.items()}

        head_flops = 2 * batch_size * self.head_parameters
        prefill_flops = {
            "vision_tower": images * self.vision_flops,
            "query_transformer": self.count_query_transformer(m, images) if images else 0,
            "language_model": batch_size * (self.count_text(length) - self.count_text(num_cached_tokens)),
            "lm_head": head_flops,
        }
        read = {part: weights[part] for part in ("vision_tower", "query_transformer", "language_model")}
        read["lm_head"] = self.head_parameters * itemsize
        if not images:
            read["vision_tower"] = read["query_transformer"] = 0

        cache_bytes = self.cache_elements_per_token * itemsize * batch_size
        attended = length + 1 + max(steps - 1, 0) // 2  # the new token sees itself too
        return Cost(
            num_visual_tokens=m,
            num_prompt_tokens=length,
            prefill_flops=prefill_flops,
            prefill_tokens={
                "vision_tower": images * (self.num_patches + 1),
                "query_transformer": images * self.num_patches,
                "language_model": batch_size * (length - num_cached_tokens),
                "lm_head": batch_size,
            },
            decode_flops=batch_size * (self.flops_per_token + self.flops_per_pair * attended) + head_flops,
            num_decode_steps=steps,
            weight_bytes=weights,
            prefill_read_bytes=read,
            decode_read_bytes=read["language_model"] + read["lm_head"] + cache_bytes * attended,
            kv_cache_bytes=cache_bytes * (length + steps),
            activation_bytes=itemsize
            * max(images * (self.num_patches + 1) * self.vision_width, batch_size * length * self.text_width),
        )

    def num_visual_tokens_for(
        self,
        *,
        flops: float | None = None,
        memory_bytes: float | None = None,
        latency_s: float | None = None,
        speed: DeviceSpeed | None = None,
        **request,
    ) -> int:
        """See [`num_visual_tokens_for`]."""
        budgets = {"flops": flops, "memory_bytes": memory_bytes, "latency_s": latency_s}
        budgets = {name: budget for name, budget in budgets.items() if budget is not None}
        check_budgets(budgets, "`flops`, `memory_bytes` or `latency_s`")
        if latency_s is not None and speed is None:
            speed = measure_device(dtype=request.get("dtype", torch.bfloat16))
        measures = {
            "flops": lambda cost: cost.flops,
            "memory_bytes": lambda cost: cost.memory_bytes,
            "latency_s": lambda cost: cost.latency(speed),
        }
        num_visual_tokens = range(1, self.config.num_query_tokens + 1)
        fitting = []
        for name, budget in budgets.items():
            fits = bisect.bisect_right(num_visual_tokens, budget, key=lambda m: measures[name](self(m, **request)))
            if not fits:
                least = measures[name](self(1, **request))
                raise ValueError(
                    f"No number of visual tokens fits `{name}` = {budget:.4g}: even m = 1 costs {least:.4g}."
                )
            fitting.append(fits)
        return min(fitting)

    def stages(
        self,
        schedule: VisualTokenSchedule,
        num_text_tokens: int = 40,
        num_images: int = 1,
        batch_size: int = 1,
        **request,
    ) -> list[Cost]:
        """
        Upper bounds on the cost of each stage of a schedule. In the worst case, every stage's answer has the full length, is
        verified as a draft by the next stage and rejected, and its tokens stay in the cache. Of the cache, only the visual tokens of
        the first image are kept from stage to stage. In a batch, the text before the image and the text after it are padded
        separately, each at most to the longest prompt.

        Args:
            schedule (`VisualTokenSchedule`): as for `generate(num_visual_tokens=...)`.
            num_text_tokens, num_images, batch_size, request: upper limits on the arguments of `__call__`.

        Raises:
            `ValueError`: if `num_images` is 0.
        """
        if num_images < 1:
            raise ValueError(f"`num_images` must be at least 1 for a schedule; got {num_images}.")
        request |= {"num_text_tokens": num_text_tokens * (1 if batch_size == 1 else 2)}
        request |= {"num_images": num_images, "batch_size": batch_size}
        costs = [self(m, **request) for m in schedule.num_visual_tokens]
        query = self.count_query_transformer(schedule.num_visual_tokens[-1], num_images * batch_size)
        first = costs[0].prefill_flops  # the head also runs on the image's last token, where a prompt may end
        flops = {**first, "query_transformer": query, "lm_head": 2 * first["lm_head"]}
        costs[0] = replace(costs[0], prefill_flops=flops)
        for i in range(1, len(costs)):
            cost, num_cached = costs[i], schedule.num_visual_tokens[i - 1]
            num_drafted = cost.num_decode_steps + 1
            end = cost.num_prompt_tokens + num_drafted
            flops = {"vision_tower": 0, "query_transformer": 0}
            flops["language_model"] = batch_size * (self.count_text(end) - self.count_text(num_cached))
            flops["lm_head"] = (num_drafted + 2) * cost.prefill_flops["lm_head"]
            costs[i] = replace(
                cost,
                prefill_flops=flops,
                prefill_tokens=cost.prefill_tokens | {"language_model": batch_size * (end - num_cached)},
                prefill_read_bytes=cost.prefill_read_bytes | {"vision_tower": 0, "query_transformer": 0},
                decode_flops=cost.decode_flops + batch_size * self.flops_per_pair * num_drafted,
            )
        return costs

    def schedule_within(
        self,
        schedule: VisualTokenSchedule,
        *,
        max_flops: float | None = None,
        max_seconds: float | None = None,
        speed: DeviceSpeed | None = None,
        **request,
    ) -> VisualTokenSchedule:
        """See [`schedule_within`]."""
        budgets = {"max_flops": max_flops, "max_seconds": max_seconds}
        budgets = {name: budget for name, budget in budgets.items() if budget is not None}
        check_budgets(budgets, "`max_flops` or `max_seconds`")
        if max_seconds is not None and speed is None:
            speed = measure_device(dtype=request.get("dtype", torch.bfloat16))
        measures = {"max_flops": lambda cost: cost.flops, "max_seconds": lambda cost: cost.latency(speed)}
        costs, number = self.stages(schedule, **request), len(schedule.num_visual_tokens)
        for name, budget in budgets.items():
            spent = list(itertools.accumulate(map(measures[name], costs)))
            if spent[0] > budget:
                raise ValueError(
                    f"The first stage, m = {schedule.num_visual_tokens[0]}, may cost {spent[0]:.4g}, more than `{name}` = {budget:.4g}."
                )
            number = min(number, bisect.bisect_right(spent, budget))
        return replace(
            schedule,
            num_visual_tokens=list(schedule.num_visual_tokens[:number]),
            thresholds=list(schedule.thresholds[: number - 1]),
            calibration=schedule.calibration
            if number == len(costs)
            else None,  # which holds for the whole schedule only
        )


def check_budgets(budgets: dict, allowed: str):
    if not budgets:
        raise ValueError(f"At least one budget is needed: {allowed}.")
    for name, budget in budgets.items():
        if not isinstance(budget, Real) or isinstance(budget, bool) or math.isnan(budget):
            raise ValueError(f"`{name}` must be a number; got {budget!r}.")


def schedule_within(
    config: MQTLlavaConfig, schedule: VisualTokenSchedule, **budgets_and_request
) -> VisualTokenSchedule:
    """Cut a schedule to as many of its first stages as fit in every given budget, even in the worst case: with prompts and answers
    no longer than given here, `model.generate(num_visual_tokens=schedule)` takes no more FLOPs than `max_flops`.

    Args:
        config (`MQTLlavaConfig`): the model's config.
        schedule (`VisualTokenSchedule`): the schedule to cut.
        max_flops (`float`, *optional*): FLOPs up to the last token, for the whole batch.
        max_seconds (`float`, *optional*): seconds up to the last token, without preparing the inputs. An estimate.
        speed (`DeviceSpeed`, *optional*): the device that `max_seconds` is for. Defaults to this CPU, which is then measured.
        num_text_tokens, num_images, batch_size, num_new_tokens, dtype: as for [`CostModel`], as upper limits.

    Returns:
        [`VisualTokenSchedule`]: the first stages of `schedule`.

    Raises:
        `ValueError`: if no budget is given, or if the first stage exceeds one.
    """
    key = config.to_json_string()  # building a cost model takes a second at 7B sizes, and each `generate` may need one
    if key not in COST_MODELS:
        COST_MODELS.clear()
        COST_MODELS[key] = CostModel(config)
    return COST_MODELS[key].schedule_within(schedule, **budgets_and_request)


def num_visual_tokens_for(config: MQTLlavaConfig, **budgets_and_request) -> int:
    """The largest m, from 1 to M, whose cost fits in every given budget.

    Args:
        config (`MQTLlavaConfig`): the model's config.
        flops (`float`, *optional*): FLOPs up to the last token, for the whole batch.
        memory_bytes (`float`, *optional*): weights, cache and activations, in bytes.
        latency_s (`float`, *optional*): seconds up to the last token, without preparing the inputs. An estimate.
        speed (`DeviceSpeed`, *optional*): the device that `latency_s` is for. Defaults to this CPU, which is then measured.
        num_text_tokens, num_images, batch_size, num_new_tokens, dtype: as for [`CostModel`].

    Returns:
        `int`: m.

    Raises:
        `ValueError`: if no budget is given, or if even m = 1 exceeds one.
    """
    return CostModel(config).num_visual_tokens_for(**budgets_and_request)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def activation_width(transformer: nn.Module, hidden_size: int) -> int:
    """Number of activations per token alive at once: two tensors of the hidden size and three of the widest linear layer's."""
    widest = max(module.out_features for module in transformer.modules() if isinstance(module, nn.Linear))
    return 2 * hidden_size + 3 * widest
