"""How the two towers' logits become one."""

import torch
from torch import nn
from transformers import initialization as init

_EQUAL_SHARES = 0.5


class LearnedWeightFusion(nn.Module):
    """`a * id_logits + (1 - a) * text_logits` with one learned weight `a` (FLIP, Section 3.4).

    Args:
        num_fields: fields of the tabular view.

    Shape:
        - inputs: float (B,), float (B,), float (B, num_fields), which is not read
        - output: float (B,)
    """

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        # Not a scalar: FSDP2 shards none.
        self.id_weight = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        """Starts with equal shares; called by the model that owns this module."""
        init.constant_(self.id_weight, _EQUAL_SHARES)

    def forward(self, id_logits: torch.Tensor, text_logits: torch.Tensor, oov_fractions: torch.Tensor) -> torch.Tensor:
        return self.id_weight * id_logits + (1 - self.id_weight) * text_logits


class GatedFusion(nn.Module):
    """`g * id_logits + (1 - g) * text_logits`, where the gate `g` sees which fields are OOV.

    `g = sigmoid(w · oov_fractions + b)` for each row, so a field whose feature was never trained can hand the row to
    the text. The gate learns that only where training holds OOV features: see `FlipCTRCollator`'s `oov_dropout`.

    Args:
        num_fields: fields of the tabular view.

    Shape:
        - inputs: float (B,), float (B,), float (B, num_fields), the fraction of each field's features that are OOV
        - output: float (B,)
    """

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.oov_weights = nn.Parameter(torch.empty(num_fields))
        self.bias = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        """Starts with equal shares; called by the model that owns this module."""
        init.zeros_(self.oov_weights)
        init.zeros_(self.bias)

    def forward(self, id_logits: torch.Tensor, text_logits: torch.Tensor, oov_fractions: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(oov_fractions.to(self.oov_weights.dtype) @ self.oov_weights + self.bias)  # (B,)
        return gate * id_logits + (1 - gate) * text_logits


FUSION: dict[str, type[LearnedWeightFusion] | type[GatedFusion]] = {
    "learned_weight": LearnedWeightFusion,
    "gated": GatedFusion,
}
