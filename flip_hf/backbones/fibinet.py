"""FiBiNET: feature importance and bilinear interaction (Huang et al., RecSys 2019, arXiv 1905.09433)."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP, pairs_of_fields


class SqueezeExcitation(nn.Module):
    """Scales each field by a weight computed from all fields (Section 3.2, equations 2 to 4).

    Shape:
        - input: float (B, F, D)
        - output: float (B, F, D)
    """

    def __init__(self, num_fields: int, reduction: int) -> None:
        super().__init__()
        size = max(1, num_fields // reduction)
        self.excitation = nn.Sequential(
            nn.Linear(num_fields, size, bias=False), nn.ReLU(), nn.Linear(size, num_fields, bias=False), nn.ReLU()
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        weights = self.excitation(embeddings.mean(dim=-1))  # (B, F)
        return embeddings * weights.unsqueeze(-1)


class BilinearInteraction(nn.Module):
    """`(e_i W) ⊙ e_j` for all pairs of fields (Section 3.3, equations 5 to 7).

    Shape:
        - input: float (B, F, D)
        - output: float (B, pairs, D)
    """

    def __init__(self, num_fields: int, embedding_dim: int, kind: str) -> None:
        super().__init__()
        self.pairs = pairs_of_fields(num_fields)
        num_weights = {"all": 1, "each": num_fields, "interaction": len(self.pairs[0])}[kind]
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(num_weights, embedding_dim, embedding_dim))

    def init_parameters(self) -> None:
        """Initialises each matrix with Xavier's uniform distribution; called by the model that owns this module."""
        bound = (3 / self.weight.shape[-1]) ** 0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        left, right = self.pairs
        if self.kind == "interaction":
            projected = torch.einsum("bpd,pde->bpe", embeddings[:, left], self.weight)
        else:
            weight = self.weight.expand(embeddings.shape[1], -1, -1)
            projected = torch.einsum("bfd,fde->bfe", embeddings, weight)[:, left]
        return projected * embeddings[:, right]  # (B, pairs, D)


class FiBiNET(Backbone):
    """Bilinear interactions of the plain and of the weighted fields, into a deep network (Section 3, equations 8-11).

    Both sets of interactions share their matrices. The first-order weight of a feature is the last column of its row
    in the feature table.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        bilinear: number of matrices: one for `"all"` pairs, one for `"each"` field, or one for each `"interaction"` of
            two fields.
        reduction: the excitation's hidden layer has `num_fields // reduction` units.
        dropout: dropout in the deep network.
    """

    extra_dim = 1

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        bilinear: str = "interaction",
        reduction: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if bilinear not in ("all", "each", "interaction"):
            raise ValueError(f"backbone 'fibinet': bilinear={bilinear!r} is not one of all, each, interaction")
        self.weighing = SqueezeExcitation(num_fields, reduction)
        self.interaction = BilinearInteraction(num_fields, embedding_dim, bilinear)
        num_pairs = num_fields * (num_fields - 1) // 2
        self.deep = MLP(2 * num_pairs * embedding_dim, hidden_sizes, dropout)
        self.representation_size = self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        vectors, first_order = embeddings[..., :-1], embeddings[..., -1]  # (B, F, D), (B, F)
        weighed, plain = self.interaction(self.weighing(vectors)), self.interaction(vectors)  # (B, pairs, D)
        deep = self.deep(torch.cat([weighed, plain], dim=1).flatten(1))
        return BackboneOutput(deep, first_order.sum(dim=1) + self.output(deep).squeeze(-1))
