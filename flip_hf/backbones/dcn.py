"""DCN: Deep & Cross Network (Wang et al., ADKDD 2017, arXiv 1708.05123)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.cross import CrossNetwork, VectorCross
from flip_hf.nn.layers import MLP


class DCN(Backbone):
    """Cross network with one weight vector a layer, beside a deep network (Sections 2.2 to 2.4, equations 3 and 6).

    Args:
        num_fields: fields of a row.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: layers of the deep network.
        cross_layers: layers of the cross network.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        size = num_fields * embedding_dim
        self.cross = CrossNetwork(VectorCross(size) for _ in range(cross_layers))
        self.deep = MLP(size, hidden_sizes, dropout)
        self.representation_size = size + self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        x0 = embeddings.flatten(1)  # (B, size)
        representation = torch.cat([self.cross(x0), self.deep(x0)], dim=-1)  # (B, representation_size)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
