"""transformers' tests of every processor, over ours."""

import string
import unittest
from unittest.mock import patch

from transformers import BertTokenizer
from transformers_suite import suite
from transformers_suite.skipping import skips

from flip_hf import FieldConfig, FlipProcessor

processing = suite.load("test_processing_common")

ROWS = [
    {"user": "ann", "tags": "new|film", "title": "a film", "clicked": 1},
    {"user": "bob", "tags": "film", "title": None, "clicked": 0},
]
SETTINGS = {"label": "clicked", "max_length": 64}
FIELDS = [
    FieldConfig("user"),
    FieldConfig("tags", kind="multi_categorical", separator="|", max_values=3),
    FieldConfig("title", kind="text"),
]


def make_processor():
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    return FlipProcessor.fit(ROWS, FIELDS, tokenizer, **SETTINGS)


NOT_TYPED = "It takes rows of a log and plain settings, not text, images and sounds and typed settings for each."


@skips(
    {
        "test_call_arguments_default_none": NOT_TYPED,
        "test_call_arguments_not_in_processor_kwargs": NOT_TYPED,
        "test_flat_kwarg_applied_when_modality_dict_lacks_it": NOT_TYPED,
        "test_init_arguments_not_in_processor_kwargs": NOT_TYPED,
        "test_subprocessor_defaults_0_text": NOT_TYPED,
        "test_tokenizer_decode_defaults": "Makes a processor of a tokenizer alone; ours needs what was fitted.",
    }
)
class FlipProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = FlipProcessor

    @classmethod
    def _setup_from_components(cls):
        return make_processor()

    @staticmethod
    def prepare_processor_dict():
        return {"vocabulary": make_processor().vocabulary, **SETTINGS}

    # The vocabulary has a file of its own.
    def test_processor_to_json_string(self):
        with patch.object(type(self), "prepare_processor_dict", lambda self: SETTINGS):
            super().test_processor_to_json_string()

    # The suite passes text, images, videos and sounds by name.
    def test_model_input_names(self):
        processor = self.get_processor()
        assert set(processor(ROWS, return_tensors="pt")) == set(processor.model_input_names)
