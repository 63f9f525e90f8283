"""Wide & Deep (Cheng et al., DLRS 2016, arXiv 1606.07792)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class WideDeep(Backbone):
    """First-order weights beside a deep network, trained together (Section 3.3, equation 3).

    The wide part reads the fields themselves, without hand-crafted crosses. The first-order weight of a feature is the
    last column of its row in the feature table.

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
        self.deep = MLP(num_fields * embedding_dim, hidden_sizes, dropout)
        self.representation_size = self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        deep = self.deep(embeddings[..., :-1].flatten(1))
        return BackboneOutput(deep, embeddings[..., -1].sum(dim=1) + self.output(deep).squeeze(-1))
