"""AFN: adaptive factorization network (Cheng et al., AAAI 2020, arXiv 1909.03276)."""

from collections.abc import Sequence

import torch
from torch import nn

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP, BatchNorm

# Lower bound of absolute values before the logarithm, which diverges at zero.
_SMALLEST = 1e-7


class LogarithmicTransformation(nn.Module):
    """Logarithmic neurons: `y_j = exp(sum_i w_ij ln |e_i|)`, elementwise products of powers of the fields.

    The logarithms and the products are batch-normalised (Section 3.2, equations 5 to 7).

    Shape:
        - input: float (B, F, D)
        - output: float (B, D, num_neurons)
    """

    def __init__(self, num_fields: int, embedding_dim: int, num_neurons: int) -> None:
        super().__init__()
        self.input_norm = BatchNorm(embedding_dim)
        self.powers = nn.Linear(num_fields, num_neurons)
        self.output_norm = BatchNorm(embedding_dim)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        logarithms = embeddings.abs().clamp(min=_SMALLEST).log().transpose(1, 2)  # (B, D, F)
        products = self.powers(self.input_norm(logarithms)).exp()  # (B, D, neurons)
        normed: torch.Tensor = self.output_norm(products)
        return normed


class AFN(Backbone):
    """Learned orders of interaction: logarithmic neurons, then a deep network (Section 3, equation 8).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        num_neurons: number of logarithmic neurons.
        hidden_sizes: widths of the deep network's layers, which are batch-normalised.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        num_neurons: int = 128,
        hidden_sizes: Sequence[int] = (256, 128),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.logarithmic = LogarithmicTransformation(num_fields, embedding_dim, num_neurons)
        self.deep = MLP(embedding_dim * num_neurons, hidden_sizes, dropout, batch_norm=True)
        self.representation_size = self.deep.output_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        deep = self.deep(self.logarithmic(embeddings).flatten(1))
        return BackboneOutput(deep, self.output(deep).squeeze(-1))
