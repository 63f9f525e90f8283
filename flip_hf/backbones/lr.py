"""Logistic regression (Richardson et al., WWW 2007, Section 4)."""

import torch

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import FirstOrder


class LR(Backbone):
    """A bias and one weight a feature, summed: the click model that all others are measured against.

    The weight of a feature is the last column of its row in the feature table; the embedding is not read. The
    representation is the fields' weights.

    Args:
        num_fields: fields of a row.
        embedding_dim: width of a feature's embedding.
    """

    extra_dim = 1
    logit_module = "first_order"

    def __init__(self, num_fields: int, embedding_dim: int) -> None:
        super().__init__()
        self.first_order = FirstOrder()
        self.representation_size = num_fields

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        weights = embeddings[..., -1]  # (B, F)
        return BackboneOutput(weights, self.first_order(weights))
