"""transformers' tests of every model, over ours."""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModel, set_seed
from transformers_suite import suite
from transformers_suite.skipping import MODELS_BUILT, skips
from transformers_suite.tiny import JointTester, PretrainingTester, TabularTester, TextTester

from flip_hf import FlipConfig, FlipForCTR, FlipForPreTraining, FlipModel
from flip_hf.modeling_flip import FlipPreTrainedModel

common = suite.load("test_modeling_common")
# A test of the base class's checkpoints looks it up there.
AutoModel.register(FlipConfig, FlipModel, exist_ok=True)


class _Suite(common.ModelTesterMixin):
    """What the suite is told of our models, and where it runs under another name or with something spelled out."""

    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = ("feature_ids", "masked_feature_ids", "mtm_labels", "masked_input_ids", "mlm_labels")
    make_tester = JointTester

    @pytest.fixture(autouse=True)
    def count_models(self, monkeypatch, record_property):
        """Many of the suite's tests pass over models that have not what they are about."""
        built, start = [], FlipPreTrainedModel.__init__

        def counted(model, *args, **kwargs):
            built.append(model.__class__)
            start(model, *args, **kwargs)

        monkeypatch.setattr(FlipPreTrainedModel, "__init__", counted)
        yield
        record_property(MODELS_BUILT, len(built))

    def setUp(self):
        # The suite tells by these names what a model is for: it gives labels to one that classifies, and wants no loss
        # of a base model.
        for names, cls in (
            (common.MODEL_MAPPING_NAMES, FlipModel),
            (common.MODEL_FOR_PRETRAINING_MAPPING_NAMES, FlipForPreTraining),
            (common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, FlipForCTR),
        ):
            named = patch.dict(names, {"flip": cls.__name__})
            named.start()
            self.addCleanup(named.stop)
        set_seed(0)
        self.model_tester = self.make_tester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if inputs.get("attention_mask", ...) is None:
            # Ours refuse tokens without a mask, lest padding be read as text.
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    # Ours refuse a checkpoint that lacks weights; what they start from without them is tested all the same.
    def test_can_init_all_missing_weights(self):
        with self.missing_weights():
            super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with self.missing_weights():
            super().test_model_weights_reload_no_missing_tied_weights()

    def missing_weights(self):
        return patch.object(self.all_model_classes[0], "new_parameters", ("",))


EVERY_MODEL = {
    "test_model_main_input_name": "The tokens are the main input, by which transformers counts; the table comes first.",
}
ONE_LABEL = "A click is one yes or no: the model has one logit, whatever num_labels and problem_type say."


@skips(
    {
        **EVERY_MODEL,
        "test_retain_grad_hidden_states_attentions": "Differentiates the first output, which is of the table; the "
        "heads are tested.",
    }
)
class FlipModelTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipModel,)


@skips(EVERY_MODEL)
class FlipForPreTrainingTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForPreTraining,)
    make_tester = PretrainingTester


CTR = {
    **EVERY_MODEL,
    "test_problem_types": ONE_LABEL,
    "test_load_with_mismatched_shapes": ONE_LABEL,
    "test_can_load_ignoring_mismatched_shapes": ONE_LABEL,
}


@skips(CTR)
class FlipForCTRTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForCTR,)


@skips(CTR)
class FlipForCTRInTextModeTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForCTR,)
    make_tester = TextTester


NO_TEXT = "The mode builds no text encoder."


@skips(
    {
        **CTR,
        "test_enable_input_require_grads_with_gradient_checkpointing": NO_TEXT,
        "test_gradient_checkpointing_backward_compatibility": NO_TEXT,
        "test_gradient_checkpointing_enable_disable": NO_TEXT,
        "test_hidden_states_output": NO_TEXT,
        "test_model_get_set_embeddings": NO_TEXT,
        "test_peft_gradient_checkpointing_enable_disable": NO_TEXT,
        "test_retain_grad_hidden_states_attentions": NO_TEXT,
        "test_training_gradient_checkpointing": NO_TEXT,
        "test_training_gradient_checkpointing_use_reentrant_false": NO_TEXT,
        "test_training_gradient_checkpointing_use_reentrant_true": NO_TEXT,
    }
)
class FlipForCTRInIdModeTest(_Suite, unittest.TestCase):
    all_model_classes = (FlipForCTR,)
    make_tester = TabularTester
    has_attentions = False
    test_resize_embeddings = False
