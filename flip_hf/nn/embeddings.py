"""The feature table: one row for each feature of every field."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.configuration_flip import MASK_ID, PADDING_ID


class FeatureEmbedding(nn.Module):
    """Looks feature ids up in one table that all fields share.

    Args:
        field_bounds: ends of the fields' id ranges, `fields + 1` numbers.
        embedding_dim: width of an embedding.
        initializer_range: standard deviation of the embeddings at the start.
        extra_dim: further columns that a backbone reads beside the embedding, such as a first-order weight. They
            start at zero.

    Shape:
        - input: int64 (B, F), ids in the global space
        - output: float (B, F, embedding_dim + extra_dim)
    """

    def __init__(
        self, field_bounds: Sequence[int], embedding_dim: int, initializer_range: float, extra_dim: int = 0
    ) -> None:
        super().__init__()
        self.field_bounds = tuple(field_bounds)
        self.embedding_dim = embedding_dim
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(torch.empty(self.field_bounds[-1], embedding_dim + extra_dim))

    def init_parameters(self) -> None:
        """Starts the table unless it was loaded; called by the model that owns this module."""
        if getattr(self.weight, "_is_hf_initialized", False):
            return
        nn.init.zeros_(self.weight)
        nn.init.normal_(self.embeddings, std=self.initializer_range)
        nn.init.zeros_(self.weight[PADDING_ID])

    @property
    def embeddings(self) -> torch.Tensor:
        """float (features, embedding_dim): the table without the extra columns."""
        return self.weight[:, : self.embedding_dim]

    def forward(self, feature_ids: torch.Tensor) -> torch.Tensor:
        # On an accelerator the check would cost a synchronisation in every step, and the lookup itself stops there.
        if feature_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(feature_ids)
        return F.embedding(feature_ids, self.weight, padding_idx=PADDING_ID)

    def _check(self, feature_ids: torch.Tensor) -> None:
        num_fields = len(self.field_bounds) - 1
        if feature_ids.ndim != 2 or feature_ids.shape[1] != num_fields:
            raise ValueError(
                f"feature_ids must have the shape (batch, {num_fields}), one column a field; "
                f"got {tuple(feature_ids.shape)}"
            )
        first, end = torch.tensor(self.field_bounds[:-1]), torch.tensor(self.field_bounds[1:])
        inside = (feature_ids >= first) & (feature_ids < end)
        wrong = ~(inside | (feature_ids == MASK_ID) | (feature_ids == PADDING_ID))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"feature_ids[{row}, {column}] is {feature_ids[row, column].item()}, outside its field's range "
                f"[{self.field_bounds[column]}, {self.field_bounds[column + 1]}); make the ids with the processor "
                "that was saved with this model"
            )
