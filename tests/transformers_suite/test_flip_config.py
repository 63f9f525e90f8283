"""transformers' tests of every configuration, over ours."""

import unittest

import pytest
from transformers_suite import suite
from transformers_suite.skipping import OURS
from transformers_suite.tiny import FIELDS, JointTester

from flip_hf import FlipConfig

configuration = suite.load("test_configuration_common")

SKIPS = {
    "create_and_test_config_with_num_labels": "A click is one yes or no: num_labels is 1.",
}
CHECKS = [name for name in vars(configuration.ConfigTester) if name.startswith(("create_and_test_", "check_"))]


class Parent(unittest.TestCase):
    """What the suite asserts with, and takes a second configuration from."""

    model_tester = JointTester()


@pytest.mark.parametrize("check", CHECKS)
def test_flip_config(check):
    if check in SKIPS:
        pytest.skip(OURS + SKIPS[check])
    settings = {"fields": [field.to_dict() for field in FIELDS], "embedding_dim": 8, "backbone": "deepfm"}
    tester = configuration.ConfigTester(
        Parent(), FlipConfig, has_text_modality=False, common_properties=["text_config", "fields"], **settings
    )
    getattr(tester, check)()
