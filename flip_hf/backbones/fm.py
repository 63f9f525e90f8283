"""Factorization machine (Rendle, ICDM 2010)."""

import torch

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import FactorizationMachine, FirstOrder


class FM(Backbone):
    """First-order weights and the inner products of all pairs of fields (Section III, equation 1).

    The first-order weight of a feature is the last column of its row in the feature table. The representation is the
    sum of the pairs' elementwise products, float (B, embedding_dim).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
    """

    extra_dim = 1
    logit_module = "first_order"

    def __init__(self, num_fields: int, embedding_dim: int) -> None:
        super().__init__()
        self.first_order = FirstOrder()
        self.second_order = FactorizationMachine()
        self.representation_size = embedding_dim

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        second_order = self.second_order(embeddings[..., :-1])  # (B, D)
        logits = self.first_order(embeddings[..., -1]) + second_order.sum(dim=-1)
        return BackboneOutput(second_order, logits)
