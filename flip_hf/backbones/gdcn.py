"""GDCN: Gated Deep & Cross Network (Wang et al., CIKM 2023, arXiv 2311.04635)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.cross import CrossNetwork, GatedCross
from flip_hf.nn.layers import MLP


class GDCN(Backbone):
    """Cross network whose interactions pass a gate, with a deep network beside or behind it (Section 3, equation 2).

    Args:
        num_fields: fields of a row.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: layers of the deep network.
        cross_layers: layers of the cross network.
        structure: `"parallel"` (GDCN-P), or `"stacked"` (GDCN-S): the deep network reads the cross network's output.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        structure: str = "parallel",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"backbone 'gdcn': structure={structure!r} is not one of parallel, stacked")
        size = num_fields * embedding_dim
        self.parallel = structure == "parallel"
        self.cross = CrossNetwork(GatedCross(size) for _ in range(cross_layers))
        self.deep = MLP(size, hidden_sizes, dropout)
        self.representation_size = (size if self.parallel else 0) + self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        x0 = embeddings.flatten(1)  # (B, size)
        crossed = self.cross(x0)
        representation = torch.cat([crossed, self.deep(x0)], dim=-1) if self.parallel else self.deep(crossed)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
