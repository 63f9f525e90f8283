"""DCN-V2: Improved Deep & Cross Network (Wang et al., WWW 2021, arXiv 2008.13535)."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class LowRankCross(nn.Module):
    """One cross layer as a mixture of low-rank experts (Section 3.1, equations 3 and 4).

    `x' = sum_i G_i(x) * (x0 ⊙ (U_i g(C_i g(V_i^T x)) + b)) + x`, with `g = tanh`, `G` a softmax gate and `x0` the
    network's input.

    Shape:
        - inputs: float (B, size), float (B, size)
        - output: float (B, size)
    """

    def __init__(self, size: int, low_rank: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.low_rank = low_rank
        # V of all experts side by side in one product; C and U are products of each expert's own part.
        self.down = nn.Linear(size, num_experts * low_rank, bias=False)
        self.middle = nn.ModuleList(nn.Linear(low_rank, low_rank, bias=False) for _ in range(num_experts))
        self.up = nn.ModuleList(nn.Linear(low_rank, size, bias=False) for _ in range(num_experts))
        self.bias = nn.Parameter(torch.empty(size))
        self.gate = nn.Linear(size, num_experts)

    def init_parameters(self) -> None:
        """Starts the bias; called by the model that owns this module."""
        init.zeros_(self.bias)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gates = self.gate(x).softmax(dim=-1)  # (B, experts)
        low = torch.tanh(self.down(x)).unflatten(-1, (self.num_experts, self.low_rank))  # (B, experts, rank)
        mixed = x
        for i in range(self.num_experts):
            expert = self.up[i](torch.tanh(self.middle[i](low[:, i]))) + self.bias  # (B, size)
            mixed = mixed + gates[:, i : i + 1] * (x0 * expert)
        return mixed


class DCNv2(Backbone):
    """The parallel structure (Section 3, Figure 1): cross network and deep network side by side, concatenated.

    Args:
        num_fields: fields of a row.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: layers of the deep network.
        cross_layers: layers of the cross network.
        low_rank: rank of each expert.
        num_experts: experts of each cross layer.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        low_rank: int = 32,
        num_experts: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        size = num_fields * embedding_dim
        self.cross = nn.ModuleList(LowRankCross(size, low_rank, num_experts) for _ in range(cross_layers))
        self.deep = MLP(size, hidden_sizes, dropout)
        self.representation_size = size + self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        x0 = embeddings.flatten(1)  # (B, size)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        representation = torch.cat([x, self.deep(x0)], dim=-1)  # (B, representation_size)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
