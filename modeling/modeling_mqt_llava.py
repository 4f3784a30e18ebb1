"""PyTorch MQT-LLaVA model"""

# isort: off
from .configuration_mqt_llava import MQTLlavaConfig  # first, since it checks the version of transformers
# isort: on

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .adaptive_mqt_llava import VisualTokenSchedule, begin_schedule
from .budget_mqt_llava import (
    CACHE_NAME,
    OwnPrompt,
    check_cache,
    count_visual_tokens,
    default_num_visual_tokens,
    rebudget,
    refuse_in_training,
    refuse_num_visual_tokens,
    resolve_visual_token_counts,
    rows_passed_over,
)


class ImageOutputs:
    """Adds `image_hidden_states` to outputs whose `image_outputs` is the output of [`MQTLlavaModel.get_image_features`]."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The visual tokens of all images, concatenated, of shape `(sum of visual_token_counts, text_hidden_size)`."""
        return None if self.image_outputs is None else torch.cat(list(self.image_outputs.pooler_output))  # type: ignore[arg-type]  # a list


# Inherited, so that the cache has the name that the installed transformers uses
@dataclass
class MQTLlavaModelOutputWithPast(ImageOutputs, BaseModelOutputWithPast):
    """
    [`~modeling_outputs.BaseModelOutputWithPast`] of the language model.

    Args:
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of [`MQTLlavaModel.get_image_features`], with the visual tokens as `pooler_output`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


MODEL_OUTPUT_NAMES = tuple(field.name for field in fields(MQTLlavaModelOutputWithPast))


@dataclass
class MQTLlavaCausalLMOutputWithPast(ImageOutputs, CausalLMOutputWithPast):
    """
    [`~modeling_outputs.CausalLMOutputWithPast`]. With `num_visual_tokens`, the `sequence_length` of `logits` is that of the
    prompt with these visual tokens, not that of `input_ids`.

    Args:
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of [`MQTLlavaModel.get_image_features`], with the visual tokens as `pooler_output`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


