"""FNN: the deep network over concatenated embeddings (Zhang et al., ECIR 2016, arXiv 1601.02376)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class FNN(Backbone):
    """A multi-layer perceptron over the fields' embeddings (Section 3.1, equations 2 to 4).

    The embeddings are initialised randomly and trained with the network. The paper pretrains them with a factorization
    machine.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the network's layers.
        dropout: dropout in the network.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int, hidden_sizes: Sequence[int] = (256, 128), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.deep = MLP(num_fields * embedding_dim, hidden_sizes, dropout)
        self.representation_size = self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        deep = self.deep(embeddings.flatten(1))
        return BackboneOutput(deep, self.output(deep).squeeze(-1))
