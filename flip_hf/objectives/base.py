"""The interface of pretraining objectives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from flip_hf.configuration_flip import FlipConfig
from flip_hf.fields import IGNORED_LABEL


@dataclass(frozen=True)
class ContrastiveShare:
    """One part's share of a contrastive loss that was computed over a larger batch.

    Attributes:
        tabular_gradient: float32 (B, P), gradient of the summed loss with respect to the part's projected tabular view.
        text_gradient: float32 (B, P), gradient of the summed loss with respect to the part's projected text.
        loss_sum: float (), the part's share of the summed loss, detached.
        metrics: metrics of the larger batch, as in `ObjectiveOutput`.
    """

    tabular_gradient: torch.Tensor
    text_gradient: torch.Tensor
    loss_sum: torch.Tensor
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True)
class PretrainingBatch:
    """Input of an objective: the encoded views that it declared, the labels, and the two shared tables.

    Letters as in `flip_hf.outputs`. V: tokens in the text encoder's vocabulary. N: rows of the feature table.

    Attributes:
        feature_ids: int64 (B, P), without masks.
        attention_mask: int64 (B, T).
        mtm_labels: int64 (B, F), the feature of each masked field; -100 elsewhere.
        mlm_labels: int64 (B, T), the ids of the masked tokens; -100 elsewhere.
        tabular: float (B, H), representation of the tabular view without masks.
        masked_tabular: float (B, H), representation of the masked tabular view.
        text: float (B, C), the pooled text without masks.
        token_states: float (B, T, C), token states of the text without masks.
        masked_token_states: float (B, T, C), token states of the masked text.
        embed_features: looks up the feature table, int64 (...) -> float (..., D). If the table is sharded over
            processes, all of them must call it equally often.
        token_embeddings: float (V, C), the text encoder's input embeddings.
    """

    feature_ids: torch.Tensor
    attention_mask: torch.Tensor
    mtm_labels: torch.Tensor | None
    mlm_labels: torch.Tensor | None
    tabular: torch.Tensor | None
    masked_tabular: torch.Tensor | None
    text: torch.Tensor | None
    token_states: torch.Tensor | None
    masked_token_states: torch.Tensor | None
    embed_features: Callable[[torch.Tensor], torch.Tensor]
    token_embeddings: torch.Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss of an objective over a batch.

    Attributes:
        loss_sum: float (), summed over the items.
        num_items: int64 (), number of items: masked tokens, masked features or rows.
        metrics: name to float (), detached means over the items.
    """

    loss_sum: torch.Tensor
    num_items: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(nn.Module, ABC):
    """A pretraining objective: owns its head, and returns a loss and its own metrics.

    The constructor takes `(config, tabular_size, text_size)`.

    Attributes:
        views: the views to encode for it: names out of "tabular", "masked_tabular", "text", "masked_text".
        labels: the label argument of `FlipForPreTraining.forward` that it needs, if any.
    """

    views: ClassVar[frozenset[str]]
    labels: ClassVar[str | None]

    @abstractmethod
    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__()

    @classmethod
    def num_items(cls, feature_ids: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Counts the items that the loss of a batch sums over, int64 (): labelled positions, or rows without labels."""
        if labels is None:
            return torch.tensor(feature_ids.shape[0], device=feature_ids.device)
        return (labels != IGNORED_LABEL).sum()

    def set_feature_counts(self, counts: torch.Tensor) -> None:
        """Sets how often each feature was seen, int64 (N,); ignored by objectives that draw no features."""

    def set_tokens(self, tokens: torch.Tensor) -> None:
        """Restricts scoring to these tokens, int64 (tokens,); ignored by objectives that score no tokens."""

    def grow(self, config: FlipConfig, counts: torch.Tensor) -> None:
        """Adapts to a feature table with new rows at its end; objectives without parameters for features ignore it.

        Args:
            config: configuration with the extended fields.
            counts: int64 (N,), as in `set_feature_counts`.
        """

    @abstractmethod
    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        """Computes the loss of one batch."""


def mean_over_items(values: torch.Tensor) -> torch.Tensor:
    """Detached mean of a metric over items; 0 for a batch without items."""
    return values.detach().float().sum() / max(values.numel(), 1)
