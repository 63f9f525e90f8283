"""DeepFM (Guo et al., IJCAI 2017, arXiv 1703.04247)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP, FactorizationMachine


class DeepFM(Backbone):
    """A factorization machine and a deep network over the same embeddings (Section 2.1, equations 1 to 4).

    The first-order weight of a feature is the last column of its row in the feature table.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        dropout: dropout in the deep network.
    """

    extra_dim = 1

    def __init__(
        self, num_fields: int, embedding_dim: int, hidden_sizes: Sequence[int] = (256, 128), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.fm = FactorizationMachine()
        self.deep = MLP(num_fields * embedding_dim, hidden_sizes, dropout)
        self.representation_size = embedding_dim + self.deep.output_size
        self.output = nn.Linear(self.deep.output_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        vectors, first_order = embeddings[..., :-1], embeddings[..., -1]  # (B, F, D), (B, F)
        second_order = self.fm(vectors)  # (B, D)
        deep = self.deep(vectors.flatten(1))
        logits = first_order.sum(dim=1) + second_order.sum(dim=1) + self.output(deep).squeeze(-1)
        return BackboneOutput(torch.cat([second_order, deep], dim=-1), logits)
