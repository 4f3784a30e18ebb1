"""Verify a conversion: compare the converted model with an independent forward pass on the source's tensors.

The forward pass is the authors' computation, written out without our model, our names or transformers' layers. The converted model is
loaded with `from_pretrained`. Both compute in float32, with one layer of the language model in memory at a time, so that memory does
not grow with its depth.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from .authors import NUM_HEADS, read_pieces, reads_pieces
from .files import LazyTensor, first
from .names import AUTHORS_QUERY_TRANSFORMER, AUTHORS_VISION_TOWER


VISUAL_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3  # relative to the largest value, if that is above 1
QUESTIONS = ("<image>\nDescribe the image in detail.", "What is this?\n<image>  Is it one  thing?", "No picture here.")
QUERY_TRANSFORMER_EPS = 1e-6  # fixed in the authors' code
DEVICE_MAP = {  # the small parts stay in memory
    "model.vision_tower": "cpu",
    "model.query_transformer": "cpu",
    "model.language_model": "disk",
    "lm_head": "disk",
}


# --- results ---


@dataclass
class Check:
    """One line of the verification.

    Args:
        name (`str`): what was compared.
        amount (`str`): how much was compared.
        difference (`float`), tolerance (`float`): the largest difference, and the largest that is allowed.
    """

    name: str
    amount: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # `False` for NaN


class VerificationError(ValueError):
    """Raised if a converted model differs from its source. `checks` has the comparisons.

    Args:
        checks (`list[Check]`): the comparisons.
        sources (`dict[str, LazyTensor]`): the source's tensors, which are searched for NaN and infinity as the reason.
    """

    def __init__(self, checks: list[Check], sources: dict[str, LazyTensor]):
        self.checks = checks
        if broken := [name for name, tensor in sources.items() if not tensor.load().isfinite().all()]:
            super().__init__(f"the source itself is broken: it has NaN or infinity in {first(broken)}")
            return
        failed = dict.fromkeys(check.name for check in checks if not check.passed)
        super().__init__(f"the converted model differs from its source in: {', '.join(failed)}")


def broken_tensors(folder: Path) -> list[str]:
    """Tensors of a converted folder with NaN or infinity in their first, middle or last row.

    Weights that overflowed are full of them. Checking all rows would take as long as the conversion.
    """
    broken = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_slice(name)
                num_rows = tensor.get_shape()[0] if len(tensor.get_shape()) > 1 else 0
                rows = [tensor[i : i + 1] for i in (0, num_rows // 2, num_rows - 1)] if num_rows else [tensor[:]]
                broken += [name] * (not all(row.isfinite().all() for row in rows))
    return broken


# --- the authors' forward pass ---


def check_verifiable(config, settings: dict):
    """Refuse, before any work, models that the forward pass below does not support, rather than skip a check.

    Args:
        config (`MQTLlavaConfig`): our config.
        settings (`dict`): the language model's config.
    """
    vision = config.vision_config
    unknown = None
    if vision.model_type != "clip_vision_model" or vision.hidden_act not in ("quick_gelu", "gelu"):
        unknown = f"a vision tower of type {vision.model_type} with {getattr(vision, 'hidden_act', 'no')} activation"
    elif scaling_factor(settings) is None:
        unknown = f"positions scaled by {settings.get('rope_scaling') or settings['rope_parameters']}"
    if unknown is not None:
        raise ValueError(f"--verify does not support {unknown}; convert without it, and compare answers yourself")


def scaling_factor(settings: dict) -> float | None:
    """The factor that a language model's positions are scaled by; `None` if it is not a single number."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return {"default": 1.0, "linear": rope.get("factor")}.get(kind)


class Source:
    """The authors' tensors in float32, by their names without a prefix."""

    def __init__(self, tensors: dict[str, LazyTensor], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name].load().float()

    def under(self, prefix: str) -> "Source":
        return Source(self.tensors, self.prefix + prefix)

    def linear(self, x, name: str):
        bias = self[name + ".bias"] if self.prefix + name + ".bias" in self.tensors else None
        return F.linear(x, self[name + ".weight"], bias)

    def layer_norm(self, x, name: str, eps: float):
        return F.layer_norm(x, x.shape[-1:], self[name + ".weight"], self[name + ".bias"], eps)


