"""Tiny FLIPs and batches of theirs, in the shape that the suite asks."""

import torch

from flip_hf import FieldConfig, FlipConfig
from flip_hf.fields import IGNORED_LABEL, MASK_ID, PADDING_ID

FIELDS = [
    FieldConfig("user", num_features=40),
    FieldConfig("item", num_features=60),
    FieldConfig("price", kind="numeric", num_features=8),
    FieldConfig("tags", kind="multi_categorical", num_features=12, max_values=3),
    FieldConfig("clicked", kind="sequence", share_embedding="item", target="item", max_values=4, num_features=0),
    FieldConfig("title", kind="text", num_features=0),
]


class JointTester:
    """Both towers, and both views of a batch."""

    batch_size = 8
    seq_length = 12
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 90
    mask_token_id = 4
    is_training = True
    mode = "joint"

    def get_config(self):
        return FlipConfig(
            text_config={
                "model_type": "bert",
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 37,
                "max_position_embeddings": 64,
            },
            fields=FIELDS,
            embedding_dim=8,
            backbone_options={"hidden_sizes": [16]},
            projection_dim=16,
            mode=self.mode,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        feature_ids = self.draw_features(config)
        lengths = torch.randint(4, self.seq_length + 1, (self.batch_size,))
        mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        inputs = {
            "feature_ids": feature_ids,
            # The suite cuts the vocabulary by 15 tokens, and leaves masked texts and labels as they are.
            "input_ids": torch.randint(5, self.vocab_size - 15, (self.batch_size, self.seq_length)) * mask,
            "attention_mask": mask,
        }
        return config, inputs

    def draw_features(self, config):
        """int64 (B, P), with one value or more in the fields that hold several."""
        columns = []
        for field, ranges in zip(config.tabular_fields, config.feature_ranges, strict=True):
            columns.append(torch.randint(*ranges[0], (self.batch_size, field.num_positions)))
            if field.traits.is_bag:
                held = torch.randint(1, field.max_values + 1, (self.batch_size, 1))
                columns[-1][torch.arange(field.max_values) >= held] = PADDING_ID
        return torch.cat(columns, dim=1)


class PretrainingTester(JointTester):
    """With one field masked in each row's table, and the first tokens of its text."""

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        feature_ids, input_ids = inputs["feature_ids"], inputs["input_ids"]
        sizes = torch.tensor([field.num_positions for field in config.tabular_fields])
        is_masked = torch.arange(len(sizes)) == torch.arange(self.batch_size)[:, None] % len(sizes)
        firsts = (sizes.cumsum(0) - sizes).expand(self.batch_size, -1)
        masked_ids = feature_ids.masked_fill(is_masked.repeat_interleave(sizes, dim=1), PADDING_ID)
        masked_ids.scatter_(1, firsts, masked_ids.gather(1, firsts).masked_fill(is_masked, MASK_ID))
        first_tokens = (torch.arange(self.seq_length) < 3).expand(self.batch_size, -1)
        inputs["masked_feature_ids"] = masked_ids
        inputs["mtm_labels"] = feature_ids.gather(1, firsts).masked_fill(~is_masked, IGNORED_LABEL)
        inputs["masked_input_ids"] = input_ids.masked_fill(first_tokens, self.mask_token_id)
        inputs["mlm_labels"] = input_ids.masked_fill(~first_tokens, IGNORED_LABEL)
        return config, inputs


class TabularTester(JointTester):
    """The tabular tower alone."""

    mode = "id"

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {"feature_ids": inputs["feature_ids"]}


class TextTester(JointTester):
    """The text tower alone."""

    mode = "text"

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        del inputs["feature_ids"]
        return config, inputs
