"""Base class of the Deep & Cross family: a cross network and a deep network."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.cross import CrossNetwork
from flip_hf.nn.layers import MLP


class CrossAndDeep(Backbone):
    """A cross network and a deep network over the concatenated embeddings.

    The representation is the concatenation of both outputs.

    Args:
        size: width of the concatenated embeddings.
        cross_layers: the layers of the cross network.
        hidden_sizes: widths of the deep network's layers.
        dropout: dropout in the deep network.
        stacked: if true, the deep network reads the cross network's output, and its output is the representation.
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
