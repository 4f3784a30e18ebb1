"""transformers' own common processor tests, run against our processor at several numbers of visual tokens.

No test is excluded. Those that skip themselves ask for audio, for video or for a chat template with tools.
"""

import unittest
from unittest.mock import patch

from mqt_llava import MQTLlavaProcessor
from mqt_llava.modeling import processing_mqt_llava
from mqt_llava.modeling.budget_mqt_llava import resolve_visual_token_counts
from tests.small_model import NUM_QUERY_TOKENS, make_processor
from tests.transformers_source import load


processing_common = load("test_processing_common")


class CommonTests(processing_common.ProcessorTesterMixin):
    processor_class = MQTLlavaProcessor
    num_visual_tokens: int

    @classmethod
    def _setup_image_processor(cls):
        return make_processor().image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return make_processor().tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"num_query_tokens": NUM_QUERY_TOKENS}

    def setUp(self):
        """The tests themselves say no m, so another one than M becomes the default."""
        self.patch_default_num_visual_tokens(self.num_visual_tokens)

    def patch_default_num_visual_tokens(self, default):
        def resolve(num_visual_tokens, *args):
            return resolve_visual_token_counts(default if num_visual_tokens is None else num_visual_tokens, *args)

        patcher = patch.object(processing_mqt_llava, "resolve_visual_token_counts", resolve)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_default_num_visual_tokens(self):
        processor = self.get_processor()
        inputs = processor(images=self.prepare_images_inputs(), text="<image>", return_tensors="pt")
        self.assertEqual((inputs["input_ids"] == processor.image_token_id).sum(), self.num_visual_tokens)

    def test_get_num_multimodal_tokens_matches_processor_call(self):
        """Compares with a call at M: the helper sizes vLLM's buffers and counts M whatever m a request has."""
        self.patch_default_num_visual_tokens(NUM_QUERY_TOKENS)
        super().test_get_num_multimodal_tokens_matches_processor_call()


class OneTokenTest(CommonTests, unittest.TestCase):
    num_visual_tokens = 1


class FiveTokensTest(CommonTests, unittest.TestCase):
    num_visual_tokens = 5


class AllTokensTest(CommonTests, unittest.TestCase):
    num_visual_tokens = NUM_QUERY_TOKENS
