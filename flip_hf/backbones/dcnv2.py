"""DCN-V2: Improved Deep & Cross Network (Wang et al., WWW 2021, arXiv 2008.13535)."""

from collections.abc import Sequence

from flip_hf.backbones.cross_and_deep import CrossAndDeep
from flip_hf.nn.cross import LowRankCross, MatrixCross


class DCNv2(CrossAndDeep):
    """The parallel structure of DCN-V2: cross network and deep network, concatenated (Section 3, Figure 1).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        cross_layers: number of layers of the cross network.
        cross: `"mixture"`, low-rank experts (Section 3.1, equations 3 and 4), or `"matrix"`, one full matrix per layer
            (equation 1).
        low_rank: rank of each expert of a mixture.
        num_experts: number of experts of each layer of a mixture.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        cross: str = "mixture",
        low_rank: int = 32,
        num_experts: int = 4,
        dropout: float = 0.1,
    ) -> None:
        if cross not in ("mixture", "matrix"):
            raise ValueError(f"backbone 'dcnv2': cross={cross!r} is not one of mixture, matrix")
        size = num_fields * embedding_dim
        layers = (
            MatrixCross(size) if cross == "matrix" else LowRankCross(size, low_rank, num_experts)
            for _ in range(cross_layers)
        )
        super().__init__(size, layers, hidden_sizes, dropout)
