"""The feature table: one row for each feature of every field."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.fields import MASK_ID, PADDING_ID, oov_id

Ranges = Sequence[tuple[int, int]]
"""Ranges (first, end) of feature ids; the first range starts with the field's OOV feature."""


class FeatureEmbedding(nn.Module):
    """Looks up feature ids in one table that all fields share.

    Args:
        num_features: number of rows of the table.
        position_ranges: for each position (column of the input), the ids that it may hold besides padding and mask.
        embedding_dim: width of an embedding.
        initializer_range: standard deviation of the embeddings at initialisation.
        extra_dim: number of further columns that a backbone reads, such as a first-order weight; initialised to zero.

    Attributes:
        sparse: whether the table's gradient is a sparse tensor of the rows that were read, as in `nn.Embedding`. The
            optimiser must support such gradients (`training.feature_updates`).

    Shape:
        - input: int64 (B, P), ids in the global space
        - output: float (B, P, embedding_dim + extra_dim)
    """

    sparse = False

    def __init__(
        self,
        num_features: int,
        position_ranges: Sequence[Ranges],
        embedding_dim: int,
        initializer_range: float,
        extra_dim: int = 0,
    ) -> None:
        super().__init__()
        self.set_position_ranges(position_ranges)
        self.embedding_dim = embedding_dim
        self.initializer_range = initializer_range
        self._allocate(num_features, embedding_dim + extra_dim)

    def set_position_ranges(self, position_ranges: Sequence[Ranges]) -> None:
        """Sets the ids that each position may hold."""
        self.position_ranges = list(position_ranges)
        most = max(len(ranges) for ranges in self.position_ranges)
        padded = [[*ranges, *[(0, 0)] * (most - len(ranges))] for ranges in self.position_ranges]
        # Always on the CPU, even if the model is built on the meta device, because ids are only checked on the CPU.
        bounds = torch.tensor(padded, device="cpu")  # (P, ranges, 2)
        self._bounds = [(bounds[:, i, 0], bounds[:, i, 1]) for i in range(most)]

    def _allocate(self, num_features: int, width: int) -> None:
        self.weight = nn.Parameter(torch.empty(num_features, width))

    def init_parameters(self) -> None:
        """Initialises the table unless it was loaded; called by the model that owns this module."""
        if getattr(self.weight, "_is_hf_initialized", False):
            return
        nn.init.zeros_(self.weight)
        nn.init.normal_(self.weight[:, : self.embedding_dim], std=self.initializer_range)
        nn.init.zeros_(self.weight[PADDING_ID])

    def forward(self, feature_ids: torch.Tensor) -> torch.Tensor:
        # On an accelerator the check would synchronise in every step, and the lookup itself fails on ids out of range.
        if feature_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(feature_ids)
        return self._lookup(feature_ids)

    def embed(self, feature_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of any features, without extra columns: int64 (...) -> float (..., embedding_dim)."""
        return self._lookup(feature_ids)[..., : self.embedding_dim]

    def _lookup(self, feature_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(feature_ids, self.weight, padding_idx=PADDING_ID, sparse=self.sparse)

    def is_oov(self, feature_ids: torch.Tensor) -> torch.Tensor:
        """Which positions hold their field's OOV feature: int64 (B, P) -> bool (B, P)."""
        oov = torch.tensor([oov_id(ranges) for ranges in self.position_ranges], device=feature_ids.device)
        return feature_ids == oov

    def _check(self, feature_ids: torch.Tensor) -> None:
        num_positions = len(self.position_ranges)
        if feature_ids.ndim != 2 or feature_ids.shape[1] != num_positions:
            raise ValueError(
                f"feature_ids must have the shape (batch, {num_positions}), with one column per position; "
                f"got {tuple(feature_ids.shape)}"
            )
        inside = (feature_ids == MASK_ID) | (feature_ids == PADDING_ID)
        for first, end in self._bounds:
            inside |= (feature_ids >= first) & (feature_ids < end)
        if not inside.all():
            row, column = (~inside).nonzero()[0].tolist()
            ranges = ", ".join(f"[{first}, {end})" for first, end in self.position_ranges[column])
            raise ValueError(
                f"feature_ids[{row}, {column}] is {feature_ids[row, column].item()}, outside its field's range "
                f"{ranges}; encode the rows with the processor that was saved with this model"
            )
