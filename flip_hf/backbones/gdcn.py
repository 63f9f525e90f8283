"""GDCN: Gated Deep & Cross Network (Wang et al., CIKM 2023, arXiv 2311.04635)."""

from collections.abc import Sequence

from flip_hf.backbones.cross_and_deep import CrossAndDeep
from flip_hf.nn.cross import GatedCross


class GDCN(CrossAndDeep):
    """A cross network with gated interactions, and a deep network beside or after it (Section 3, equation 2).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        cross_layers: number of layers of the cross network.
        structure: `"parallel"` (GDCN-P), or `"stacked"` (GDCN-S), in which the deep network reads the cross network's
            output.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        structure: str = "parallel",
        dropout: float = 0.1,
    ) -> None:
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"backbone 'gdcn': structure={structure!r} is not one of parallel, stacked")
        size = num_fields * embedding_dim
        layers = (GatedCross(size) for _ in range(cross_layers))
        super().__init__(size, layers, hidden_sizes, dropout, stacked=structure == "stacked")
