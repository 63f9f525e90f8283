"""MaskNet: instance-guided masks (Wang et al., DLP-KDD 2021, arXiv 2102.07619)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.nn.layers import MLP


class MaskBlock(nn.Module):
    """`relu(LN(W (mask(embeddings) ⊙ x)))` (Sections 3.2 and 3.3, equations 6-11).

    The mask is computed from the row's embeddings.

    Shape:
        - inputs: float (B, embedding_size), float (B, input_size)
        - output: float (B, output_size)
    """

    def __init__(self, embedding_size: int, input_size: int, output_size: int, reduction: float) -> None:
        super().__init__()
        hidden_size = max(1, round(embedding_size * reduction))
        self.mask = nn.Sequential(nn.Linear(embedding_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, input_size))
        self.linear = nn.Linear(input_size, output_size, bias=False)
        self.norm = nn.LayerNorm(output_size)

    def forward(self, embeddings: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.linear(self.mask(embeddings) * x)))


class MaskNet(Backbone):
    """Mask blocks over the layer-normalised embeddings, in parallel or in series (Section 3.4).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        structure: `"parallel"`, blocks side by side and then a deep network, or `"serial"`, in which each block masks
            the output of the previous one.
        num_blocks: number of mask blocks.
        block_size: width of a block's output.
        reduction: width of a mask's hidden layer, as a multiple of the embeddings' total width.
        hidden_sizes: widths of the deep network's layers, for the parallel structure.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        structure: str = "parallel",
        num_blocks: int = 3,
        block_size: int = 64,
        reduction: float = 0.8,
        hidden_sizes: Sequence[int] = (256, 128),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "serial"):
            raise ValueError(f"backbone 'masknet': structure={structure!r} is not one of parallel, serial")
        size = num_fields * embedding_dim
        parallel = structure == "parallel"
        inputs = [size] * num_blocks if parallel else [size] + [block_size] * (num_blocks - 1)
        self.field_norm = nn.ModuleList(nn.LayerNorm(embedding_dim) for _ in range(num_fields))
        self.blocks = nn.ModuleList(MaskBlock(size, i, block_size, reduction) for i in inputs)
        self.deep = MLP(num_blocks * block_size, hidden_sizes, dropout) if parallel else None
        self.representation_size = self.deep.output_size if self.deep is not None else block_size
        self.output = nn.Linear(self.representation_size, 1)

    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        guide = embeddings.flatten(1)  # (B, size)
        normed = torch.cat([norm(embeddings[:, i]) for i, norm in enumerate(self.field_norm)], dim=-1)  # (B, size)
        if self.deep is not None:
            representation = self.deep(torch.cat([block(guide, normed) for block in self.blocks], dim=-1))
        else:
            representation = normed
            for block in self.blocks:
                representation = block(guide, representation)
        return BackboneOutput(representation, self.output(representation).squeeze(-1))
