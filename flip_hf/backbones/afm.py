"""AFM: attentional factorization machine (Xiao et al., IJCAI 2017, arXiv 1708.04617)."""

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import FirstOrder, pairs_of_fields


class AFM(Backbone):
    """Products of all pairs of fields, weighted by attention (Sections 3.1 and 3.2, equations 3 to 6).

    The first-order weight of a feature is the last column of its row in the feature table. The representation is the
    weighted sum over the pairs.

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        attention_size: width of the attention network.
        dropout: dropout of the weighted sum.
    """

    extra_dim = 1
    logit_module = "first_order"

    def __init__(self, num_fields: int, embedding_dim: int, attention_size: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.pairs = pairs_of_fields(num_fields)
        self.attention = nn.Linear(embedding_dim, attention_size)
        self.attention_score = nn.Linear(attention_size, 1, bias=False)
        self.first_order = FirstOrder()
        self.dropout = nn.Dropout(dropout)
        self.representation_size = embedding_dim
        self.output = nn.Linear(embedding_dim, 1, bias=False)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        vectors, first_order = embeddings[..., :-1], embeddings[..., -1]  # (B, F, D), (B, F)
        left, right = self.pairs
        products = vectors[:, left] * vectors[:, right]  # (B, pairs, D)
        weights = self.attention_score(F.relu(self.attention(products))).softmax(dim=1)  # (B, pairs, 1)
        pooled = self.dropout((weights * products).sum(dim=1))  # (B, D)
        return BackboneOutput(pooled, self.first_order(first_order) + self.output(pooled).squeeze(-1))
