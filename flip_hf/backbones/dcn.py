"""DCN: Deep & Cross Network (Wang et al., ADKDD 2017, arXiv 1708.05123)."""

from collections.abc import Sequence

from flip_hf.backbones.cross_and_deep import CrossAndDeep
from flip_hf.nn.cross import VectorCross


class DCN(CrossAndDeep):
    """A cross network with one weight vector per layer, beside a deep network (Sections 2.2 to 2.4, equations 3, 6).

    Args:
        num_fields: number of fields.
        embedding_dim: width of a feature's embedding.
        hidden_sizes: widths of the deep network's layers.
        cross_layers: number of layers of the cross network.
        dropout: dropout in the deep network.
    """

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (256, 128),
        cross_layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        size = num_fields * embedding_dim
        super().__init__(size, (VectorCross(size) for _ in range(cross_layers)), hidden_sizes, dropout)
