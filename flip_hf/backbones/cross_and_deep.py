"""What the Deep & Cross family shares: a cross network and a deep network."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.cross import CrossNetwork
from flip_hf.nn.layers import MLP


class CrossAndDeep(Backbone):
    """Both networks read the concatenated embeddings, and their outputs, side by side, are the representation.

    Args:
        size: width of the concatenated embeddings.
        cross_layers: the layers of the cross network.
        hidden_sizes: layers of the deep network.
        dropout: dropout in the deep network.
        stacked: the deep network reads the cross network's output instead, and its own is the representation.
    """

    def __init__(
        self,
        size: int,
        cross_layers: Iterable[nn.Module],
        hidden_sizes: Sequence[int],
        dropout: float,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.cross = CrossNetwork(cross_layers)
        self.deep = MLP(size, hidden_sizes, dropout)
        self.stacked = stacked
        self.representation_size = self.deep.output_size + (0 if stacked else size)
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        x0 = embeddings.flatten(1)  # (B, size)
        crossed = self.cross(x0)  # (B, size)
        representation = self.deep(crossed) if self.stacked else torch.cat([crossed, self.deep(x0)], dim=-1)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
