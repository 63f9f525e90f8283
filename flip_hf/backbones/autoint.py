"""AutoInt: self-attention between fields (Song et al., CIKM 2019, arXiv 1810.11921)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class InteractingLayer(nn.Module):
    """Multi-head self-attention between fields with a projected residual (Section 4.3, equations 5 to 8).

    Shape:
        - input: float (B, F, input_size)
        - output: float (B, F, output_size)
    """

    def __init__(self, input_size: int, output_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(input_size, output_size, bias=False)
        self.key = nn.Linear(input_size, output_size, bias=False)
        self.value = nn.Linear(input_size, output_size, bias=False)
        self.residual = nn.Linear(input_size, output_size, bias=False)

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(fields).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, F, size / heads)
            for project in (self.query, self.key, self.value)
        )
        # As in the paper, the inner products are not scaled.
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return F.relu(attended.transpose(1, 2).flatten(-2) + self.residual(fields))


class AutoInt(Backbone):
    """Interacting layers (AutoInt), with a deep network beside them (AutoInt+, Section 5.5).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers; empty for AutoInt without a deep network.
        attention_layers: number of interacting layers.
        attention_size: width of a field's vector after each layer, all heads together; by default the embedding's.
        num_heads: attention heads of each layer.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        attention_layers: int = 3,
        attention_size: int | None = None,
        num_heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        size = embedding_dim if attention_size is None else attention_size
        if size % num_heads:
            raise ValueError(
                f"backbone 'autoint': num_heads={num_heads} does not divide the width {size}; set attention_size"
            )
        inputs = [embedding_dim] + [size] * (attention_layers - 1)
        self.attention = nn.Sequential(*(InteractingLayer(i, size, num_heads) for i in inputs))
        self.deep = MLP(num_fields * embedding_dim, hidden_sizes, dropout) if hidden_sizes else None
        self.representation_size = num_fields * size + (self.deep.output_size if self.deep is not None else 0)
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        representation = self.attention(embeddings).flatten(1)  # (B, F * size)
        if self.deep is not None:
            representation = torch.cat([representation, self.deep(embeddings.flatten(1))], dim=-1)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
