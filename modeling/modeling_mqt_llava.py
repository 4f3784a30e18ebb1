"""PyTorch MQT-LLaVA model"""

# isort: off
from .configuration_mqt_llava import MQTLlavaConfig  # before all others: it says so where transformers is too old
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
    """What outputs say about images: `image_outputs` is the output of [`MQTLlavaModel.get_image_features`]."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The visual tokens of all images one after the other, `(num_visual_tokens_of_all_images, hidden_size)`."""
        return None if self.image_outputs is None else torch.cat(list(self.image_outputs.pooler_output))  # type: ignore[arg-type]  # a list


# The names of what they inherit, the cache's among them, are those of the installed transformers
@dataclass
class MQTLlavaModelOutputWithPast(ImageOutputs, BaseModelOutputWithPast):
    """[`~modeling_outputs.BaseModelOutputWithPast`] of the language model, and `image_outputs`: the images' visual tokens as
    `pooler_output`, and what they were made of."""

    image_outputs: BaseModelOutputWithPooling | None = None


MODEL_OUTPUT_NAMES = tuple(field.name for field in fields(MQTLlavaModelOutputWithPast))


@dataclass
class MQTLlavaCausalLMOutputWithPast(ImageOutputs, CausalLMOutputWithPast):
    """[`~modeling_outputs.CausalLMOutputWithPast`], whose `logits` of shape `(batch_size, sequence_length, vocab_size)` count
    the visual tokens that were used, and so follow `num_visual_tokens`; and `image_outputs`, as above."""

    image_outputs: BaseModelOutputWithPooling | None = None


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
    token i is the same whatever m: the tokens of a small m are a prefix of those of a large one.
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
        """The parts first, as models of their own. As parts of one from outside transformers, modules without tensors, such as
        CLIP's attention, are passed over, and weights that a checkpoint lacks get another scale than a new model's."""
        model: Any = self.base_model  # to torch's annotations any of its parts may be a tensor
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
        """Leave out of the vision tower what is behind the features, so that its last hidden state is the features.

        Checkpoints of the whole tower hold those tensors, which are not loaded. (SigLIP's pooling head among them would break
        vLLM, which swaps the Linear inside its `nn.MultiheadAttention`.)
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
                Images as the processor prepares them.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, `list[int]` or `int`, *optional*):
                How many visual tokens to make of each image, 1 to M. Defaults to M.

        Returns:
            [`~modeling_outputs.BaseModelOutputWithPooling`]: as `last_hidden_state` the hidden state of the vision tower
            that is queried, of shape `(num_images, num_patches (+ 1), vision_hidden_size)`, and as `pooler_output` a list
            of one tensor of shape `(m_i, text_hidden_size)` for each image (compiled without counts, one tensor). Its
            first rows are what fewer visual tokens would be, so features of M tokens do for every m. To keep them, call
            this under `torch.no_grad()`: else they hold what a backward pass through the vision tower would need.

        Raises:
            `ValueError`: for counts that are not one integer from 1 to M per image.
        """
        refuse_num_visual_tokens(kwargs, "`visual_token_counts`")
        num_query_tokens, counts = self.config.num_query_tokens, None  # exported, it takes any number of images
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
        first_patch = int(self.config.vision_feature_select_strategy == "default")  # behind the class token
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
        """Where the image placeholders are: a bool tensor of shape `(batch_size, sequence_length)`."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None  # one of the two is there
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
                Prompts in which image i has as many placeholders as it shall have visual tokens.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Visual tokens of each image. Where it is missing, one run of placeholders is one image.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`.
            kwargs:
                For the language model. The cache is among them, by the name that the installed transformers has for it.

        Raises:
            `ValueError`: when images and placeholders do not match, in number or in visual tokens.
        """
        refuse_num_visual_tokens(kwargs, "a prompt made with it, or `MQTLlavaForConditionalGeneration`")
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is not None and len(pixel_values) == 0:  # TRL's share of the images for rows that have none
            count_visual_tokens(self.get_placeholder_mask(input_ids, inputs_embeds), 0, visual_token_counts)
            pixel_values = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if pixel_values is not None or image_outputs is not None:
            is_placeholder = self.get_placeholder_mask(input_ids, inputs_embeds)
            passed_over: int | torch.Tensor = 0
            if torch.compiler.is_compiling():
                # The counts are data: M tokens of every image are made, and some passed over
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
    """The embeddings `(batch_size, sequence_length, hidden_size)` of a prompt with `visual_tokens`, a list of one tensor for
    each image or one tensor of all, for its placeholders: every placeholder picks its own row."""
    table = visual_tokens.flatten(0, 1) if isinstance(visual_tokens, torch.Tensor) else torch.cat(list(visual_tokens))
    # Text picks row 0, which gets no gradient
    table = nn.functional.pad(table.to(inputs_embeds.device, inputs_embeds.dtype), (0, 0, 1, 0))
    row = (is_placeholder.flatten().cumsum(0) + passed_over).clamp(max=len(table) - 1)
    visual_tokens = nn.functional.embedding(row.view_as(is_placeholder) * is_placeholder, table, padding_idx=0)
    return torch.where(is_placeholder[..., None], visual_tokens, inputs_embeds)


