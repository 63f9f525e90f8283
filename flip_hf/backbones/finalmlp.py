"""FinalMLP: two streams and their bilinear fusion (Mao et al., AAAI 2023, arXiv 2304.00902)."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class FeatureSelection(nn.Module):
    """Scales every entry of the embeddings by a gate in (0, 2) (Section 3.2, equations 4 and 5).

    The gate reads the embeddings of chosen fields, such as the user's, or a learned vector if no fields are chosen.

    Shape:
        - input: float (B, F, D)
        - output: float (B, F * D)
    """

    def __init__(self, num_fields: int, embedding_dim: int, gate_fields: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.gate_fields = list(gate_fields)
        self.context = None if self.gate_fields else nn.Parameter(torch.empty(embedding_dim))
        self.gate = nn.Sequential(
            nn.Linear(max(len(self.gate_fields), 1) * embedding_dim, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, num_fields * embedding_dim),
        )

    def init_parameters(self) -> None:
        """Initialises the learned vector; called by the model that owns this module."""
        if self.context is not None:
            init.normal_(self.context, std=0.1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        context = embeddings[:, self.gate_fields].flatten(1) if self.context is None else self.context
        return 2 * torch.sigmoid(self.gate(context)) * embeddings.flatten(1)


class BilinearFusion(nn.Module):
    """`b + w_1^T o_1 + w_2^T o_2 + sum over heads of o_1j^T W_j o_2j` (Section 3.3, equations 6 to 8).

    Shape:
        - inputs: float (B, first_size), float (B, second_size)
        - output: float (B,)
    """

    def __init__(self, first_size: int, second_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first = nn.Linear(first_size, 1)
        self.second = nn.Linear(second_size, 1, bias=False)
        self.weight = nn.Parameter(torch.empty(num_heads, first_size // num_heads, second_size // num_heads))

    def init_parameters(self) -> None:
        """Initialises each matrix with Xavier's uniform distribution; called by the model that owns this module."""
        bound = (6 / (self.weight.shape[1] + self.weight.shape[2])) ** 0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        heads = (self.num_heads, -1)
        bilinear = torch.einsum("bhi,hij,bhj->b", first.unflatten(-1, heads), self.weight, second.unflatten(-1, heads))
        return (self.first(first) + self.second(second)).squeeze(-1) + bilinear


class FinalMLP(Backbone):
    """Two deep networks over differently gated embeddings, fused by a bilinear form (Section 3, Figure 1).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the first deep network's layers.
        second_hidden_sizes: widths of the second network's layers; by default those of the first.
        gate_fields: for each of the two gates, the indices of the fields that it reads, such as the user's and the
            item's. With no indices, the gate reads a learned vector.
        gate_size: width of the gates' hidden layer.
        num_heads: heads of the bilinear form, which must divide both networks' last widths.
        dropout: dropout in both networks.
    """

    logit_module = "fusion.first"

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        second_hidden_sizes: Sequence[int] | None = None,
        gate_fields: Sequence[Sequence[int]] = ((), ()),
        gate_size: int = 64,
        num_heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = [hidden_sizes, hidden_sizes if second_hidden_sizes is None else second_hidden_sizes]
        if any(size[-1] % num_heads for size in sizes):
            raise ValueError(f"backbone 'finalmlp': num_heads={num_heads} must divide both networks' last widths")
        self.selections = nn.ModuleList(
            FeatureSelection(num_fields, embedding_dim, fields, gate_size) for fields in gate_fields
        )
        self.streams = nn.ModuleList(MLP(num_fields * embedding_dim, size, dropout) for size in sizes)
        self.fusion = BilinearFusion(sizes[0][-1], sizes[1][-1], num_heads)
        self.representation_size = sizes[0][-1] + sizes[1][-1]

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        first, second = (
            stream(selection(embeddings)) for selection, stream in zip(self.selections, self.streams, strict=True)
        )
        return BackboneOutput(torch.cat([first, second], dim=-1), self.fusion(first, second))
