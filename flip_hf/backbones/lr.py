"""Logistic regression (Richardson et al., WWW 2007, Section 4)."""

import torch

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import FirstOrder


class LR(Backbone):
    """The sum of a bias and one weight per feature: the baseline of all other models.

    The weight of a feature is the last column of its row in the feature table; the embedding is ignored. The
    representation consists of the fields' weights.

    Args:
        num_fields: number of fields.
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
