"""Dropout whose random numbers cost an eighth of torch's on a CPU."""

import torch
from torch import nn

_CHANCES = 256


class ByteDropout(nn.Dropout):
    """Dropout that decides by one random byte an element.

    On a CPU torch draws a number of 32 bits for each element on one thread, which was a seventh of a pretraining
    step. Here a drawn number of 64 bits decides for eight elements, so the probability is a multiple of 1/256 (0.1 is
    0.1016), and what is kept is scaled up by just that. On other devices, where p is 0 or 1, and in compiled code this
    is `nn.Dropout`; a p below 1/512 drops nothing.

    Arguments and shapes as in `nn.Dropout`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * _CHANCES)
        is_plain = not self.training or input.device.type != "cpu" or torch.compiler.is_compiling()
        if is_plain or self.p in (0, 1) or dropped == _CHANCES:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 8), dtype=torch.int64).random_(-(1 << 63), None)
        kept = words.view(torch.uint8)[: input.numel()].view(input.shape) >= dropped
        return input * kept.to(input.dtype).mul_(_CHANCES / (_CHANCES - dropped))
