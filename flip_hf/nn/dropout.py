"""Dropout that draws an eighth of torch's random numbers on a CPU."""

import torch
from torch import nn

_CHANCES = 256


class ByteDropout(nn.Dropout):
    """Dropout that uses one random byte per element.

    On a CPU, torch draws a 32-bit number for each element on a single thread, which took a seventh of a pretraining
    step. This class draws one 64-bit number for eight elements. The probability is therefore a multiple of 1/256 (0.1
    becomes 0.1016), and the kept elements are scaled accordingly; a p below 1/512 drops nothing. On other devices, for
    p of 0 or 1, and in compiled code it is the same as `nn.Dropout`.

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
