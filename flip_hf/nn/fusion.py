"""How the two towers' logits become one."""

import torch
from torch import nn
from transformers import initialization as init


class LearnedWeightFusion(nn.Module):
    """`a * id_logits + (1 - a) * text_logits` with one learned weight `a` (FLIP, Section 3.4).

    Shape:
        - inputs: float (B,), float (B,)
        - output: float (B,)
    """

    INITIAL_WEIGHT = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.id_weight = nn.Parameter(torch.empty(()))

    def init_parameters(self) -> None:
        """Starts the weight; called by the model that owns this module."""
        init.constant_(self.id_weight, self.INITIAL_WEIGHT)

    def forward(self, id_logits: torch.Tensor, text_logits: torch.Tensor) -> torch.Tensor:
        return self.id_weight * id_logits + (1 - self.id_weight) * text_logits
