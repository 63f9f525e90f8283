"""The contract that pretraining objectives share."""

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
    """What a contrastive loss over a larger batch means for one part of it.

    Attributes:
        tabular_gradient: float32 (B, P), the summed loss's gradient with respect to the part's projected tabular views.
        text_gradient: float32 (B, P), with respect to its projected texts.
        loss_sum: float (), the part's share of the summed loss, detached.
        metrics: of the larger batch, as in `ObjectiveOutput`.
    """

    tabular_gradient: torch.Tensor
    text_gradient: torch.Tensor
    loss_sum: torch.Tensor
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True)
class PretrainingBatch:
    """What an objective reads: the encoded views that it declared, the labels, and the two shared tables.

    Letters as in `flip_hf.outputs`; V tokens in the text encoder's vocabulary, N rows of the feature table.

    Attributes:
        feature_ids: int64 (B, P), complete.
        attention_mask: int64 (B, T).
        mtm_labels: int64 (B, F), a masked field's feature, -100 elsewhere.
        mlm_labels: int64 (B, T), the masked tokens' ids, -100 elsewhere.
        tabular: float (B, H), representation of the complete tabular view.
        masked_tabular: float (B, H), representation of the masked tabular view.
        text: float (B, C), pooled complete text.
        token_states: float (B, T, C), states of the complete text.
        masked_token_states: float (B, T, C), states of the masked text.
        embed_features: looks the feature table up, int64 (...) -> float (..., D). The table itself may be spread over
            processes, all of which must look up equally often.
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
    """An objective's loss over a batch.

    Attributes:
        loss_sum: float (), summed over the items.
        num_items: int64 (), what the sum runs over: masked tokens, masked features or rows.
        metrics: name to float (), detached means over the items.
    """

    loss_sum: torch.Tensor
    num_items: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(nn.Module, ABC):
    """A pretraining objective: owns its head, returns a loss and its own metrics.

    The constructor takes `(config, tabular_size, text_size)`.

    Attributes:
        views: what must be encoded for it: names out of "tabular", "masked_tabular", "text", "masked_text".
        labels: the argument of `FlipForPreTraining.forward` that it can't do without, if any.
    """

    views: ClassVar[frozenset[str]]
    labels: ClassVar[str | None]

    @abstractmethod
    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__()

    @classmethod
    def num_items(cls, feature_ids: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """int64 (): what the loss of such a batch is summed over: labelled positions, or rows without labels."""
        if labels is None:
            return torch.tensor(feature_ids.shape[0], device=feature_ids.device)
        return (labels != IGNORED_LABEL).sum()

    def set_feature_counts(self, counts: torch.Tensor) -> None:
        """Takes how often each feature was seen, int64 (N,); an objective that draws no features has no use for it."""

    def set_tokens(self, tokens: torch.Tensor) -> None:
        """Takes the tokens that may be scored alone, int64 (tokens,); an objective that scores none ignores them."""

    def grow(self, config: FlipConfig, counts: torch.Tensor) -> None:
        """Takes over a feature table with more rows at its end; an objective that knows no features stays as it is.

        Args:
            config: with the larger fields.
            counts: int64 (N,), as in `set_feature_counts`.
        """

    @abstractmethod
    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        """The loss over one batch."""


def mean_over_items(values: torch.Tensor) -> torch.Tensor:
    """Detached mean of a metric over items, 0 where a batch has none."""
    return values.detach().float().sum() / max(values.numel(), 1)
