"""The two models that are compared, with random weights, and what is measured of each."""

import contextlib
import functools
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from benchmarks.measure import Stopwatch, seconds, synchronize
from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration
from mqt_llava.cost import CostModel
from mqt_llava.cpu import Float32Linear, compute_in_float32
from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME


LINEAR = torch.nn.Linear.forward
TEXT_TOKENS = 40  # of each prompt: a short question with the system prompt
LLAVA_TOKENS = 576
IMAGE_TOKEN = 32000
MAX_LENGTH = 704  # of static caches: the longest prompt and the answer. Decoding reads all of it


@dataclass(frozen=True)
class Variant:
    """One row of the table: which model, how many visual tokens, and how it runs."""

    model: str
    batch_size: int
    num_visual_tokens: int
    num_text_tokens: int = TEXT_TOKENS
    attention: str = "sdpa"
    float32: bool = False  # products of many tokens on a CPU, see `mqt_llava.cpu`
    # Tower and language model, and a static cache, for which `generate` compiles decoding on a GPU
    compiled: bool = False

    @property
    def tower(self) -> tuple:
        """What the time of the vision tower depends on: it is measured once for all numbers of visual tokens."""
        return self.model, self.batch_size, self.attention, self.float32

    @property
    def shared(self) -> tuple:
        """Whose measurements are in the row: this variant's, its vision tower's and its preprocessing's."""
        return self, self.tower, (self.model, self.batch_size)

    @property
    def request(self) -> dict:
        """As arguments of [`CostModel`]."""
        names = ("batch_size", "num_visual_tokens", "num_text_tokens")
        return {name: getattr(self, name) for name in names}

    @property
    def length(self) -> int:
        return self.num_text_tokens + self.num_visual_tokens


def variants(batch_sizes: list[int], num_visual_tokens: list[int], ways: list[dict]) -> list[Variant]:
    rows = []
    for way in ways:
        for batch_size in batch_sizes:
            rows.append(Variant("LLaVA-1.5", batch_size, LLAVA_TOKENS, **way))
            # text up to the length of LLaVA's prompt: what is left are the models' own ways
            rows.append(Variant("MQT", batch_size, 256, TEXT_TOKENS + LLAVA_TOKENS - 256, **way))
            rows += [Variant("MQT", batch_size, m, **way) for m in num_visual_tokens]
    return rows


def configs(preset: dict) -> tuple[LlavaConfig, MQTLlavaConfig]:
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **preset["vision"])
    text = LlamaConfig(vocab_size=32064, **preset["text"])
    settings = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "image_token_id": IMAGE_TOKEN}
    heads = vision.num_attention_heads
    return LlavaConfig(**settings), MQTLlavaConfig(query_transformer_num_attention_heads=heads, **settings)


def build(preset: dict, dtype: torch.dtype, device: torch.device) -> dict[str, torch.nn.Module]:
    """LLaVA and MQT-LLaVA with random weights, made on the device; they share the language model."""
    llava_config, mqt_config = configs(preset)
    with torch.device(device):
        mqt = MQTLlavaForConditionalGeneration._from_config(mqt_config, dtype=dtype).eval()
        # without a language model of its own, which would be as large again
        num_layers, llava_config.text_config.num_hidden_layers = llava_config.text_config.num_hidden_layers, 0
        llava = LlavaForConditionalGeneration._from_config(llava_config, dtype=dtype).eval()
    llava.config.text_config.num_hidden_layers = num_layers
    llava.model.language_model, llava.lm_head = mqt.model.language_model, mqt.lm_head
    for model in (llava, mqt):
        model.generation_config.eos_token_id = None  # every answer is as long as asked
        model.generation_config.pad_token_id = 0
        if device.type == "cpu":
            compute_in_float32(model)  # for the variants that want it
    return {"LLaVA-1.5": llava, "MQT": mqt}


