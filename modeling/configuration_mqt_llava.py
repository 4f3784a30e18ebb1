"""MQT-LLaVA model configuration"""

import math
from typing import TYPE_CHECKING, Any

import transformers


__version__ = "0.2.0"  # of this code and of the package mqt-llava
OLDEST_TRANSFORMERS = "5.19.0"

# Before the imports below, which fail in older releases with an error that doesn't name the cause. The other files import this one first
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, OLDEST_TRANSFORMERS.split(".")[:2])):
    raise ImportError(
        f"MQT-LLaVA {__version__} needs transformers {OLDEST_TRANSFORMERS} or newer, but {transformers.__version__} is installed: "
        f"pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
    )

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


AUTO_MAP = {
    "AutoConfig": "configuration_mqt_llava.MQTLlavaConfig",
    "AutoImageProcessor": "image_processing_mqt_llava.MQTLlavaImageProcessor",
    "AutoModel": "modeling_mqt_llava.MQTLlavaModel",
    "AutoModelForCausalLM": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoProcessor": "processing_mqt_llava.MQTLlavaProcessor",
}

# With label smoothing, `Trainer` shifts the labels only of models that are listed in the first mapping, which
# `AutoModelForCausalLM.register` doesn't fill. A model listed only there would be taken for text-only, hence the second
for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    names["mqt_llava"] = "MQTLlavaForConditionalGeneration"

if TYPE_CHECKING:
    SubConfig = Any  # a config of any class after `__post_init__`
else:
    SubConfig = dict | PreTrainedConfig | None


@strict
class MQTLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of an MQT-LLaVA model ([Matryoshka Query Transformer for Large Vision-Language
    Models](https://huggingface.co/papers/2405.19315)). The defaults are those of MQT-LLaVA 7B: a CLIP ViT-L/14 at 336
    pixels, 256 queries and a Llama with the shape of Vicuna 7B v1.5.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of the vision tower, of any class that `AutoModel` can build. Defaults to CLIP ViT-L/14 at 336 pixels.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of the language model, of any class that `AutoModel` can build. Defaults to a `LlamaConfig` with 32064
            token embeddings.
        image_token_id (`int`, *optional*, defaults to 32000):
            The id of the `<image>` placeholder.
        num_query_tokens (`int`, *optional*, defaults to 256):
            M, the number of learned queries and so the largest number of visual tokens per image. Must be a square number,
            since the queries form a square grid.
        query_transformer_num_attention_heads (`int`, *optional*, defaults to 16):
            Number of attention heads of the query transformer. Must divide the vision tower's width.
        query_transformer_layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the query transformer's layer norms.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Index of the vision tower's hidden state that the query transformer attends to.
        vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
            `"default"` drops the first feature (CLIP's class token), `"full"` keeps all features (for towers without a class
            token).
        tie_word_embeddings (`bool`, *optional*):
            Whether the language modeling head shares the token embeddings' weights. Defaults to
            `text_config.tie_word_embeddings`.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of newly initialised weights.

    Raises:
        `ValueError`: if `num_query_tokens` is not a square number, the heads don't divide the vision tower's width, that width
            is not a multiple of 4, or the vision tower has no such `vision_feature_layer`.

    Example:

    ```python
    >>> from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration

    >>> configuration = MQTLlavaConfig(num_query_tokens=64)
    >>> configuration.num_query_tokens
    64

    ```"""

    model_type = "mqt_llava"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]  # left out of `Trainer`'s predictions

    vision_config: SubConfig = None
    text_config: SubConfig = None
    image_token_id: int = 32000
    num_query_tokens: int = 256
    query_transformer_num_attention_heads: int = 16
    query_transformer_layer_norm_eps: float = 1e-6
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = AutoConfig.for_model(
                "clip_vision_model",
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        elif isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **self.vision_config})

        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama", vocab_size=32064)
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **self.text_config})

        # The embeddings are tied in the full model; the language model's own flag is kept equal
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

        # Not in a `validate_...` method, whose errors are not a `ValueError`
        queries, width = self.num_query_tokens, self.vision_config.hidden_size
        heads = self.query_transformer_num_attention_heads
        if queries < 1 or math.isqrt(queries) ** 2 != queries:
            raise ValueError(f"`num_query_tokens` must be a square number (1, 4, 9, ...); got {queries}.")
        if heads < 1 or width % heads:
            raise ValueError(
                f"`query_transformer_num_attention_heads` must divide the vision tower's width {width}; got {heads}."
            )
        if width % 4:
            raise ValueError(
                f"The vision tower's width must be a multiple of 4 for sine-cosine positions; got {width}."
            )
        num_layers = getattr(self.vision_config, "num_hidden_layers", None)
        if num_layers is not None and not -num_layers - 1 <= self.vision_feature_layer <= num_layers:
            raise ValueError(
                f"`vision_feature_layer` must be from {-num_layers - 1} to {num_layers} for a vision tower with {num_layers} "
                f"layers; got {self.vision_feature_layer}."
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                '`vision_feature_select_strategy` must be "default" or "full"; got '
                f"{self.vision_feature_select_strategy!r}."
            )

        super().__post_init__(**kwargs)

    @property
    def vision_feature_depth(self) -> int:
        """The number of vision tower layers that are run before the features are taken."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    def __getattr__(self, name):
        if name == "auto_map":  # TRL reads it from every config, and a folder without code has none
            return {}
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """See [`~PreTrainedConfig.save_pretrained`]. The saved `auto_map` lists every class of the code: by default,
        transformers lists only the config and the model that is saved, but vLLM needs the base model and some tools a causal
        language model."""
        self.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["MQTLlavaConfig"]
