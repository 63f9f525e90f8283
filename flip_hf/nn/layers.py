"""Layers that more than one backbone or head is made of."""

from collections.abc import Sequence

import torch
from torch import nn


class MLP(nn.Sequential):
    """Linear, ReLU and dropout, once for each hidden size.

    Shape:
        - input: float (..., input_size)
        - output: float (..., hidden_sizes[-1])
    """

    def __init__(self, input_size: int, hidden_sizes: Sequence[int], dropout: float = 0.0) -> None:
        layers: list[nn.Module] = []
        for hidden_size in hidden_sizes:
            layers += [nn.Linear(input_size, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
            input_size = hidden_size
        super().__init__(*layers)
        self.output_size = input_size


class FactorizationMachine(nn.Module):
    """Second-order interactions of all pairs of fields, summed over pairs but not over dimensions.

    `0.5 * ((sum_f e_f)^2 - sum_f e_f^2)`: the bi-interaction pooling whose sum over dimensions is the second-order
    term of a factorization machine (Rendle, ICDM 2010, Lemma 3.1).

    Shape:
        - input: float (B, F, D)
        - output: float (B, D)
    """

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        square_of_sum = embeddings.sum(dim=1).square()  # (B, D)
        sum_of_squares = embeddings.square().sum(dim=1)  # (B, D)
        return 0.5 * (square_of_sum - sum_of_squares)
