"""xDeepFM (Lian et al., KDD 2018, arXiv 1803.05170)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class CompressedInteraction(nn.Module):
    """The compressed interaction network (Section 3.2, equations 6 to 8), without an activation between its layers.

    Layer `k` combines each of its `H_(k-1)` feature maps with each field, dimension by dimension, and compresses the
    products to `H_k` maps. The output is the maps of all layers, summed over dimensions.

    Shape:
        - input: float (B, F, D)
        - output: float (B, sum of map_sizes)
    """

    def __init__(self, num_fields: int, map_sizes: Sequence[int]) -> None:
        super().__init__()
        inputs = [num_fields, *map_sizes[:-1]]
        self.layers = nn.ModuleList(
            nn.Linear(num_maps * num_fields, size, bias=False) for num_maps, size in zip(inputs, map_sizes, strict=True)
        )
        self.output_size = sum(map_sizes)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        fields = embeddings.transpose(1, 2)  # (B, D, F)
        maps, sums = fields, []
        for layer in self.layers:
            products = (maps.unsqueeze(-1) * fields.unsqueeze(-2)).flatten(-2)  # (B, D, H * F)
            maps = layer(products)  # (B, D, H')
            sums.append(maps.sum(dim=1))
        return torch.cat(sums, dim=-1)


class XDeepFM(Backbone):
    """First-order weights, a compressed interaction network and a deep network (Section 3.3, equation 9).

    The first-order weight of a feature is the last column of its row in the feature table.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        map_sizes: number of feature maps of each layer of the compressed interaction network.
        dropout: dropout in the deep network.
    """

    extra_dim = 1

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        map_sizes: Sequence[int] = (32, 32),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.interaction = CompressedInteraction(num_fields, map_sizes)
        self.deep = MLP(num_fields * embedding_dim, hidden_sizes, dropout)
        self.representation_size = self.interaction.output_size + self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        vectors, first_order = embeddings[..., :-1], embeddings[..., -1]  # (B, F, D), (B, F)
        representation = torch.cat([self.interaction(vectors), self.deep(vectors.flatten(1))], dim=-1)
        return BackboneOutput(representation, first_order.sum(dim=1) + self.output(representation).squeeze(-1))
