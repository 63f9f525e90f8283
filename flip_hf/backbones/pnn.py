"""IPNN: product-based neural network with inner products (Qu et al., ICDM 2016, arXiv 1611.00144)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP, pairs_of_fields


class PNN(Backbone):
    """A deep network over the embeddings and the inner products of all pairs of them (Section III, equations 3 to 9).

    The first layer is the paper's product layer: linear in both signals, `l1 = relu(l_z + l_p + b_1)`. It has a full
    weight for each pair; the paper factorises these weights.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the network's layers, the product layer first.
        dropout: dropout in the network.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int, hidden_sizes: Sequence[int] = (256, 128), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pairs = pairs_of_fields(num_fields)
        self.deep = MLP(num_fields * embedding_dim + len(self.pairs[0]), hidden_sizes, dropout)
        self.representation_size = self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        left, right = self.pairs
        products = (embeddings[:, left] * embeddings[:, right]).sum(dim=-1)  # (B, pairs)
        deep = self.deep(torch.cat([embeddings.flatten(1), products], dim=-1))
        return BackboneOutput(deep, self.output(deep).squeeze(-1))