def sinusoidal_grid_positions(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine positions of a `side` x `side` grid in raster order, `(side * side, width)`.

    The first half of the channels encodes the column, the second half the row; each half is `[sin | cos]` of `width / 4`
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
    """Turns the patch features of an image into m visual tokens, for any m from 1 to M.

    One cross-attention layer, in which the first m of M learned queries attend to the patches, followed by a projection to the
    language model's width. Queries and keys depend on positions only; the image enters through the values. Visual token i is
    the same for every m, so the tokens of a small m are a prefix of those of a larger one.
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
        """The queries' grid of positions, resized to the patches' grid (bicubic, in float32): `(num_patches, width)`."""
        patch_side, query_side = math.isqrt(num_patches), math.isqrt(self.num_query_tokens)
        if patch_side**2 != num_patches:
            raise ValueError(
                f"The vision tower returned {num_patches} patch features, which don't form a square grid. Set "
                '`vision_feature_select_strategy` to "default" for a tower with a class token and to "full" for one without.'
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
                m, the number of queries to use.

        Returns:
            `torch.Tensor` of shape `(num_images, num_visual_tokens, text_hidden_size)`.
        """
        num_images, num_patches, width = patch_features.shape
        queries = self.query[:num_visual_tokens] + self.position_embedding[:num_visual_tokens]
        queries = self.q_proj(self.query_norm(queries))
        keys = self.k_proj(self.key_norm(self.patch_positions(num_patches)))
        values = self.v_proj(self.value_norm(patch_features))

        # (num_images, heads, tokens, head_dim); queries and keys are the same for every image
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
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # a tuple, as LLaVA's
    supports_gradient_checkpointing = True
    _no_split_modules = ["MQTLlavaQueryTransformer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
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

    def initialize_weights(self):
        """Initialise the parts first, as models of their own. Inside a model from outside transformers, modules without tensors,
        such as CLIP's attention, are skipped, and weights missing from a checkpoint would get another scale than in a new model."""
        model: Any = self.base_model  # torch's annotations allow each part to be a tensor
        model.vision_tower.initialize_weights()
        model.language_model.initialize_weights()
        super().initialize_weights()


class MQTLlavaModel(MQTLlavaPreTrainedModel):
    """The vision tower, the query transformer and the language model, without a language modeling head."""

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.query_transformer = MQTLlavaQueryTransformer(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.tower_ends_at_features = config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")
        if self.tower_ends_at_features:
            self.drop_unused_vision_layers()
        self.post_init()

    def drop_unused_vision_layers(self):
        """Remove the layers after the features from the vision tower, so that its last hidden state is the features.

        Their tensors, which checkpoints of the whole tower have, are not loaded. (SigLIP's pooling head would break vLLM, which
        replaces the `nn.Linear` in its `nn.MultiheadAttention`.)
        """
        tower, depth = self.vision_tower, self.config.vision_feature_depth
        layers = [f"encoder.layers.{index}." for index in range(depth, len(tower.encoder.layers))]
        unused = "|".join(map(re.escape, [*layers, "post_layernorm.", "head."]))
        self._keys_to_ignore_on_load_unexpected = [rf"vision_tower\.({unused})"]
        tower.encoder.layers = tower.encoder.layers[:depth]
        tower.post_layernorm = nn.Identity()
        if hasattr(tower, "head"):
            tower.use_head = False
            del tower.head

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_counts: torch.Tensor | list[int] | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encode images into visual tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                Images as returned by the processor.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, `list[int]` or `int`, *optional*):
                The number of visual tokens of each image, from 1 to M. Defaults to M.

        Returns:
            [`~modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` is the hidden state of the vision tower that
            the query transformer attends to, of shape `(num_images, num_patches (+ 1), vision_hidden_size)`. `pooler_output`
            is a list with a tensor of shape `(m_i, text_hidden_size)` for each image (a single tensor in a compiled model
            without counts). The first rows are the visual tokens of a smaller m, so features with M tokens serve every m. Call
            this under `torch.no_grad()` to cache them; otherwise they keep the activations of the vision tower in memory.

        Raises:
            `ValueError`: if the counts are not one integer from 1 to M per image.
        """
        refuse_num_visual_tokens(kwargs, "`visual_token_counts`")
        num_query_tokens, counts = self.config.num_query_tokens, None
        # While exporting, counts stay `None`, since the number of images is dynamic
        if visual_token_counts is not None or not torch.compiler.is_compiling():
            counts = resolve_visual_token_counts(visual_token_counts, len(pixel_values), num_query_tokens)
        wanted = kwargs.pop("output_hidden_states", None)
        wanted = self.config.output_hidden_states if wanted is None else wanted
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype),
            output_hidden_states=wanted or not self.tower_ends_at_features,
            return_dict=True,
            **kwargs,
        )
        features = outputs.last_hidden_state
        if not self.tower_ends_at_features:
            features = outputs.hidden_states[self.config.vision_feature_layer]
        first_patch = int(self.config.vision_feature_select_strategy == "default")  # after the class token
        num_visual_tokens = num_query_tokens if counts is None else max(counts, default=0)
        visual_tokens = self.query_transformer(features[:, first_patch:], num_visual_tokens)
        if counts is not None:
            visual_tokens = [tokens[:count] for tokens, count in zip(visual_tokens, counts)]
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=visual_tokens,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Bool tensor of shape `(batch_size, sequence_length)` that is `True` at image placeholders."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_token_counts: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MQTLlavaModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts with as many placeholders for each image as it has visual tokens.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens to attend to, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens. Defaults to the language model's own.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings instead of `input_ids`. Placeholders are recognised by their embedding.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                The number of visual tokens of each image. By default, each run of placeholders is one image.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`.
            kwargs:
                Passed on to the language model, the cache among them: `past_key_values`, or `cache` since transformers 5.24.

        Returns:
            [`MQTLlavaModelOutputWithPast`]: `last_hidden_state` of shape `(batch_size, sequence_length, text_hidden_size)`.

        Raises:
            `ValueError`: if images and placeholders don't match, in number or in visual tokens.
        """
        refuse_num_visual_tokens(kwargs, "it to the processor, or to `MQTLlavaForConditionalGeneration`")
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is not None and len(pixel_values) == 0:  # how TRL splits a batch for rows without images
            count_visual_tokens(self.get_placeholder_mask(input_ids, inputs_embeds), 0, visual_token_counts)
            pixel_values = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if pixel_values is not None or image_outputs is not None:
            is_placeholder = self.get_placeholder_mask(input_ids, inputs_embeds)
            passed_over: int | torch.Tensor = 0
            if torch.compiler.is_compiling():
                # Shapes must not depend on the counts: all images are encoded to M tokens, and those not needed are skipped
                if pixel_values is not None:
                    sizes = len(pixel_values), self.config.num_query_tokens
                    passed_over = rows_passed_over(is_placeholder, *sizes, visual_token_counts)
                    image_outputs = self.get_image_features(pixel_values, return_dict=True)
            elif pixel_values is not None:
                counts = count_visual_tokens(is_placeholder, len(pixel_values), visual_token_counts)
                image_outputs = self.get_image_features(pixel_values, counts, return_dict=True)
            else:
                lengths = [len(tokens) for tokens in image_outputs.pooler_output]
                count_visual_tokens(is_placeholder, len(lengths), lengths)
            visual_tokens = image_outputs.pooler_output
            inputs_embeds = merge_visual_tokens(inputs_embeds, is_placeholder, visual_tokens, passed_over)

        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        outputs = {name: value for name, value in outputs.items() if name in MODEL_OUTPUT_NAMES}
        return MQTLlavaModelOutputWithPast(**outputs, image_outputs=image_outputs)


def merge_visual_tokens(inputs_embeds, is_placeholder, visual_tokens, passed_over=0) -> torch.Tensor:
    """Replace the placeholders in `inputs_embeds`, `(batch_size, sequence_length, hidden_size)`, with `visual_tokens`: a list with
    one tensor per image, or one tensor. Each placeholder looks up its own row of the visual tokens."""
    table = visual_tokens.flatten(0, 1) if isinstance(visual_tokens, torch.Tensor) else torch.cat(list(visual_tokens))
    # Text looks up row 0, which gets no gradient
    table = nn.functional.pad(table.to(inputs_embeds.device, inputs_embeds.dtype), (0, 0, 1, 0))
    row = (is_placeholder.flatten().cumsum(0) + passed_over).clamp(max=len(table) - 1)
    visual_tokens = nn.functional.embedding(row.view_as(is_placeholder) * is_placeholder, table, padding_idx=0)
    return torch.where(is_placeholder[..., None], visual_tokens, inputs_embeds)


class MQTLlavaForConditionalGeneration(MQTLlavaPreTrainedModel, GenerationMixin):
    """MQT-LLaVA with a language modeling head. Generates text from images and text, with any number m of visual tokens per
    image from 1 to M."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        self.model = MQTLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

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
                Prompts as returned by the processor.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens to attend to, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens. Defaults to the language model's own.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings instead of `input_ids`. Placeholders are recognised by their embedding.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Labels for the language modeling loss; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions to compute logits for, or the indices of the positions; 0 means all.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                The number of visual tokens of each image, as returned by the processor. Needed for adjacent images only.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m for all images or for each, whatever the prompt was prepared with: see [`rebudget`]. Defaults to the number
                of placeholders in the prompt.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`. With `num_visual_tokens`, the first
                tokens of each image are used.
            kwargs:
                Passed on to the language model and the loss, the cache among them: `past_key_values`, or `cache` since
                transformers 5.24.

        Returns:
            [`MQTLlavaCausalLMOutputWithPast`]: `logits` of shape `(batch_size, sequence_length, vocab_size)`, where
            `sequence_length` is that of the prompt with `num_visual_tokens`, and `loss`, a scalar, if `labels` are given.

        Raises:
            `ValueError`: if `num_visual_tokens` is anything but integers from 1 to M, or if images and placeholders don't match.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "visual_token_counts": visual_token_counts,
            "mm_encoder_outputs": mm_encoder_outputs,
            **kwargs,
        }
        if num_visual_tokens is not None:
            inputs = rebudget(inputs | {"labels": labels}, num_visual_tokens, self.config)
            labels = inputs.pop("labels")

        outputs = self.model(**inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MQTLlavaCausalLMOutputWithPast(loss=loss, logits=logits, **outputs)

    def save_pretrained(self, *args, **kwargs):
        """See [`~PreTrainedModel.save_pretrained`]. The generation config is saved without the mark that it was derived from the
        model's config, which would make transformers drop its `num_visual_tokens` when it is loaded."""
        settings = {
            name: value for name, value in self.generation_config.to_dict().items() if not name.startswith("_")
        }
        self.generation_config = GenerationConfig(**settings)
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        *args,
        num_visual_tokens: int | list[int] | str | VisualTokenSchedule | None = None,
        **kwargs,
    ):
        r"""
        [`~generation.GenerationMixin.generate`] with any number of visual tokens.

        Whatever `num_visual_tokens` is, the returned sequences begin with the caller's `input_ids`, so
        `out[:, inputs["input_ids"].shape[1]:]` is the answer. Stopping criteria, logits processors and
        `prefix_allowed_tokens_fn` see the caller's `input_ids` too. Use `max_new_tokens` rather than `max_length`, which counts
        the prompt with its new number of visual tokens.

        To continue from the cache of an earlier call (`past_key_values`, or `cache` since transformers 5.24), pass either the
        whole conversation or only what follows the cached positions, and the new images only. Images in the cache keep their
        visual tokens, so a conversation that is passed whole must be prepared with the same numbers:
        `processor(..., num_visual_tokens=m)`.

        Args:
            num_visual_tokens (`int`, `list[int]`, `"auto"` or [`VisualTokenSchedule`], *optional*):
                m for all images or for each, whatever the prompt was prepared with: see [`rebudget`]. With `"auto"` or a
                [`VisualTokenSchedule`], each row gets as many as it needs; `"auto"` uses the `visual_token_schedule` of the
                generation config. Defaults to `num_visual_tokens` of the generation config if that is set, else to the number
                of placeholders in the prompt.
            max_flops (`float`, *optional*):
                With a schedule, run only as many of its stages as take at most this many FLOPs: see [`schedule_within`].
            max_seconds (`float`, *optional*):
                The same in seconds on the CPU, an estimate.
            kwargs:
                The inputs from the processor and all other arguments of [`~generation.GenerationMixin.generate`].

        Returns:
            `torch.LongTensor` or `ModelOutput`: ids of shape `(batch_size, sequence_length)`; with
            `return_dict_in_generate=True`, an output that has them as `sequences`, which is an [`AdaptiveGenerateOutput`] if a
            schedule was used.

        Raises:
            `ValueError`: for any other `num_visual_tokens`, if images and placeholders don't match, for a cache that doesn't fit
                the prompt, for a model in training mode whose generation config sets another m than the prompt has, for anything
                but greedy decoding with a schedule, and for assisted decoding or `use_cache=False` with a cache that is not empty.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        cache = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
        num_cached = check_cache(cache, kwargs)
        is_default, configs = num_visual_tokens is None, (generation_config, self.generation_config)
        if is_default and kwargs.get("inputs_embeds") is None:
            num_visual_tokens = default_num_visual_tokens(*configs)
            if self.training and isinstance(num_visual_tokens, str):
                refuse_in_training(num_visual_tokens)
        kwargs, num_visual_tokens = begin_schedule(self, kwargs, args, num_visual_tokens, configs)
        if num_visual_tokens is not None:
            kwargs = rebudget(kwargs, num_visual_tokens, self.config, "left", num_cached)
        if self.generation_config.suppress_tokens is None:  # a generated placeholder would have no image
            self.generation_config.suppress_tokens = [self.config.image_token_id]
        own_prompt, callbacks = None, (logits_processor, stopping_criteria, prefix_allowed_tokens_fn)
        if input_ids is not None and kwargs["input_ids"] is not input_ids:
            if self.training and is_default:
                refuse_in_training(num_visual_tokens)
            own_prompt = OwnPrompt(input_ids, kwargs["input_ids"].shape[1])
            callbacks = own_prompt.wrap(*callbacks)
        kwargs = self.encode_images(kwargs, num_cached)
        outputs = super().generate(None, generation_config, *callbacks, *args, **kwargs)
        return outputs if own_prompt is None else own_prompt.restore(outputs, cache)

    def encode_images(self, inputs: dict, num_cached: int = 0) -> dict:
        """Replace `pixel_values` in the inputs of `generate` with visual tokens. The images are those after the first `num_cached`
        positions."""
        names = ("pixel_values", "visual_token_counts", "mm_encoder_outputs")
        pixel_values, counts, encoded = (inputs.get(name) for name in names)
        inputs = {name: value for name, value in inputs.items() if name not in names}
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        image_outputs = (encoded or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if image_outputs is None and (input_ids is not None or inputs_embeds is not None):
            input_ids = input_ids if inputs_embeds is None else None
            is_placeholder = self.model.get_placeholder_mask(input_ids, inputs_embeds)[:, num_cached:]
            if pixel_values is not None:
                counts = count_visual_tokens(is_placeholder, len(pixel_values), counts)
                if counts:
                    image_outputs = self.model.get_image_features(pixel_values, counts, return_dict=True)
            elif is_placeholder.any():
                raise ValueError(
                    "The prompt has image placeholders, but there are no images: pass `pixel_values` too."
                )
        if image_outputs is not None:  # a copy of the list, which transformers repeats for beams in place
            image_outputs = BaseModelOutputWithPooling(pooler_output=list(image_outputs.pooler_output))  # type: ignore[arg-type]  # a list, as LLaVA's
            inputs["mm_encoder_outputs"] = {**(encoded or {}), "image": image_outputs}
        return inputs


MQTLlavaConfig.register_for_auto_class()
MQTLlavaModel.register_for_auto_class("AutoModel")
MQTLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MQTLlavaForConditionalGeneration", "MQTLlavaModel", "MQTLlavaPreTrainedModel"]