def llava_flops(preset: dict, costs: CostModel) -> int:
    """FLOPs of LLaVA's prefill of one prompt: its own tower and projector, the language model of both."""
    config = configs(preset)[0]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        side = config.vision_config.image_size
        pixels = torch.empty(1, 3, side, side, dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(pixels)
    return counter.get_total_flops() + costs.count_text(TEXT_TOKENS + LLAVA_TOKENS) + 2 * costs.head_parameters


def measurements(model, variant: Variant, new_tokens: int, device: torch.device) -> tuple[dict, dict]:
    """Functions that measure a variant's parts in seconds, and functions whose memory is to be measured."""
    batch_size, m, inner = variant.batch_size, variant.num_visual_tokens, model.model
    is_mqt = isinstance(model, MQTLlavaForConditionalGeneration)
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(batch_size, 3, side, side, device=device, dtype=model.dtype)
    ids = torch.randint(5, 30000, (batch_size, variant.length), device=device)
    ids[:, 1 : 1 + m] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    cache = {CACHE_NAME: static_cache(model, batch_size)} if variant.compiled else {}

    def run(function):
        own, shared = model.config, inner.language_model.config
        if {own._attn_implementation, shared._attn_implementation} != {variant.attention}:
            model.set_attn_implementation(variant.attention)
        for part, compiled_call in compiled_parts(model).items():
            part._compiled_call_impl = compiled_call if variant.compiled else None
        if variant.compiled:
            cache[CACHE_NAME].reset()
        plain = contextlib.nullcontext() if variant.float32 else mock.patch.object(Float32Linear, "forward", LINEAR)
        with torch.no_grad(), plain:
            return function()

    def generate(max_new_tokens=1 + new_tokens, streamer=None):
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values, **cache}
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)

    def first_and_further():
        synchronize(device)
        stopwatch = Stopwatch()
        generate(streamer=stopwatch)
        return stopwatch.result()

    timed, remembered = {"generate": partial(run, first_and_further)}, {"peak": partial(run, partial(generate, 1))}
    if variant.compiled:  # its parts are those of the eager row
        return timed, remembered

    # What goes into the parts has the right shapes and random numbers
    vision, text = model.config.vision_config, model.config.text_config
    make = partial(torch.randn, device=device, dtype=model.dtype)
    patches = make(batch_size, (side // vision.patch_size) ** 2, vision.hidden_size)
    visual_tokens = make(batch_size, m, text.hidden_size)
    embeds = make(batch_size, variant.length, text.hidden_size)
    connector = inner.query_transformer if is_mqt else inner.multi_modal_projector
    encode = partial(model.get_image_features, pixel_values, *([m] if is_mqt else []), return_dict=True)
    images = BaseModelOutputWithPooling(pooler_output=list(visual_tokens))
    merge = partial(inner, input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": images})
    language_output = BaseModelOutputWithPast(last_hidden_state=embeds)
    prefill = partial(model, inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)
    past = run(prefill)[CACHE_NAME]

    def replaced(module, output, function):
        with mock.patch.object(module, "forward", return_value=output):
            function()

    parts = {
        "vision": partial(replaced, connector, visual_tokens, encode),
        "connector": partial(connector, patches, *([m] if is_mqt else [])),
        "merge": partial(replaced, inner.language_model, language_output, merge),
        "prefill": prefill,
        "decode step": partial(model, input_ids=ids[:, -1:], **{CACHE_NAME: past}),  # which grows by one each time
    }
    timed |= {name: partial(run, partial(seconds, function, device)) for name, function in parts.items()}
    return timed, remembered | {"prefill peak": partial(run, prefill)}


@functools.cache
def compiled_parts(model) -> dict:
    """What `Module.compile` makes of the parts, as docs/compile.md advises: rows with and without it take turns."""
    torch._dynamo.config.recompile_limit = (
        64  # counts graphs of all modules together, since `_call_impl` is their code
    )
    parts = {model.model.vision_tower: None, model.model.language_model: True}
    if isinstance(model, MQTLlavaForConditionalGeneration):
        parts[model.model.query_transformer] = None
    return {part: torch.compile(part._call_impl, dynamic=dynamic) for part, dynamic in parts.items()}


@functools.cache
def static_cache(model, batch_size: int) -> StaticCache:
    """One for all prompts, so that decoding is compiled once. Its tensors are made when `batch_size` rows come."""
    return StaticCache(model.config.text_config, max_cache_len=MAX_LENGTH)
