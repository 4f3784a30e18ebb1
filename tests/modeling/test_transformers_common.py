"""transformers' own common model and config tests, run against our classes at several numbers of visual tokens."""

import inspect
import unittest
from unittest.mock import mock_open, patch

import torch
from transformers.models.auto import modeling_auto

from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaModel
from tests.transformers_source import load


modeling_common = load("test_modeling_common")
configuration_common = load("test_configuration_common")
training = load("test_training_mixin")

# `Auto*.register` leaves these alone, but the common tests look up by name what a class is for
modeling_auto.MODEL_MAPPING_NAMES["mqt_llava"] = "MQTLlavaModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mqt_llava"] = "MQTLlavaForConditionalGeneration"

# Every test that is left out, with the reason. The others that are skipped skip themselves: they need an accelerator,
# FlashAttention, DeepSpeed or `kernels`, or something that this architecture has not got, such as experts.
EXCLUDED = {
    "test_generation_tester_mixin_inheritance": "tests/generation is not in the source distribution, so there is no "
    "GenerationTesterMixin to inherit from; test_generation.py has our own tests of `generate`.",
}


class ModelTester:
    """Small configs, and inputs with one image in each row."""

    batch_size = 3
    text_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_query_tokens = 16
    image_size = 30
    image_token_id = 50  # none of the random ids, and none of the training test's pattern
    is_training = True
    causal_lm_class = MQTLlavaForConditionalGeneration

    def __init__(self, num_visual_tokens, with_counts):
        self.num_visual_tokens = num_visual_tokens
        self.with_counts = with_counts
        self.seq_length = self.encoder_seq_length = self.text_length + num_visual_tokens

    def get_config(self):
        shape = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        text_config = {"vocab_size": 99, "max_position_embeddings": 512, "pad_token_id": 0} | shape
        return MQTLlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 30, "patch_size": 5, **shape},
            text_config={"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, **text_config},
            image_token_id=self.image_token_id,
            num_query_tokens=self.num_query_tokens,
            query_transformer_num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = modeling_common.ids_tensor([self.batch_size, self.seq_length], 98 - 3) + 3
        input_ids += input_ids >= self.image_token_id
        input_ids[:, 1 : 1 + self.num_visual_tokens] = self.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": modeling_common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
        }
        if self.with_counts:
            inputs["visual_token_counts"] = torch.full((self.batch_size,), self.num_visual_tokens)
        return self.get_config(), inputs


class CommonTests(modeling_common.ModelTesterMixin):
    all_model_classes = (MQTLlavaModel, MQTLlavaForConditionalGeneration)
    _is_composite = True
    num_visual_tokens: int
    with_counts = False  # whether the inputs have `visual_token_counts`, or the runs of placeholders say it

    def setUp(self):
        self.model_tester = ModelTester(self.num_visual_tokens, self.with_counts)
        self.config_tester = configuration_common.ConfigTester(
            self,
            config_class=MQTLlavaConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "image_token_index", "num_query_tokens", "vision_feature_layer"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        """transformers spares models from before 2023, going by the copyright line of the config's module."""
        with patch.object(modeling_common, "open", mock_open(read_data="# Copyright 2026"), create=True):
            super().test_can_init_all_missing_weights()

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        """The vision tower ends at the features, one layer before its config does."""
        return self.model_tester.get_config().vision_feature_depth


for name, reason in EXCLUDED.items():
    setattr(CommonTests, name, unittest.skip(reason)(getattr(CommonTests, name)))


class OneTokenTest(CommonTests, unittest.TestCase):
    num_visual_tokens = 1


class TrainingTest(training.TrainingTesterMixin, unittest.TestCase):
    """On text, as transformers has it for all models: the loss falls, and what was learned is generated."""

    all_model_classes = CommonTests.all_model_classes

    def setUp(self):
        self.model_tester = ModelTester(1, with_counts=False)
        config = self.model_tester.get_config()
        config.vocab_size = config.text_config.vocab_size  # where the test looks for it
        self.model_tester.get_config = lambda: config


class InputsTests(CommonTests):
    """The tests that run the model on inputs. What a model is without them does not depend on m, and was tested above."""


for name, method in inspect.getmembers(CommonTests, inspect.isfunction):
    if name.startswith("test_") and "inputs_dict" not in inspect.getsource(method):
        setattr(InputsTests, name, None)


class FiveTokensTest(InputsTests, unittest.TestCase):
    num_visual_tokens = 5
    with_counts = True


class AllTokensTest(InputsTests, unittest.TestCase):
    num_visual_tokens = ModelTester.num_query_tokens
