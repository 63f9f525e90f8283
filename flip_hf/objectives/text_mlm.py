"""Masked language modelling from the text alone (PTab: Liu et al., 2022, arXiv 2209.08060)."""

import torch

from flip_hf.configuration_flip import FlipConfig
from flip_hf.objectives.base import PretrainingBatch
from flip_hf.objectives.mlm import MaskedLanguageModeling


class TextMaskedLanguageModeling(MaskedLanguageModeling):
    """Recovers the masked tokens from the masked text, without the tabular view.

    This is PTab's masked-language fine-tuning. It differs from MLM in that a masked token is predicted from its own
    state alone. In PTab it is the only objective, and the text encoder is finetuned on clicks afterwards
    (`mode="text"`). The collator decides what is masked: whole fields, as in FLIP, or single tokens. The tabular view
    is encoded, as for every objective, but this objective does not train it.

    Loss as in MLM. Metric: `text_mlm_accuracy`, the share of masked tokens recovered.
    """

    views = frozenset({"masked_text"})

    metric = "text_mlm_accuracy"

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        # The head does not read the tabular representation, hence the size 0.
        super().__init__(config, 0, text_size)

    def token_inputs(self, batch: PretrainingBatch, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inputs used to predict masked tokens: int64 (M,) twice, their rows and positions -> float (M, C)."""
        assert batch.masked_token_states is not None
        return batch.masked_token_states[rows, positions]
