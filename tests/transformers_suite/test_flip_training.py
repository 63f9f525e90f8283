"""transformers' test that a model can learn a batch by heart, over ours."""

import unittest

import torch
from transformers_suite import suite
from transformers_suite.tiny import JointTester, PretrainingTester

from flip_hf import FlipForCTR, FlipForPreTraining

training = suite.load("test_training_mixin")


class _Suite(training.TrainingTesterMixin):
    model_tester = None

    def setUp(self):
        self.model_tester = self.make_tester()
        get_config = self.model_tester.get_config

        def with_vocabulary():
            config = get_config()
            # The suite looks for it here, where a text model's is.
            config.vocab_size = self.model_tester.vocab_size
            return config

        self.model_tester.get_config = with_vocabulary

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        return self.model_tester.prepare_config_and_inputs_for_common()[1]


class FlipForPreTrainingLearnsTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForPreTraining,)
    make_tester = PretrainingTester


class FlipForCTRLearnsTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForCTR,)
    make_tester = JointTester

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        return {**batch, "labels": torch.arange(self.model_tester.batch_size) % 2}
