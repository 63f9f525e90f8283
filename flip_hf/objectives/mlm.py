"""Masked language modelling, conditioned on the tabular view (FLIP, Section 3.3.1)."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.configuration_flip import FlipConfig
from flip_hf.fields import IGNORED_LABEL
from flip_hf.objectives.base import Objective, ObjectiveOutput, PretrainingBatch, mean_over_items


class MaskedLanguageModeling(Objective):
    """Recovers the tokens of a masked field from the masked text and the tabular view without masks.

    The state of each masked token is concatenated with the tabular representation, transformed, and scored against the
    text encoder's own input embeddings. Only masked positions are scored, because projecting all positions onto the
    vocabulary would cost more than the encoder.

    The loss is the cross-entropy over the vocabulary, or over the tokens of `set_tokens`. Metric: `mlm_accuracy`, the
    share of masked tokens recovered.
    """

    views = frozenset({"tabular", "masked_text"})
    labels = "mlm_labels"

    metric: ClassVar[str] = "mlm_accuracy"
    tokens: torch.Tensor

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__(config, tabular_size, text_size)
        self.dense = nn.Linear(text_size + tabular_size, text_size)
        self.norm = nn.LayerNorm(text_size)
        self.register_buffer("tokens", torch.empty(0, dtype=torch.int64), persistent=False)

    def set_tokens(self, tokens: torch.Tensor) -> None:
        """Scores only these tokens, and the tokens that are masked in the current batch.

        Most tokens of the vocabulary occur in no row's text. Scoring them takes most of the objective's time, and
        teaches the text encoder only that they don't occur.

        Args:
            tokens: int64 (tokens,), distinct and ascending; empty for the whole vocabulary.
        """
        self.tokens = tokens.to(self.tokens.device)

    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        assert batch.mlm_labels is not None
        masked = batch.mlm_labels != IGNORED_LABEL  # (B, T)
        rows, positions = masked.nonzero(as_tuple=True)  # (M,), (M,)
        hidden = self.norm(F.gelu(self.dense(self.token_inputs(batch, rows, positions))))  # (M, C)
        targets, embeddings = batch.mlm_labels[rows, positions], batch.token_embeddings
        if len(self.tokens):
            candidates = torch.cat([self.tokens, targets]).unique()
            targets, embeddings = torch.searchsorted(candidates, targets), embeddings[candidates]
        logits = F.linear(hidden, embeddings).float()  # (M, V or candidates)
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        accuracy = mean_over_items(logits.argmax(dim=-1) == targets)
        return ObjectiveOutput(loss_sum, masked.sum(), {self.metric: accuracy})

    def token_inputs(self, batch: PretrainingBatch, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inputs used to predict masked tokens: int64 (M,) twice, their rows and positions -> float (M, C + H)."""
        assert batch.masked_token_states is not None and batch.tabular is not None
        return torch.cat([batch.masked_token_states[rows, positions], batch.tabular[rows]], dim=-1)
