"""Gathers rows of all processes, with gradients that flow back to their owners."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F


def row_counts(num_rows: int, device: torch.device) -> list[int]:
    """The number of rows on each process, in the order of the ranks; `[num_rows]` with one process."""
    if not is_distributed():
        return [num_rows]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = num_rows
    dist.all_reduce(counts)
    return [int(n) for n in counts.tolist()]


def first_row(counts: Sequence[int]) -> int:
    """The index of this process's first row among the rows of all processes."""
    return sum(counts[: dist.get_rank()]) if is_distributed() else 0


def gather_rows(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Concatenates `rows` of all processes in the order of the ranks; with one process, returns them unchanged.

    Gradients reach the rows of all processes.

    Args:
        rows: (rows of this process, ...).
        counts: from `row_counts`.

    Returns:
        (sum of counts, ...).
    """
    return rows if len(counts) == 1 else _Gather.apply(rows, counts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        ctx.first, ctx.num_rows = first_row(counts), len(rows)
        # all_gather needs tensors of equal size.
        padding = [0, 0] * (rows.ndim - 1) + [0, max(counts) - len(rows)]
        sent = F.pad(rows, padding).contiguous()
        gathered = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(gathered, sent)
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The loss of every process depends on these rows, so their gradient is the sum over processes.
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.num_rows], None


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
