"""Cross layers: explicit interactions of bounded degree between the elements of a vector."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class CrossNetwork(nn.ModuleList):
    """A sequence of cross layers, each of which also reads the network's input.

    Shape:
        - input: float (B, size)
        - output: float (B, size)
    """

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        x = x0
        for layer in self:
            x = layer(x0, x)
        return x


class VectorCross(nn.Module):
    """`x' = x0 (x^T w) + b + x` (DCN, arXiv 1708.05123, Section 2.2, equation 3).

    Shape:
        - inputs: float (B, size), float (B, size)
        - output: float (B, size)
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(size, 1, bias=False)
        self.bias = nn.Parameter(torch.empty(size))

    def init_parameters(self) -> None:
        """Initialises the bias; called by the model that owns this module."""
        init.zeros_(self.bias)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x0 * self.weight(x) + self.bias + x


class MatrixCross(nn.Module):
    """`x' = x0 ⊙ (W x + b) + x` (DCN-V2, arXiv 2008.13535, Section 3, equation 1).

    Shape:
        - inputs: float (B, size), float (B, size)
        - output: float (B, size)
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x0 * self.linear(x) + x


class LowRankCross(nn.Module):
    """A mixture of low-rank experts (DCN-V2, arXiv 2008.13535, Section 3.1, equations 3 and 4).

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
        # V and U of all experts are concatenated, so that each needs only one matrix product.
        self.down = nn.Linear(size, num_experts * low_rank, bias=False)
        self.middle = nn.Parameter(torch.empty(num_experts, low_rank, low_rank))
        self.up = nn.Parameter(torch.empty(num_experts, size, low_rank))
        self.bias = nn.Parameter(torch.empty(size))
        self.gate = nn.Linear(size, num_experts)

    def init_parameters(self) -> None:
        """Initialises the bias and each expert's layers; called by the model that owns this module."""
        init.zeros_(self.bias)
        for layers in (self.middle, self.up):
            if not getattr(layers, "_is_hf_initialized", False):
                for layer in layers:
                    nn.init.xavier_uniform_(layer)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gates = self.gate(x).softmax(dim=-1)  # (B, experts)
        low = torch.tanh(self.down(x)).unflatten(-1, (self.num_experts, self.low_rank))  # (B, experts, rank)
        inner = gates.unsqueeze(-1) * torch.tanh(torch.einsum("ber,eor->beo", low, self.middle))  # (B, experts, rank)
        # Because the gates sum to one, x0 and the bias can be moved out of the sum, and one product covers all experts.
        up = self.up.transpose(0, 1).flatten(1)  # (size, experts * rank)
        return x0 * (F.linear(inner.flatten(1), up) + self.bias) + x


class GatedCross(nn.Module):
    """`x' = x0 ⊙ (W_c x + b) ⊙ sigmoid(W_g x) + x` (GDCN, arXiv 2311.04635, Section 3.1, equation 2).

    Shape:
        - inputs: float (B, size), float (B, size)
        - output: float (B, size)
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.gate = nn.Linear(size, size, bias=False)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x0 * self.linear(x) * torch.sigmoid(self.gate(x)) + x