class MQTLlavaForConditionalGeneration(MQTLlavaPreTrainedModel, GenerationMixin):
    """MQT-LLaVA with a language modeling head: answers about images, with any number m of visual tokens per image."""

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
                Prompts as the processor makes them.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their placeholders.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Labels for the language modeling loss; -100 is ignored.
            visual_token_counts (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Visual tokens of each image, as the processor returns it. It settles adjacent images.
            num_visual_tokens (`int` or `list[int]`, *optional*):
                m, for all images or for each, whatever the prompt was prepared with: see [`rebudget`]. Defaults to the number
                of placeholders in the prompt.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`. With `num_visual_tokens` the first
                tokens of each image are taken.
            kwargs:
                For the language model and the loss. The cache is among them, by the name that the installed transformers has
                for it.

        Raises:
            `ValueError`: for anything but integers from 1 to M, and when images and placeholders do not match.
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
        """See [`~PreTrainedModel.save_pretrained`]. A generation config that is marked as made of the model's config would be
        loaded without its `num_visual_tokens`: it is saved without the mark."""
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
        Generate answers: [`~generation.GenerationMixin.generate`], with any number of visual tokens.

        To go on from the cache of an earlier call (`past_key_values`, `cache` since transformers 5.24), pass the whole
        conversation or what follows the cached positions, and the new images alone. Images that the cache holds keep their
        visual tokens, so a conversation that is passed whole must be prepared with them: `processor(...,
        num_visual_tokens=m)`.

        Args:
            num_visual_tokens (`int`, `list[int]`, `"auto"` or [`VisualTokenSchedule`], *optional*):
                m, for all images or for each, whatever the prompt was prepared with: see [`rebudget`]; or as many as each row
                needs, by the `visual_token_schedule` of the generation config or by another one. Defaults to `num_visual_tokens`
                of the generation config, where that has it, or the number of placeholders in the prompt. Whatever m, sequences
                begin with the caller's own `input_ids`, so `out[:, inputs["input_ids"].shape[1]:]` is the answer, and so do the
                rows that stopping criteria, logits processors and `prefix_allowed_tokens_fn` are called with. `max_length`
                counts the prompt as it is used: say `max_new_tokens`.

        Raises:
            `ValueError`: for any other m, when images and placeholders do not match, for a cache that does not fit the prompt, for
            a model in training whose generation config has another m than the prompt, for all but greedy decoding by a
            schedule, and for assisted decoding or `use_cache=False` with a cache that holds something.
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
        if self.generation_config.suppress_tokens is None:  # a generated placeholder would stand for no image
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
        """The inputs of `generate` with visual tokens for pixels, of the images behind the `num_cached` first positions."""
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
                    "The prompt has placeholders, but no images stand behind them: pass `pixel_values` too."
                )
        if image_outputs is not None:  # with a list of our own, since transformers repeats it for beams in place
            image_outputs = BaseModelOutputWithPooling(pooler_output=list(image_outputs.pooler_output))  # type: ignore[arg-type]  # a list, as LLaVA's
            inputs["mm_encoder_outputs"] = {**(encoded or {}), "image": image_outputs}
        return inputs


MQTLlavaConfig.register_for_auto_class()
MQTLlavaModel.register_for_auto_class("AutoModel")
MQTLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MQTLlavaForConditionalGeneration", "MQTLlavaModel", "MQTLlavaPreTrainedModel"]
