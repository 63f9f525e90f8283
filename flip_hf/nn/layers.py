"""Layers that several backbones and heads use."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from flip_hf.nn.dropout import ByteDropout


def pairs_of_fields(num_fields: int) -> tuple[list[int], list[int]]:
    """Indices of the first and of the second field of every pair, in the order (0, 1), (0, 2), ..., (1, 2), ...

    Raises:
        ValueError: there are fewer than two fields.
    """
    if num_fields < 2:
        raise ValueError(f"interactions of pairs need at least 2 fields; got {num_fields}")
    pairs = list(combinations(range(num_fields), 2))
    return [i for i, _ in pairs], [j for _, j in pairs]


class FirstOrder(nn.Module):
    """A bias and the sum of the fields' first-order weights.

    Shape:
        - input: float (B, F)
        - output: float (B,)
    """

    def __init__(self) -> None:
        super().__init__()
        # Not a scalar, because FSDP2 can't shard scalars.
        self.bias = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        """Initialises the bias; called by the model that owns this module."""
        init.zeros_(self.bias)

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.sum(dim=1) + self.bias


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that can also train on a batch of one row.

    A single value per channel has no variance, so `nn.BatchNorm1d` raises an error in training. This class normalises
    such a batch, often the last of an epoch, by the running statistics, and does not update them.

    Shape:
        - input: float (B, C) or (B, C, L)
        - output: the same
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.shape[0] * input.shape[2:].numel() == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class MLP(nn.Sequential):
    """A multi-layer perceptron: linear, optional batch normalisation, ReLU and dropout for each hidden size.

    Shape:
        - input: float (..., input_size)
        - output: float (..., hidden_sizes[-1])
    """

    def __init__(
        self, input_size: int, hidden_sizes: Sequence[int], dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for hidden_size in hidden_sizes:
            norm = [BatchNorm(hidden_size)] if batch_norm else []
            layers += [nn.Linear(input_size, hidden_size), *norm, nn.ReLU(), ByteDropout(dropout)]
            input_size = hidden_size
        super().__init__(*layers)
        self.output_size = input_size


class FactorizationMachine(nn.Module):
    """Second-order interactions of all pairs of fields, summed over pairs but not over dimensions.

    `0.5 * ((sum_f e_f)^2 - sum_f e_f^2)`, the bi-interaction pooling. Its sum over dimensions is the second-order term
    of a factorization machine (Rendle, ICDM 2010, Lemma 3.1).

    Shape:
        - input: float (B, F, D)
        - output: float (B, D)
    """

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        square_of_sum = embeddings.sum(dim=1).square()  # (B, D)
        sum_of_squares = embeddings.square().sum(dim=1)  # (B, D)
        return 0.5 * (square_of_sum - sum_of_squares)
