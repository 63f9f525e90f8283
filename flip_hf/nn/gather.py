"""Rows of all processes, with gradients that flow back to the process that made them."""

from typing import Any

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        # Every process's loss reads these rows, so their gradient is the sum over processes, not the local part.
        (gradient,) = gradients
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates `rows` of all processes in the order of their ranks; with one process, returns them as they are.

    Every process must hold the same number of rows. Gradients reach all processes' rows.

    Shape:
        - input: (B, ...)
        - output: (B * processes, ...)
    """
    if not is_distributed():
        return rows
    if rows.requires_grad:
        output: torch.Tensor = _Gather.apply(rows)
        return output
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def rank() -> int:
    """This process's place among all, 0 with one process."""
    return dist.get_rank() if is_distributed() else 0
