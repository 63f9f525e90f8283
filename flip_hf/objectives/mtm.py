"""Masked tabular modelling, conditioned on the text (FLIP, Section 3.3.2)."""

import logging
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from flip_hf.configuration_flip import FlipConfig
from flip_hf.fields import IGNORED_LABEL, NUM_SHARED_FEATURES, owned_ranges
from flip_hf.objectives.base import Objective, ObjectiveOutput, PretrainingBatch, mean_over_items

logger = logging.getLogger(__name__)

Embed: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class TextSummary(nn.Module):
    """Single-head cross-attention from the tabular vector (query) to the token states (keys and values).

    Shape:
        - inputs: float (B, H), float (B, T, C), int64 (B, T)
        - output: float (B, size)
    """

    def __init__(self, tabular_size: int, text_size: int, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(tabular_size, size)
        self.key = nn.Linear(text_size, size)
        self.value = nn.Linear(text_size, size)

    def forward(self, tabular: torch.Tensor, token_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        query = self.query(tabular).unsqueeze(1)  # (B, 1, size)
        mask = attention_mask.bool().unsqueeze(1)  # (B, 1, T)
        summary = F.scaled_dot_product_attention(query, self.key(token_states), self.value(token_states), mask)
        return summary.squeeze(1)


class MaskedTabularModeling(Objective):
    """Recovers the masked features from the masked tabular view and the text without masks.

    The masked tabular representation is concatenated with a cross-attention summary of the text, and projected once for
    each field. The score of a feature is the product with its embedding plus a bias. It estimates the logarithm of
    `p(feature | row) / q(feature)`, where `q` is the unigram distribution over the candidates: the features of the
    masked field (`mtm_negatives="field"`) or all features (`"global"`). Scores of zero are therefore the unigram model,
    and the corrections for sampling from `q` cancel. With `k` negatives drawn from `q`, the losses are:

    - `"nce"`: `softplus(log k - s(target)) + sum over negatives of softplus(s(negative) - log k)` (Gutmann and
      Hyvärinen, AISTATS 2010, with the normaliser fixed at 1 as in Mnih and Teh, ICML 2012; the paper's choice).
    - `"sampled_softmax"`: cross-entropy of the target against the negatives that differ from it (Jean et al., ACL
      2015).
    - `"full_softmax"`: cross-entropy of `s + log q` over all candidates.

    If a field holds several features, the collator chooses the one to recover. With negatives from the field, a field
    with at most `k` features is scored by the full softmax over the field, whatever the loss. Metric: `mtm_accuracy`,
    the share of masked features that score highest among the scored candidates.
    """

    views = frozenset({"masked_tabular", "text"})
    labels = "mtm_labels"

    cumulative_counts: torch.Tensor
    slot_features: torch.Tensor
    feature_slots: torch.Tensor

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__(config, tabular_size, text_size)
        self.loss = config.mtm_loss
        self.negatives = config.mtm_negatives
        self.num_negatives = config.mtm_num_negatives
        self.num_fields = len(config.tabular_fields)
        self.summary = TextSummary(tabular_size, text_size, config.projection_dim)
        self.transform = nn.Linear(tabular_size + config.projection_dim, config.projection_dim)
        self.norm = nn.LayerNorm(config.projection_dim)
        self.field_projection = nn.Linear(config.projection_dim, self.num_fields * config.embedding_dim)
        self.bias = nn.Parameter(torch.empty(config.num_features))
        self._are_counts_checked = False
        # Slots order the features so that those of a field are adjacent, even if they were added at different times.
        # One search in the cumulative counts of the slots then draws from any field, and differences are counts.
        self._set_slots(config)
        for name, value in self._initial_buffers().items():
            self.register_buffer(name, value, persistent=name == "cumulative_counts")

    def _set_slots(self, config: FlipConfig) -> None:
        owned = owned_ranges(config.fields)
        self._order = [(0, NUM_SHARED_FEATURES), *(bounds for ranges in owned for bounds in ranges)]
        firsts, first = {}, NUM_SHARED_FEATURES
        for ranges in owned:
            if ranges:
                size = sum(end - start for start, end in ranges)
                firsts[ranges[0]] = (first, first + size)
                first += size
        self.field_slots = [firsts[ranges[0]] for ranges in config.feature_ranges]

    def init_parameters(self) -> None:
        """Initialises the biases to zero and the counts to one; called by the model that owns this module."""
        init.zeros_(self.bias)
        for name, value in self._initial_buffers().items():
            init.copy_(self.get_buffer(name), value)

    def _initial_buffers(self) -> dict[str, torch.Tensor]:
        slots = torch.cat([torch.arange(first, end) for first, end in self._order])
        return {
            "slot_features": slots,
            "feature_slots": slots.argsort(),
            "cumulative_counts": self._cumulate(torch.ones_like(slots)),
        }

    def grow(self, config: FlipConfig, counts: torch.Tensor) -> None:
        """As in the base class; the biases of the new features start at zero."""
        device = self.bias.device
        self.bias = nn.Parameter(F.pad(self.bias.detach(), (0, config.num_features - len(self.bias))))
        self._set_slots(config)
        self.slot_features = torch.cat([torch.arange(first, end, device=device) for first, end in self._order])
        self.feature_slots = self.slot_features.argsort()
        self.cumulative_counts = torch.zeros(len(self.bias) + 1, dtype=torch.int64, device=device)
        self.set_feature_counts(counts)

    def set_feature_counts(self, counts: torch.Tensor) -> None:
        """Sets the unigram distribution.

        Args:
            counts: int64 (N,), how often each feature was seen. An unseen feature counts as seen once, so that its
                probability is not zero; padding and mask have the count 0.
        """
        if counts.shape != self.bias.shape:
            raise ValueError(f"feature counts must have the shape {tuple(self.bias.shape)}, got {tuple(counts.shape)}")
        device = self.slot_features.device
        self.cumulative_counts.copy_(self._cumulate(counts.to(device).clamp(min=1)[self.slot_features]))
        self._are_counts_checked = True

    def _check_counts(self) -> None:
        """Warns once if every feature counts as seen once, because neither a caller nor a checkpoint set the counts."""
        self._are_counts_checked = True
        if self.cumulative_counts[-1] == len(self.bias) - NUM_SHARED_FEATURES:
            logger.warning(
                "MTM trains without feature counts, so its negatives are drawn uniformly instead of by how often "
                "features occur. Call model.set_feature_counts(processor.feature_counts) before training, or build the "
                "model with FlipForPreTraining.from_text_pretrained(encoder, processor=processor)"
            )

    @staticmethod
    def _cumulate(counts: torch.Tensor) -> torch.Tensor:
        """Cumulative sums of counts that are in the order of the slots."""
        counts = counts.to(torch.int64).clone()
        counts[:NUM_SHARED_FEATURES] = 0
        return F.pad(counts.cumsum(0), (1, 0))

    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        if self.training and not self._are_counts_checked:
            self._check_counts()
        assert batch.mtm_labels is not None and batch.masked_tabular is not None and batch.token_states is not None
        summary = self.summary(batch.masked_tabular, batch.token_states, batch.attention_mask)  # (B, P)
        hidden = self.norm(F.gelu(self.transform(torch.cat([batch.masked_tabular, summary], dim=-1))))  # (B, P)
        predictions = self.field_projection(hidden).unflatten(-1, (self.num_fields, -1))  # (B, F, D)
        masked = batch.mtm_labels != IGNORED_LABEL  # (B, F)
        rows, fields = masked.nonzero(as_tuple=True)  # (M,), (M,)
        # Single precision throughout, because the probabilities differ by orders of magnitude.
        with torch.autocast(predictions.device.type, enabled=False):
            predicted = predictions[rows, fields].float()  # (M, D)
            targets = batch.mtm_labels[rows, fields]
            if self.loss == "full_softmax":
                losses, correct = self._full(predicted, targets, fields, batch.embed_features)
            else:
                losses, correct = self._sampled(predicted, targets, fields, batch.embed_features)
        return ObjectiveOutput(losses.sum(), masked.sum(), {"mtm_accuracy": mean_over_items(correct)})

    def _counts(self, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return self.cumulative_counts[end] - self.cumulative_counts[first]

    def _candidate_range(self, fields: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First slot and end slot of the candidates of each masked field, int64 (M,) and (M,)."""
        if self.negatives == "field":
            bounds = torch.tensor(self.field_slots, device=fields.device)[fields]
            return bounds[:, 0], bounds[:, 1]
        return torch.full_like(fields, NUM_SHARED_FEATURES), torch.full_like(fields, len(self.bias))

    def _full(
        self, predicted: torch.Tensor, targets: torch.Tensor, fields: torch.Tensor, embed: Embed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact losses (M,), and whether the target scored highest, bool (M,)."""
        first, end = self._candidate_range(fields)
        losses, correct = torch.zeros_like(predicted[:, 0]), torch.zeros_like(targets, dtype=torch.bool)
        for low, high in sorted(set(zip(first.tolist(), end.tolist(), strict=True))):
            chosen = (first == low).nonzero(as_tuple=True)[0]
            counts = self.cumulative_counts[low : high + 1].diff()
            log_q = counts.double().log() - counts.sum().double().log()
            features = self.slot_features[low:high]
            scores = predicted[chosen] @ embed(features).float().T + self.bias[features] + log_q.float()
            places = self.feature_slots[targets[chosen]] - low
            losses[chosen] = F.cross_entropy(scores, places, reduction="none")
            correct[chosen] = scores.argmax(dim=-1) == places
        return losses, correct

    def _sampled(
        self, predicted: torch.Tensor, targets: torch.Tensor, fields: torch.Tensor, embed: Embed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (M,), and whether the target scored highest, bool (M,).

        Every position scores `1 + k` candidates: the target and `k` negatives. For a small field, they are the whole
        field, padded with candidates that are not counted.
        """
        k = self.num_negatives
        first, end = self._candidate_range(fields)
        below, total = self.cumulative_counts[first], self._counts(first, end)  # (M,), (M,)
        draws = (torch.rand(len(targets), k, device=targets.device, dtype=torch.float64) * total.unsqueeze(1)).long()
        draws = torch.minimum(draws, total.unsqueeze(1) - 1) + below.unsqueeze(1)
        negatives = torch.searchsorted(self.cumulative_counts, draws, right=True) - 1  # (M, k)
        target_slots = self.feature_slots[targets]
        slots = torch.cat([target_slots.unsqueeze(1), negatives], dim=1)  # (M, 1 + k)

        exact = end - first <= k  # (M,)
        whole_field = first.unsqueeze(1) + torch.arange(k + 1, device=targets.device)  # (M, 1 + k)
        counted = ~exact.unsqueeze(1) | (whole_field < end.unsqueeze(1))
        slots = torch.where(exact.unsqueeze(1), whole_field.clamp(max=len(self.bias) - 1), slots)
        target_places = torch.where(exact, target_slots - first, 0)
        candidates = self.slot_features[slots]

        scores = torch.einsum("md,mkd->mk", predicted, embed(candidates).float()) + self.bias[candidates]
        log_q = self._counts(slots, slots + 1).double().log() - total.double().log().unsqueeze(1)
        # For a whole field, log q is part of the score; with sampling, the correction cancels it.
        scores = torch.where(exact.unsqueeze(1), scores + log_q.float(), scores)
        is_target = F.one_hot(target_places, k + 1).bool()
        accidental = ~exact.unsqueeze(1) & ~is_target & (candidates == targets.unsqueeze(1))
        softmax_scores = scores.masked_fill(~counted | accidental, float("-inf"))
        losses = F.cross_entropy(softmax_scores, target_places, reduction="none")
        if self.loss == "nce":
            ratios = scores - math.log(k)
            noise_contrastive = torch.where(is_target, F.softplus(-ratios), F.softplus(ratios)).sum(dim=1)
            losses = torch.where(exact, losses, noise_contrastive)
        return losses, softmax_scores.argmax(dim=-1) == target_places
