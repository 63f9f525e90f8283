"""Fusion of the two towers' logits into one."""

import torch
from torch import nn
from transformers import initialization as init

_EQUAL_SHARES = 0.5


class LearnedWeightFusion(nn.Module):
    """`a * id_logits + (1 - a) * text_logits` with one learned weight `a` (FLIP, Section 3.4).

    Args:
        num_fields: number of fields of the tabular view.

    Shape:
        - inputs: float (B,), float (B,), float (B, num_fields), which is ignored
        - output: float (B,)
    """

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        # Not a scalar, because FSDP2 can't shard scalars.
        self.id_weight = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        """Initialises the weight to equal shares; called by the model that owns this module."""
        init.constant_(self.id_weight, _EQUAL_SHARES)

    def forward(self, id_logits: torch.Tensor, text_logits: torch.Tensor, oov_fractions: torch.Tensor) -> torch.Tensor:
        return self.id_weight * id_logits + (1 - self.id_weight) * text_logits


class GatedFusion(nn.Module):
    """`g * id_logits + (1 - g) * text_logits`, where the gate `g` depends on which fields are OOV.

    `g = sigmoid(w · oov_fractions + b)` for each row, so the text gets more weight in rows with unseen features. The
    gate can learn this only from rows with OOV features: training rows with `oov_dropout` (see `FlipCTRCollator`), or
    validation rows (`fusion_rows`).

    Args:
        num_fields: number of fields of the tabular view.

    Shape:
        - inputs: float (B,), float (B,), float (B, num_fields), the fraction of each field's features that are OOV
        - output: float (B,)
    """

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.oov_weights = nn.Parameter(torch.empty(num_fields))
        self.bias = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        """Initialises the gate to equal shares; called by the model that owns this module."""
        init.zeros_(self.oov_weights)
        init.zeros_(self.bias)

    def forward(self, id_logits: torch.Tensor, text_logits: torch.Tensor, oov_fractions: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(oov_fractions.to(self.oov_weights.dtype) @ self.oov_weights + self.bias)  # (B,)
        return gate * id_logits + (1 - gate) * text_logits


FUSION: dict[str, type[LearnedWeightFusion] | type[GatedFusion]] = {
    "learned_weight": LearnedWeightFusion,
    "gated": GatedFusion,
}