def clip_features(source: Source, pixel_values, config, select_layer: int):
    """Patch features of a CLIP tower, `(num_images, num_patches, width)`."""
    x = F.conv2d(pixel_values, source["embeddings.patch_embedding.weight"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([source["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = source.layer_norm(x + source["embeddings.position_embedding.weight"], "pre_layrnorm", config.layer_norm_eps)
    activation = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}[config.hidden_act]
    depth = select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer
    for i in range(depth):
        layer = source.under(f"encoder.layers.{i}.")
        y = layer.layer_norm(x, "layer_norm1", config.layer_norm_eps)
        q, k, v = (
            layer.linear(y, f"self_attn.{name}").unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + layer.linear(attend(q, k, v), "self_attn.out_proj")
        y = layer.layer_norm(x, "layer_norm2", config.layer_norm_eps)
        x = x + layer.linear(activation(layer.linear(y, "mlp.fc1")), "mlp.fc2")
    return x[:, 1:]


def attend(q, k, v, mask=0.0):
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def query_features(source: Source, features, num_visual_tokens: int):
    """Visual tokens, `(num_images, num_visual_tokens, text_width)`."""
    positions = source["pos_embed"]
    side, query_side = (int(n**0.5) for n in (features.shape[1], len(positions)))
    grid = positions.T.unflatten(1, (query_side, query_side))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
    queries = (source["query"] + positions)[:num_visual_tokens]
    q = source.layer_norm(queries, "ln_q", QUERY_TRANSFORMER_EPS)
    k = source.layer_norm(grid, "ln_k", QUERY_TRANSFORMER_EPS)
    v = source.layer_norm(features, "ln_v", QUERY_TRANSFORMER_EPS).transpose(0, 1)
    width, num_images = q.shape[-1], v.shape[1]
    output, _ = F.multi_head_attention_forward(
        q[:, None].expand(-1, num_images, -1),
        k[:, None].expand(-1, num_images, -1),
        v,
        width,
        NUM_HEADS,
        source["attn.in_proj_weight"],
        source["attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        source["attn.out_proj.weight"],
        source["attn.out_proj.bias"],
        training=False,
        need_weights=False,
    )
    return output.transpose(0, 1) @ source["proj"]


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def language_logits(source: Source, x, config: dict):
    """Logits of a Llama or Mistral for embeddings of shape `(1, length, width)`, at the last eight positions."""
    length, heads = x.shape[1], config["num_attention_heads"]
    kv_heads, eps = config.get("num_key_value_heads") or heads, config.get("rms_norm_eps", 1e-6)
    head_dim = config.get("head_dim") or x.shape[-1] // heads
    theta = (config.get("rope_parameters") or config).get("rope_theta") or 10000.0
    frequencies = theta ** -(torch.arange(0, head_dim, 2) / head_dim) / scaling_factor(config)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    mask = torch.full((length, length), float("-inf")).triu(1)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for i in range(config["num_hidden_layers"]):
        layer = source.under(f"model.layers.{i}.")
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            layer.linear(y, f"self_attn.{name}").unflatten(-1, (count, head_dim)).transpose(1, 2)
            for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        )
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (rotate(k), v))
        x = x + layer.linear(attend(rotate(q), k, v, mask), "self_attn.o_proj")
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + layer.linear(
            F.silu(layer.linear(y, "mlp.gate_proj")) * layer.linear(y, "mlp.up_proj"), "mlp.down_proj"
        )
    x = rms_norm(x[:, -8:], source["model.norm.weight"], eps)
    head = "lm_head" if "lm_head.weight" in source.tensors else "model.embed_tokens"
    return source.linear(x, head)


# --- comparisons ---


def compare(name: str, amount: str, ours, expected, tolerance: float) -> Check:
    scale = max(1.0, expected.abs().max().item())
    return Check(name, amount, (ours - expected).abs().max().item() / scale, tolerance)


def verify_tensors(expected: dict[str, LazyTensor], found: dict[str, LazyTensor]) -> Check:
    """Check that two checkpoints have the same values under the same names."""
    differing = len(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        values = expected[name].load()
        differing += not torch.equal(values, found[name].load().to(values.dtype))
    return Check("tensors that differ", f"{len(expected)} tensors", float(differing), 0.0)


def verify_ids(processor, folder: Path) -> Check:
    """Compare the ids of prompts with those of SentencePiece, or of the tokenizer in `folder` if it is of another kind, for every
    chunk of text between images separately."""
    if reads_pieces(folder):
        encode = read_pieces(folder / "tokenizer.model").encode
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        encode = partial(tokenizer.encode, add_special_tokens=False)
    bos, bos_id = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    differing = 0
    for question in QUESTIONS:
        prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        images = [torch.zeros(3, 8, 8, dtype=torch.uint8).numpy()] * prompt.count("<image>") or None
        options = {} if images is None else {"num_visual_tokens": 1}
        ids = processor(images=images, text=prompt, add_special_tokens=False, **options)["input_ids"][0]
        expected = [bos_id] if bos and prompt.startswith(bos) else []
        for i, chunk in enumerate(prompt[len(bos) if expected else 0 :].split("<image>")):
            expected += [processor.image_token_id] * (i > 0) + encode(chunk)
        differing += ids != expected
    return Check("prompts with other ids", f"{len(QUESTIONS)} prompts", float(differing), 0.0)


@torch.no_grad()
def verify_outputs(model, processor, tensors: dict[str, LazyTensor], settings: dict) -> list[Check]:
    """Compare a model's visual tokens and logits in float32 with those computed from the authors' tensors.

    Args:
        settings (`dict`): the language model's config.
    """
    source, config = Source(tensors), model.config
    pixel_values = random_pixels(config.vision_config.image_size)
    tower = source.under(AUTHORS_VISION_TOWER + "vision_model.")
    features = clip_features(tower, pixel_values, config.vision_config, config.vision_feature_layer)
    num_query_tokens = config.num_query_tokens
    expected = query_features(source.under(AUTHORS_QUERY_TRANSFORMER), features, num_query_tokens)
    checks = []
    for m in (1, 16, num_query_tokens):
        ours = torch.stack(model.get_image_features(pixel_values, m).pooler_output)
        checks.append(compare("visual tokens", f"2 images, m = {m}", ours, expected[:, :m], VISUAL_TOLERANCE))

    prompt = processor.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    before, after = (
        processor.tokenizer(chunk, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for chunk in prompt.split("<image>")
    )
    embeddings = source["model.embed_tokens.weight"]
    m = 16
    x = torch.cat([embeddings[before], expected[:1, :m], embeddings[after]], dim=1)
    expected_logits = language_logits(source, x, settings)
    placeholders = torch.full((1, m), config.image_token_id)
    input_ids = torch.cat([before, placeholders, after], dim=1)
    logits = model(input_ids=input_ids, pixel_values=pixel_values[:1], logits_to_keep=8).logits
    logits = logits[..., : expected_logits.shape[-1]]
    return [*checks, compare("logits", f"8 positions, m = {m}", logits, expected_logits, LOGIT_TOLERANCE)]


@torch.no_grad()
def verify_parts(model, processor, text_config, text_tensors: dict[str, LazyTensor], tower_folder: Path, dtype):
    """Compare the parts of a new model with the originals, each run by its own class. Its visual tokens have no counterpart.

    Args:
        text_tensors (`dict[str, LazyTensor]`): the language model's tensors, by their names in its own class.
        dtype (`torch.dtype`, *optional*): the dtype that the weights were cast to.
    """
    input_ids = processor.tokenizer(QUESTIONS[-1], return_tensors="pt")["input_ids"]
    expected_logits = stream_model(AutoModelForCausalLM, text_config, text_tensors)(input_ids=input_ids).logits
    logits = model(input_ids=input_ids).logits[..., : expected_logits.shape[-1]]
    tower = AutoModel.from_pretrained(tower_folder, dtype=dtype or torch.float32, trust_remote_code=False)
    tower = getattr(tower, "vision_model", tower).float()
    pixel_values = random_pixels(model.config.vision_config.image_size)
    hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states
    features = model.get_image_features(pixel_values).last_hidden_state
    expected = hidden_states[model.config.vision_feature_layer]
    return [
        compare("vision features", "2 images", features, expected, VISUAL_TOLERANCE),
        compare("logits", f"{input_ids.shape[1]} positions, no image", logits, expected_logits, LOGIT_TOLERANCE),
    ]


def random_pixels(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


# --- models whose layers are loaded while they run, by accelerate's offloading ---


class Weights(dict):
    """Tensors in float32, which are read at each access."""

    def __getitem__(self, name):
        return super().__getitem__(name).load().float()


def stream_model(auto_class, config, tensors: dict[str, LazyTensor]):
    """A model in float32 whose weights are `tensors`, by their names in its class."""
    with init_empty_weights():
        model = auto_class.from_config(config, dtype=torch.float32).eval()
    return cpu_offload(model, "cpu", state_dict=Weights(tensors))


def load_model(folder: Path, adapter: Path | None = None):
    """Load our model from a folder through the Auto class, in float32.

    Args:
        adapter (`Path`, *optional*): a PEFT adapter to load onto it.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, device_map=DEVICE_MAP, trust_remote_code=False
    )
    if adapter is None:
        return model.eval()
    from peft import PeftModel, load_peft_weights

    del model.hf_device_map  # otherwise PEFT would move the layers into memory
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True, torch_device="cpu")
    # PEFT puts LoRA weights on the layer's device, which is the meta device here
    stored = load_peft_weights(str(adapter), device="cpu")
    pattern = re.compile(r"\.(lora_[AB])\.")
    weights = {pattern.sub(r".\1.default.", name): tensor for name, tensor in stored.items() if pattern.search(name)}
    if unknown := model.load_state_dict(weights, strict=False, assign=True).unexpected_keys:
        raise ValueError(f"{adapter} has weights for layers that the model doesn't have: {first(unknown)}")
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.float()  # they have the dtype that they are stored in
    return model.get_base_model().eval()
