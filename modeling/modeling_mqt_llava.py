"""PyTorch MQT-LLaVA model"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_mqt_llava import MQTLlavaConfig, resolve_visual_token_counts


@dataclass
class MQTLlavaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`MQTLlavaModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens_of_all_images, hidden_size)`, *optional*):
            The visual tokens, all images one after the other, as they replaced the placeholders.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MQTLlavaCausalLMOutputWithPast(ModelOutput):
    r"""
    Output of [`MQTLlavaForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is provided):
            Language modeling loss (for next-token prediction).
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of each vocabulary token before the softmax. `sequence_length` counts the visual tokens that were
            used, so it follows `num_visual_tokens` where that re-budgets the prompt.
        past_key_values (`Cache`, *optional*, returned when `use_cache=True`):
            Keys and values of the language model.
        image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens_of_all_images, hidden_size)`, *optional*):
            The visual tokens, all images one after the other, as they replaced the placeholders.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


def sinusoidal_grid_positions(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine positions of a `side` x `side` grid in raster order, `(side * side, width)`.

    The first half of the channels tells the column, the second half the row; each half is `[sin | cos]` over `width / 4`
    frequencies from 1 down to 1 / 10000 (as in MAE, https://huggingface.co/papers/2111.06377).
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1).flatten(0, 1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
):
    attention_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    attention_weights = nn.functional.softmax(attention_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attention_output = torch.matmul(attention_weights, value).transpose(1, 2).contiguous()
    return attention_output, attention_weights


class MQTLlavaQueryTransformer(nn.Module):
    """Turns the patch features of an image into any number m of visual tokens from 1 to M.

    One cross-attention layer: the first m of M learned queries look at the patches, then a projection leads to the
    language model's width. Queries and keys are made of positions alone, the image enters through the values. So visual
    token i is the same whatever m: the tokens of a small budget are a prefix of those of a large one.
    """

    def __init__(self, config: MQTLlavaConfig):
        super().__init__()
        self.config = config
        width = config.vision_config.hidden_size
        self.num_query_tokens = config.num_query_tokens
        self.head_dim = width // config.query_transformer_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.num_key_value_groups = 1

        self.query = nn.Parameter(torch.empty(self.num_query_tokens, width))
        self.position_embedding = nn.Parameter(torch.empty(self.num_query_tokens, width))
        self.query_norm = nn.LayerNorm(width, eps=config.query_transformer_layer_norm_eps)
        self.key_norm = nn.LayerNorm(width, eps=config.query_transformer_layer_norm_eps)
        self.value_norm = nn.LayerNorm(width, eps=config.query_transformer_layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.text_proj = nn.Linear(width, config.text_config.hidden_size, bias=False)

    def patch_positions(self, num_patches: int) -> torch.Tensor:
        """The queries' grid of positions resized to the patches' grid, `(num_patches, width)`: bicubic, in float32."""
        patch_side, query_side = math.isqrt(num_patches), math.isqrt(self.num_query_tokens)
        if patch_side**2 != num_patches:
            raise ValueError(
                f"The vision tower gave {num_patches} patch features, which make no square grid. Set "
                '`vision_feature_select_strategy` to "default" for a tower with a class token, to "full" for one without.'
            )
        if patch_side == query_side:
            return self.position_embedding
        grid = self.position_embedding.float().unflatten(0, (query_side, query_side)).permute(2, 0, 1)[None]
        grid = nn.functional.interpolate(grid, size=(patch_side, patch_side), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T.to(self.position_embedding.dtype)

    def forward(self, patch_features: torch.Tensor, num_visual_tokens: int) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                Patch features of the vision tower, on a square grid in raster order.
            num_visual_tokens (`int`):
                m, how many of the M queries to compute.

        Returns:
            `torch.Tensor` of shape `(num_images, num_visual_tokens, text_hidden_size)`.
        """
        num_images, num_patches, width = patch_features.shape
        queries = self.query[:num_visual_tokens] + self.position_embedding[:num_visual_tokens]
        queries = self.q_proj(self.query_norm(queries))
        keys = self.k_proj(self.key_norm(self.patch_positions(num_patches)))
        values = self.v_proj(self.value_norm(patch_features))

        # (num_images, heads, tokens, head_dim); queries and keys are one and the same for every image
        queries = queries.view(1, -1, width // self.head_dim, self.head_dim).transpose(1, 2)
        keys = keys.view(1, -1, width // self.head_dim, self.head_dim).transpose(1, 2)
        values = values.view(num_images, num_patches, -1, self.head_dim).transpose(1, 2)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        hidden_states, _ = attention(
            self,
            queries.expand(num_images, -1, -1, -1),
            keys.expand(num_images, -1, -1, -1),
            values,
            None,
            scaling=self.scaling,
            dropout=0.0,
            is_causal=False,
        )
        hidden_states = hidden_states.reshape(num_images, num_visual_tokens, width)
        return self.text_proj(self.out_proj(hidden_states))


class MQTLlavaPreTrainedModel(PreTrainedModel):
    config: MQTLlavaConfig
    config_class = MQTLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MQTLlavaQueryTransformer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MQTLlavaQueryTransformer):
            init.trunc_normal_(module.query, std=self.config.initializer_range)
            side, width = math.isqrt(module.num_query_tokens), module.query.shape[1]
            init.copy_(module.position_embedding, sinusoidal_grid_positions(side, width))

    def smart_apply(self, initialize, is_custom_code):
        """transformers applies `_initialize_weights` with this. Asks it not to treat the model as custom code that might
        overwrite loaded weights (`init` never does): it would pass over modules without tensors of their own, such as
        CLIP's attention, and so give weights that a checkpoint lacks another scale than a new model's."""
        return nn.Module.smart_apply(self, initialize, False)


def placeholder_runs(is_placeholder: torch.Tensor) -> list[int]:
    """Lengths of the runs of consecutive placeholders in a `(batch_size, sequence_length)` mask, row after row."""
    edges = nn.functional.pad(is_placeholder.int(), (1, 1)).diff(dim=-1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return (ends - starts).tolist()


def count_placeholders_per_image(is_placeholder: torch.Tensor, num_images: int, visual_token_counts=None) -> list[int]:
    """How many placeholders stand for each image, in the order of the images.

    `visual_token_counts` says so, where it was kept from the processor; else one run of placeholders is one image.

    Raises:
        `ValueError`: when the placeholders do not fit the images.
    """
    if visual_token_counts is not None:
        counts = torch.as_tensor(visual_token_counts).tolist()
        total = int(is_placeholder.sum())
        if len(counts) != num_images or sum(counts) != total:
            raise ValueError(
                f"Image features and image tokens do not match: `pixel_values` holds {num_images} images, "
                f"`visual_token_counts` is {counts} and the prompt has {total} image placeholders. Pass all three as the "
                "processor made them; if the prompt was truncated, raise `max_length` or lower `num_visual_tokens`."
            )
        return counts
    runs = placeholder_runs(is_placeholder)
    if len(runs) != num_images:
        raise ValueError(
            f"Image features and image tokens do not match: `pixel_values` holds {num_images} images, the prompt has "
            f"{len(runs)} runs of image placeholders, of {runs} tokens. Adjacent images need `visual_token_counts` as the "
            "processor returns it."
        )
    return runs


def images_beyond_cache(
    is_placeholder: torch.Tensor, num_images: int, visual_token_counts=None, num_cached: int = 0
) -> tuple[list[bool], list[int]]:
    """Which of the images passed along with a prompt have to be encoded, because no cache holds them yet.

    A prompt that goes on from a cache of `num_cached` positions comes with all of its images or with the new ones
    alone; `visual_token_counts` are of all images in the prompt or of those that are passed.

    Returns:
        `tuple[list[bool], list[int]]`: for each of the `num_images` images whether it is new, and the number of
        placeholders of each new one.

    Raises:
        `ValueError`: when the placeholders do not fit the images.
    """
    if not num_cached:
        return [True] * num_images, count_placeholders_per_image(is_placeholder, num_images, visual_token_counts)
    counts = placeholder_runs(is_placeholder)
    if visual_token_counts is not None:
        counts = torch.as_tensor(visual_token_counts).tolist()
    if sum(counts) == int(is_placeholder.sum()):
        ends = torch.tensor(counts, dtype=torch.long).cumsum(0) - 1
        columns = is_placeholder.nonzero()[:, 1].cpu()
        is_new = (columns[ends] >= num_cached).tolist()
        new_counts = [count for count, new in zip(counts, is_new) if new]
        if num_images == len(counts):
            return is_new, new_counts
        if num_images == len(new_counts):
            return [True] * num_images, new_counts
    new_counts = count_placeholders_per_image(is_placeholder[:, num_cached:], num_images, visual_token_counts)
    return [True] * num_images, new_counts


class VisionLayers(nn.ModuleList):
    """The layers of a vision tower, of which a forward pass runs the first `num_used`; `None` means all.

    Features are taken before the last layer, and what is behind them need not be computed. All layers stay in the tower, so
    checkpoints are those of the whole tower.
    """

    num_used: int | None = None

    def __iter__(self):
        return iter(list(self._modules.values())[: self.num_used])


def cache_length(past_key_values: Cache | None) -> int:
    """How many positions a cache holds already."""
    return past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else 0


def rebudget_inputs(
    input_ids: torch.Tensor,
    old_counts: list[int],
    new_counts: list[int],
    image_token_id: int,
    attention_mask: torch.Tensor | None = None,
    pad_token_id: int = 0,
    default_padding_side: str = "right",
    **aligned: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """Rewrite a prompt, and everything aligned with it, so that image i has `new_counts[i]` placeholders.

    Padding is removed and put back on the side where it was, as short as the new lengths allow.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Prompt with `old_counts[i]` placeholders for image i.
        aligned (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            `labels` (padded with -100), `position_ids` (counted anew), and whatever else, padded with 0.

    Returns:
        `dict[str, torch.Tensor | None]`: `input_ids`, `attention_mask` and everything in `aligned`.
    """
    device = input_ids.device
    batch_size, length = input_ids.shape
    is_placeholder = input_ids == image_token_id
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.ndim != 2:
        raise ValueError(
            "Re-budgeting with `num_visual_tokens` needs an attention mask of shape (batch_size, sequence_length); got "
            f"{tuple(mask.shape)}."
        )
    # Inner zeros belong to the sequence, outer ones are padding
    is_real = (mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)
    padding_side = default_padding_side
    if not is_real[:, 0].all():
        padding_side = "left"
    elif not is_real[:, -1].all():
        padding_side = "right"

    # Every position is repeated so many times: text once, padding never, an image's first placeholder for all of them
    repeats = (is_real & ~is_placeholder).long()
    old = torch.tensor(old_counts, device=device, dtype=torch.long)
    placeholders = is_placeholder.flatten().nonzero()[:, 0]
    repeats.view(-1)[placeholders[old.cumsum(0) - old]] = torch.tensor(new_counts, device=device, dtype=torch.long)

    source = torch.arange(length, device=device).repeat(batch_size).repeat_interleave(repeats.flatten())
    lengths = repeats.sum(-1)
    new_length = int(lengths.max())
    row = torch.arange(batch_size, device=device).repeat_interleave(lengths)
    column = torch.arange(len(source), device=device) - (lengths.cumsum(0) - lengths)[row]
    if padding_side == "left":
        column = column + (new_length - lengths)[row]

    def realign(tensor, fill):
        result = tensor.new_full((batch_size, new_length), fill)
        result[row, column] = tensor[row, source]
        return result

    result = {"input_ids": realign(input_ids, pad_token_id), "attention_mask": realign(mask, 0)}
    for name, tensor in aligned.items():
        if tensor is None:
            result[name] = None
        elif tensor.shape[:2] != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}; got {tuple(tensor.shape)}."
            )
        elif name == "position_ids":
            counted = result["attention_mask"].cumsum(-1) - 1
            result[name] = counted.clamp(min=0) + tensor.where(is_real, tensor.max()).amin(-1, keepdim=True)
        else:
            result[name] = realign(tensor, -100 if name == "labels" else 0)
    if attention_mask is None and bool(result["attention_mask"].all()):
        result["attention_mask"] = None
    return result


def check_rows_stay_aligned(
    is_placeholder: torch.Tensor, old_counts: list[int], new_counts: list[int], num_cached: int
):
    """Rows are aligned at their ends: where their new parts shrink differently, their cached parts shift apart.

    Args:
        is_placeholder (`torch.Tensor` of shape `(batch_size, sequence_length)`): of the re-budgeted prompt.

    Raises:
        `ValueError`: where they do.
    """
    rows, columns = is_placeholder.nonzero().T
    old, new = (torch.tensor(counts, device=rows.device) for counts in (old_counts, new_counts))
    ends = new.cumsum(0) - 1
    shrinkage = torch.zeros(is_placeholder.shape[0], dtype=torch.long, device=rows.device)
    shrinkage = shrinkage.index_add(0, rows[ends], (old - new) * (columns[ends] >= num_cached))
    if not (shrinkage == shrinkage[0]).all():
        raise ValueError(
            "`num_visual_tokens` cannot re-budget a batch that goes on from `past_key_values` when the new images of its "
            "rows shrink by different numbers of placeholders. Prepare the prompt with its budget, as "
            "`processor(..., num_visual_tokens=m)`, or go on with each row alone."
        )


def first_visual_tokens(features: BaseModelOutputWithPooling, counts: list[int]) -> BaseModelOutputWithPooling:
    """Image features cut to `counts[i]` visual tokens: token i is the same whatever m."""
    lengths = [len(tokens) for tokens in features.pooler_output]
    if len(counts) != len(lengths) or any(count > length for count, length in zip(counts, lengths)):
        raise ValueError(
            f"`mm_encoder_outputs` holds {lengths} visual tokens for the images, `num_visual_tokens` asks for {counts}. "
            "Make the features of all images in the prompt, with as many as will be asked for."
        )
    return BaseModelOutputWithPooling(pooler_output=[tokens[:n] for tokens, n in zip(features.pooler_output, counts)])


def refuse_budget(kwargs: dict, instead: str):
    """A budget that no layer would read must not become the default one."""
    if "num_visual_tokens" in kwargs:
        raise ValueError(
            f"`num_visual_tokens` is not taken here; pass {instead}. Got {kwargs['num_visual_tokens']!r}."
        )


class MQTLlavaModel(MQTLlavaPreTrainedModel):
    """The vision tower, the query transformer and the language model, without a language modeling head."""

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
            # Other towers may return something else than the last layer's output as their last hidden state
            self.vision_tower.encoder.layers = VisionLayers(self.vision_tower.encoder.layers)
        if getattr(self.vision_tower, "use_head", False):
            # SigLIP's pooling head is never asked for, and its `nn.MultiheadAttention` breaks where vLLM swaps Linears
            self.vision_tower.use_head = False
        self.query_transformer = MQTLlavaQueryTransformer(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    @merge_with_config_defaults
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_counts: torch.Tensor | list[int] | int | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encode images into visual tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                Images as the processor prepares them.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, `list[int]` or `int`, *optional*):
                How many visual tokens to make of each image, 1 to M. Defaults to M.

        Returns:
            [`~modeling_outputs.BaseModelOutputWithPooling`]: as `last_hidden_state` the hidden state of the vision tower
            that is queried, of shape `(num_images, num_patches (+ 1), vision_hidden_size)`, and as `pooler_output` a list
            of one tensor of shape `(m_i, text_hidden_size)` for each image. Its first rows are what fewer visual tokens
            would be, so features of M tokens do for every budget. To keep them, call this under `torch.no_grad()`:
            else they hold what a backward pass through the vision tower would need.

        Raises:
            `ValueError`: for counts that are not one integer from 1 to M per image.
        """
        refuse_budget(kwargs, "`visual_token_counts`")
        num_query_tokens = self.config.num_query_tokens
        counts = resolve_visual_token_counts(visual_token_counts, pixel_values.shape[0], num_query_tokens)
        # Not arguments by name: `generate` withholds those from the language model
        output_hidden_states = kwargs.pop("output_hidden_states", None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        whole = output_hidden_states or kwargs.get("output_attentions", self.config.output_attentions)
        outputs, features = self._run_vision_tower(pixel_values, vision_feature_layer, whole, **kwargs)
        patch_features = features[:, 1:] if vision_feature_select_strategy == "default" else features
        visual_tokens = self.query_transformer(patch_features, max(counts, default=0))
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=[tokens[:count] for tokens, count in zip(visual_tokens, counts)],
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _run_vision_tower(self, pixel_values, vision_feature_layer: int, whole: bool, **kwargs):
        """The tower's outputs and one of its hidden states. Runs the layers behind that only if `whole`."""
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        layers = getattr(getattr(self.vision_tower, "encoder", None), "layers", None)
        depth = vision_feature_layer
        if depth < 0:
            depth += self.config.vision_config.num_hidden_layers + 1
        partly = isinstance(layers, VisionLayers) and not whole and 0 < depth <= len(layers)
        # transformers counts the selected states from 0 or from 1, depending on its version; the last one is meant
        selection = [depth - 1, depth] if partly else True
        if isinstance(layers, VisionLayers) and layers.num_used != (depth if partly else None):
            layers.num_used = depth if partly else None
        outputs = self.vision_tower(pixel_values, output_hidden_states=selection, return_dict=True, **kwargs)
        return outputs, outputs.hidden_states[-1 if partly else vision_feature_layer]

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the image placeholders are: a bool tensor of shape `(batch_size, sequence_length)`."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_token_counts: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MQTLlavaModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts in which image i has as many placeholders as it shall have visual tokens.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Visual tokens of each image. Where it is missing, one run of placeholders is one image.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`.

        Raises:
            `ValueError`: when images and placeholders do not match, in number or in visual tokens.
        """
        refuse_budget(kwargs, "a prompt made with it, or `MQTLlavaForConditionalGeneration`")
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        visual_tokens = None
        if pixel_values is not None or image_outputs is not None:
            is_placeholder = self.get_placeholder_mask(input_ids, inputs_embeds)
            if image_outputs is not None:
                visual_tokens = torch.cat(list(image_outputs.pooler_output))
            elif torch.compiler.is_compiling():
                visual_tokens = self._traceable_visual_tokens(pixel_values, is_placeholder, visual_token_counts)
            else:
                counts = count_placeholders_per_image(is_placeholder, pixel_values.shape[0], visual_token_counts)
                visual_tokens = torch.cat(
                    self.get_image_features(pixel_values, counts, return_dict=True).pooler_output
                )
            visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            if image_outputs is not None and not torch.compiler.is_compiling():
                num_placeholders = is_placeholder.sum()
                torch_compilable_check(
                    num_placeholders == visual_tokens.shape[0],
                    lambda: (
                        f"Image features and image tokens do not match: {visual_tokens.shape[0]} visual tokens for "
                        f"{num_placeholders} placeholders."
                    ),
                )
            inputs_embeds = inputs_embeds.masked_scatter(is_placeholder[..., None], visual_tokens)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MQTLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )

    def _traceable_visual_tokens(self, pixel_values, is_placeholder, visual_token_counts):
        """The visual tokens in the order of the placeholders, by a graph whose shapes do not depend on the budgets.

        Under `torch.compile` and `torch.export` the number of placeholders is data. So all M tokens of each image are
        made, and the i-th placeholder of the batch picks its own; rows beyond the number of placeholders are unused.
        """
        num_images, num_query_tokens = pixel_values.shape[0], self.config.num_query_tokens
        visual_tokens = torch.cat(self.get_image_features(pixel_values, return_dict=True).pooler_output)
        if visual_token_counts is None:
            starts = is_placeholder & ~nn.functional.pad(is_placeholder, (1, 0))[:, :-1]
            image = (starts.flatten().cumsum(0) - 1).clamp(0, num_images - 1)
            visual_token_counts = torch.zeros(num_images, dtype=torch.long, device=image.device)
            visual_token_counts = visual_token_counts.scatter_add(0, image, is_placeholder.flatten().long())
        ends = visual_token_counts.cumsum(0)
        position = torch.arange(is_placeholder.numel(), device=ends.device)
        image = torch.searchsorted(ends, position, right=True).clamp(max=num_images - 1)
        query = (position - (ends - visual_token_counts)[image]).clamp(0, num_query_tokens - 1)
        return visual_tokens[image * num_query_tokens + query]


class MQTLlavaForConditionalGeneration(MQTLlavaPreTrainedModel, GenerationMixin):
    """MQT-LLaVA with a language modeling head: answers about images, with any number m of visual tokens per image."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        self.model = MQTLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # A generated placeholder would spoil a continued chat: it stands for no image
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_counts: torch.Tensor | list[int] | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`MQTLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, visual_token_counts, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_token_counts: torch.LongTensor | None = None,
        num_visual_tokens: int | list[int] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MQTLlavaCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts as the processor makes them.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Labels for the language modeling loss; -100 is ignored.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Visual tokens of each image, as the processor returns it. It settles adjacent images.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m, for all images or for each: re-budgets the prompt, whatever m it was prepared with. Logits then have
                the length of the re-budgeted prompt, with padding on the side where the prompt has it, on the right where
                it has none. Defaults to the number of placeholders in the prompt.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`. With `num_visual_tokens` the first
                tokens of each image are taken.

        Raises:
            `ValueError`: for budgets that are not integers from 1 to M, and when images and placeholders do not match.
        """
        if num_visual_tokens is not None:
            aligned = {name: kwargs.pop(name) for name in ("token_type_ids", "mm_token_type_ids") if name in kwargs}
            prompt = self._rebudget(
                num_visual_tokens,
                input_ids=input_ids,
                pixel_values=pixel_values,
                visual_token_counts=visual_token_counts,
                mm_encoder_outputs=mm_encoder_outputs,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                **aligned,
            )
            input_ids, attention_mask = prompt.pop("input_ids"), prompt.pop("attention_mask")
            mm_encoder_outputs = prompt.pop("mm_encoder_outputs")
            visual_token_counts = prompt.pop("visual_token_counts")
            position_ids, labels = prompt.pop("position_ids"), prompt.pop("labels")
            kwargs |= prompt

        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_token_counts=visual_token_counts,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return MQTLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _rebudget(
        self,
        num_visual_tokens,
        input_ids=None,
        pixel_values=None,
        visual_token_counts=None,
        mm_encoder_outputs=None,
        default_padding_side="right",
        num_cached=0,
        **aligned,
    ):
        """The prompt for a budget: see [`rebudget_inputs`]. `visual_token_counts` and `mm_encoder_outputs`, cut to the budget,
        are in the result.

        A prompt that goes on from a cache is re-budgeted with all its images, whether or not they are passed again.
        """
        unchanged = {"input_ids": input_ids, "mm_encoder_outputs": mm_encoder_outputs, **aligned}
        features = (mm_encoder_outputs or {}).get("image")
        num_images = 0 if pixel_values is None else pixel_values.shape[0]
        if features is not None:
            num_images = len(features.pooler_output)
        is_placeholder = None if input_ids is None else self.model.get_placeholder_mask(input_ids, None)
        if num_cached and input_ids is not None:
            num_images = len(placeholder_runs(is_placeholder) if visual_token_counts is None else visual_token_counts)
        new_counts = resolve_visual_token_counts(num_visual_tokens, num_images, self.config.num_query_tokens)
        if num_images == 0:
            return {**unchanged, "visual_token_counts": None}
        if input_ids is None:
            raise ValueError(
                "`num_visual_tokens` needs `input_ids`: a prompt given as `inputs_embeds` has its budget."
            )
        old_counts = count_placeholders_per_image(is_placeholder, num_images, visual_token_counts)
        if features is not None:
            unchanged["mm_encoder_outputs"] = {
                **mm_encoder_outputs,
                "image": first_visual_tokens(features, new_counts),
            }
        unchanged["visual_token_counts"] = torch.tensor(new_counts, device=input_ids.device, dtype=torch.long)
        if old_counts == new_counts:
            return unchanged
        if num_cached and not is_placeholder[:, :num_cached].any():  # a cached beginning of text stays as it is
            whole = {"input_ids": input_ids, **aligned}
            whole = {name: tensor for name, tensor in whole.items() if tensor is not None}
            behind = self._rebudget(
                num_visual_tokens,
                pixel_values=pixel_values,
                visual_token_counts=old_counts,
                mm_encoder_outputs=mm_encoder_outputs,
                default_padding_side=default_padding_side,
                **{name: tensor[:, num_cached:] for name, tensor in whole.items()},
            )
            joined = {name: torch.cat([whole[name][:, :num_cached], behind[name]], dim=1) for name in whole}
            return {**unchanged, **joined}
        pad_token_id = self.generation_config.pad_token_id
        prompt = rebudget_inputs(
            input_ids,
            old_counts,
            new_counts,
            self.config.image_token_id,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
            default_padding_side=default_padding_side,
            **aligned,
        )
        if num_cached:
            check_rows_stay_aligned(
                prompt["input_ids"] == self.config.image_token_id, old_counts, new_counts, num_cached
            )
        return {**unchanged, **prompt}

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, num_visual_tokens=None, **kwargs):
        r"""
        Generate answers: [`~generation.GenerationMixin.generate`] with a budget.

        To go on from the `past_key_values` of an earlier call, pass the same budgets for the images that the cache
        holds. Those are not encoded again, whether or not `pixel_values` still has them.

        Args:
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m, for all images or for each in the prompt: re-budgets the prompt, whatever m it was prepared with.
                Defaults to the number of placeholders in the prompt. Whatever m, the returned sequences begin with the
                caller's own `input_ids`, so `out[:, inputs["input_ids"].shape[1]:]` is the answer. `max_length` counts
                the re-budgeted prompt: say `max_new_tokens`.

        Raises:
            `ValueError`: for budgets that are not integers from 1 to M, when images and placeholders do not match, and for
            assisted decoding or `use_cache=False` together with a cache that holds something, which transformers gets wrong.
        """
        if cache_length(kwargs.get("past_key_values")):
            wrong = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if kwargs.get(name) is not None]
            wrong += ["use_cache=False"] if kwargs.get("use_cache") is False else []
            if wrong:
                raise ValueError(
                    f"`generate` cannot go on from `past_key_values` with {wrong[0]}: answers would be wrong."
                )
        if num_visual_tokens is None:
            return super().generate(inputs, *args, **kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        names = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
        aligned = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        # Where only the tokens that follow the cached ones are passed, the mask still begins with those
        cached_mask = None
        if input_ids is not None and "attention_mask" in aligned:
            mask = aligned["attention_mask"]
            cached_mask = mask[:, : max(mask.shape[1] - input_ids.shape[1], 0)]
            aligned["attention_mask"] = mask[:, cached_mask.shape[1] :]
        prompt = self._rebudget(
            num_visual_tokens,
            input_ids=input_ids,
            pixel_values=kwargs.get("pixel_values"),
            visual_token_counts=kwargs.pop("visual_token_counts", None),
            mm_encoder_outputs=kwargs.pop("mm_encoder_outputs", None),
            default_padding_side="left",
            num_cached=cache_length(kwargs.get("past_key_values")),
            **aligned,
        )
        prompt = {name: value for name, value in prompt.items() if value is not None}
        if cached_mask is not None:
            prompt["attention_mask"] = torch.cat([cached_mask, prompt["attention_mask"]], dim=1)
        outputs = super().generate(None, *args, **prompt, **kwargs)
        if input_ids is None or prompt["input_ids"] is input_ids:
            return outputs

        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        own_prompt = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0)
        sequences = torch.cat([own_prompt, sequences[:, prompt["input_ids"].shape[1] :]], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads generation_config.json with this. One that comes from a language model, or none, says
        nothing about placeholders."""
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [self.config.image_token_id]

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """`generate` encodes the images before it knows their prompts. Tell it how many visual tokens each has there,
        and leave out the images that a cache passed as `past_key_values` holds already."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        visual_token_counts = model_kwargs.pop("visual_token_counts", None)
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if features is not None:  # a copy: transformers repeats the caller's list for beams and samples, in place
            features = BaseModelOutputWithPooling(pooler_output=list(features.pooler_output))
            model_kwargs["mm_encoder_outputs"] = {**model_kwargs["mm_encoder_outputs"], "image": features}
        num_cached = cache_length(model_kwargs.get("past_key_values"))
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] > inputs_tensor.shape[1]:
            num_cached = 0  # the prompt is what follows the cached tokens
        if pixel_values is not None or (features is not None and num_cached):
            input_ids = inputs_tensor if not inputs_tensor.is_floating_point() else None
            is_placeholder = self.model.get_placeholder_mask(input_ids, inputs_tensor)
            num_images = len(features.pooler_output if pixel_values is None else pixel_values)
            if pixel_values is None and visual_token_counts is None:
                visual_token_counts = [len(tokens) for tokens in features.pooler_output]
            is_new, counts = images_beyond_cache(is_placeholder, num_images, visual_token_counts, num_cached)
            if pixel_values is None:
                new = [tokens for tokens, is_needed in zip(features.pooler_output, is_new) if is_needed]
                images = {"image": BaseModelOutputWithPooling(pooler_output=new)} if new else {}
                model_kwargs["mm_encoder_outputs"] = {**model_kwargs["mm_encoder_outputs"], "image": None, **images}
            elif counts:
                is_new = slice(None) if all(is_new) else torch.tensor(is_new, device=pixel_values.device)
                model_kwargs["pixel_values"] = pixel_values[is_new]
                model_kwargs["visual_token_counts"] = torch.tensor(counts, device=inputs_tensor.device)
        return super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)


MQTLlavaConfig.register_for_auto_class()
MQTLlavaModel.register_for_auto_class("AutoModel")
MQTLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MQTLlavaForConditionalGeneration", "MQTLlavaModel", "MQTLlavaPreTrainedModel"]
