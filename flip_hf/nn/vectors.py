"""Projections of feature vectors, which are added to the embeddings."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from flip_hf.fields import MASK_ID, PADDING_ID


class VectorMLP(nn.Module):
    """Two layers with a ReLU between them; at initialisation the output is about as small as an embedding.

    Args:
        size: numbers of a vector; vectors should be standardised.
        hidden_size: width of the hidden layer.
        output_size: width of the output.
        initializer_range: standard deviation of the output at initialisation.

    Shape:
        - input: float (..., size)
        - output: float (..., output_size)
    """

    def __init__(self, size: int, hidden_size: int, output_size: int, initializer_range: float) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        # Not nn.Linear, which the models initialise in another way.
        self.hidden_weight = nn.Parameter(torch.empty(hidden_size, size))
        self.hidden_bias = nn.Parameter(torch.empty(hidden_size))
        self.output_weight = nn.Parameter(torch.empty(output_size, hidden_size))
        self.output_bias = nn.Parameter(torch.empty(output_size))

    def init_parameters(self) -> None:
        """Initialises the layers unless they were loaded; called by the model that owns this module."""
        hidden_size, size = self.hidden_weight.shape
        # ReLU halves the second moment.
        init.normal_(self.hidden_weight, std=(2 / size) ** 0.5)
        init.normal_(self.output_weight, std=self.initializer_range / hidden_size**0.5)
        init.zeros_(self.hidden_bias)
        init.zeros_(self.output_bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(F.linear(vectors, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.output_weight, self.output_bias)


class VectorProjection(nn.Module):
    """Projects the vectors of features to the width of an embedding, with one `VectorMLP` per owner.

    Args:
        sizes: numbers of a vector, by the name of the field that owns it.
        owners: for each position of `feature_ids`, the field that owns its vectors; None if it has none.
        embedding_dim: width of an embedding.
        hidden_size: width of the hidden layers.
        initializer_range: approximate standard deviation of the output for standardised vectors at initialisation.

    Shape:
        - inputs: int64 (B, P); float (1, vectors, size) by name; int64 (B, P), indices into these, -1 for none
        - output: float (B, P, embedding_dim), 0 for positions without a vector, masked positions and padding
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        owners: Sequence[str | None],
        embedding_dim: int,
        hidden_size: int,
        initializer_range: float,
    ) -> None:
        super().__init__()
        self.names = list(sizes)
        # A list, because the fields' names may contain dots.
        self.projections = nn.ModuleList(
            VectorMLP(size, hidden_size, embedding_dim, initializer_range) for size in sizes.values()
        )
        # For each owner, the positions that hold its vectors, bool (P,).
        self._positions = [[own == name for own in owners] for name in self.names]

    def forward(
        self, feature_ids: torch.Tensor, vectors: Mapping[str, torch.Tensor], places: torch.Tensor
    ) -> torch.Tensor:
        present = (places >= 0) & (feature_ids != MASK_ID) & (feature_ids != PADDING_ID)  # (B, P)
        added = []
        for name, projection, positions in zip(self.names, self.projections, self._positions, strict=True):
            projected = projection(vectors[name][0])  # (vectors, D)
            # The first row is for positions without a vector.
            table = torch.cat([projected.new_zeros(1, projected.shape[1]), projected])
            own = torch.where(present & torch.tensor(positions, device=places.device), places + 1, 0)
            added.append(F.embedding(own, table))  # (B, P, D)
        return torch.stack(added).sum(dim=0)
