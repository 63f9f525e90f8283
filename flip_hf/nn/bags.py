"""Pools the embeddings of positions into one vector per field."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.fields import PADDING_ID
from flip_hf.nn.layers import MLP


class TargetAttention(nn.Module):
    """DIN's activation unit (Zhou et al., KDD 2018, arXiv 1706.06978, Section 4.3, equation 3).

    A small network weights each feature of the sequence. It reads the feature, the target, their difference and their
    product. The weights are not normalised, so that a sequence similar to the target has more influence. Padding has
    weight 0.

    Shape:
        - inputs: float (B, embedding_dim), float (B, P, embedding_dim), bool (B, P)
        - output: float (B, P)
    """

    HIDDEN_SIZES = (36,)

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.network = MLP(4 * embedding_dim, self.HIDDEN_SIZES)
        self.output = nn.Linear(self.network.output_size, 1)

    def forward(self, target: torch.Tensor, sequence: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        targets = target.unsqueeze(1).expand_as(sequence)  # (B, P, D)
        pairs = torch.cat([targets, sequence, targets - sequence, targets * sequence], dim=-1)  # (B, P, 4 D)
        return self.output(self.network(pairs)).squeeze(-1).masked_fill(~present, 0.0)


class FieldPooling(nn.Module):
    """Computes one vector per field.

    The vector of a single-valued field is its embedding, that of a multi-valued field the mean, and that of a sequence
    with a target the sum weighted by `TargetAttention`.

    Args:
        num_positions: number of positions of each field.
        targets: for each field, the index of the field that attends to it, or None for the mean.
        embedding_dim: width of an embedding; further columns of the table are pooled with the same weights.
        attention_normalization: "none", as in DIN, or "length", which divides a sequence's weights by its number of
            values, so that a long sequence has no larger sum than a short one.

    Shape:
        - inputs: float (B, P, E), int64 (B, P), P the sum of `num_positions`
        - output: float (B, F, E)
    """

    def __init__(
        self,
        num_positions: Sequence[int],
        targets: Sequence[int | None],
        embedding_dim: int,
        attention_normalization: str = "none",
    ) -> None:
        super().__init__()
        self.attention_normalization = attention_normalization
        ends = [sum(num_positions[: i + 1]) for i in range(len(num_positions))]
        self.slices = [slice(end - number, end) for end, number in zip(ends, num_positions, strict=True)]
        self.targets = [target if number > 1 else None for target, number in zip(targets, num_positions, strict=True)]
        self.embedding_dim = embedding_dim
        self.attention = nn.ModuleDict(
            {str(i): TargetAttention(embedding_dim) for i, target in enumerate(self.targets) if target is not None}
        )

    def forward(self, vectors: torch.Tensor, feature_ids: torch.Tensor) -> torch.Tensor:
        if vectors.shape[1] == len(self.slices):
            return vectors
        return torch.stack([self._pool(i, vectors, feature_ids) for i in range(len(self.slices))], dim=1)

    def marked_fractions(self, marked: torch.Tensor, feature_ids: torch.Tensor) -> torch.Tensor:
        """The fraction of each field's features that are marked: bool (B, P), int64 (B, P) -> float (B, F)."""
        present = feature_ids != PADDING_ID
        if marked.shape[1] == len(self.slices):
            return (marked & present).float()
        parts = [(marked & present)[:, s].sum(dim=1) / present[:, s].sum(dim=1).clamp(min=1) for s in self.slices]
        return torch.stack(parts, dim=1)

    def _pool(self, field: int, vectors: torch.Tensor, feature_ids: torch.Tensor) -> torch.Tensor:
        own = vectors[:, self.slices[field]]  # (B, positions, E)
        if own.shape[1] == 1:
            return own.squeeze(1)
        present = feature_ids[:, self.slices[field]] != PADDING_ID  # (B, positions)
        target = self.targets[field]
        lengths = present.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        if target is None:
            weights = present / lengths
        else:
            attended = vectors[:, self.slices[target].start, : self.embedding_dim]  # (B, D)
            weights = self.attention[str(field)](attended, own[..., : self.embedding_dim], present)
            if self.attention_normalization == "length":
                weights = weights / lengths
        return torch.einsum("bp,bpe->be", weights.to(own.dtype), own)
