"""Masked language modelling of the text alone (PTab: Liu et al., 2022, arXiv 2209.08060)."""

import torch

from flip_hf.configuration_flip import FlipConfig
from flip_hf.objectives.base import PretrainingBatch
from flip_hf.objectives.mlm import MaskedLanguageModeling


class TextMaskedLanguageModeling(MaskedLanguageModeling):
    """Recovers the masked tokens from the masked text, without the tabular view.

    PTab's masked-language fine-tuning: as MLM here, but a masked token's own state is all that it is told from. It is
    the only objective there, and the text encoder is finetuned on clicks afterwards (`mode="text"`). What is masked is
    the collator's choice: whole fields, as in FLIP, or single tokens. The tabular view is encoded, as for every
    objective, but learns nothing from this one.

    Loss as in MLM. Metric: `text_mlm_accuracy`, the share of masked tokens recovered.
    """

    views = frozenset({"masked_text"})

    metric = "text_mlm_accuracy"

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        # The head reads nothing of the tabular representation.
        super().__init__(config, 0, text_size)

    def token_inputs(self, batch: PretrainingBatch, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What a masked token is told from: int64 (M,) twice, where they are -> float (M, C)."""
        assert batch.masked_token_states is not None
        return batch.masked_token_states[rows, positions]
