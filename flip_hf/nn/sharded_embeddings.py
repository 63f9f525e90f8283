"""A feature table whose rows are sharded over processes, for tables larger than one process can hold."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from flip_hf.fields import PADDING_ID
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.gather import is_distributed

# Rows that are initialised, sent and written at a time: 8 MB for rows of 32 single-precision numbers.
_BLOCK_ROWS = 1 << 16

_REQUESTED: ContextVar[bool] = ContextVar("sharded_features", default=False)


@contextmanager
def sharded_features(enabled: bool = True) -> Iterator[None]:
    """Context manager in which feature tables are built or loaded in shards: each process holds its share of the rows.

    Processes work on different batches (data parallelism) and look up each other's rows. With one process, or if
    `enabled` is false, nothing changes. `torch.distributed` must be initialised first.

    Args:
        enabled: whether to shard.
    """
    token = _REQUESTED.set(enabled)
    try:
        yield
    finally:
        _REQUESTED.reset(token)


def feature_embedding_class() -> type[FeatureEmbedding]:
    """The class of feature tables in the current context."""
    return ShardedFeatureEmbedding if _REQUESTED.get() and is_distributed() else FeatureEmbedding


class ShardedFeatureEmbedding(FeatureEmbedding):
    """A feature table of which every process holds one block of consecutive rows.

    A lookup sends each distinct id to the process that owns its row, and receives the row. All processes must therefore
    make the same number of lookups. Gradients go the opposite way and are averaged over processes, as
    DistributedDataParallel does for other parameters; exclude `rows` from DistributedDataParallel.

    Arguments and shapes as in `FeatureEmbedding`.
    """

    def _allocate(self, num_features: int, width: int) -> None:
        self.num_features = num_features
        self.block_size = -(-num_features // dist.get_world_size())
        self.first, end = self.bounds(dist.get_rank())
        self.rows = nn.Parameter(torch.empty(end - self.first, width))

    def bounds(self, process: int) -> tuple[int, int]:
        """The range (first, end) of the rows that a process holds."""
        first, end = (min(i * self.block_size, self.num_features) for i in (process, process + 1))
        return first, end

    def init_parameters(self) -> None:
        """Initialises the rows, unless they were loaded, with the same values as a single process would."""
        if getattr(self.rows, "_is_hf_initialized", False):
            return
        end = self.first + len(self.rows)
        for start in range(0, self.num_features, _BLOCK_ROWS):
            # Every process draws the whole table and keeps its rows, so the random state stays the same everywhere.
            size = min(_BLOCK_ROWS, self.num_features - start)
            block = self.rows.new_zeros(size, self.rows.shape[1], requires_grad=False)
            nn.init.normal_(block[:, : self.embedding_dim], std=self.initializer_range)
            low, high = max(start, self.first), min(start + size, end)
            if low < high:
                self.rows.detach()[low - self.first : high - self.first] = block[low - start : high - start]
        if self.first == PADDING_ID:
            nn.init.zeros_(self.rows[PADDING_ID])

    def _lookup(self, feature_ids: torch.Tensor) -> torch.Tensor:
        # unique sorts, so the ids that one process owns are adjacent.
        wanted, places = torch.unique(feature_ids, return_inverse=True)
        firsts = torch.arange(1, dist.get_world_size(), device=wanted.device) * self.block_size
        ends = torch.searchsorted(wanted, firsts)
        asked = torch.diff(ends, prepend=ends.new_zeros(1), append=ends.new_full((1,), len(wanted)))
        offered = torch.empty_like(asked)
        dist.all_to_all_single(offered, asked)
        to_ask, to_offer = asked.tolist(), offered.tolist()
        requests = _exchange(wanted, to_ask, to_offer) - self.first
        padding = PADDING_ID if self.first == PADDING_ID else None
        rows = F.embedding(requests, self.rows, padding_idx=padding, sparse=self.sparse)
        found: torch.Tensor = _ExchangeRows.apply(rows, to_offer, to_ask)  # (wanted ids, E)
        return F.embedding(places, found)

    def send_rows(self) -> None:
        """Sends this process's rows to process 0, which must be running `all_rows`."""
        for start in range(0, len(self.rows), _BLOCK_ROWS):
            dist.send(self.rows.detach()[start : start + _BLOCK_ROWS], 0)

    def all_rows(self) -> Iterator[torch.Tensor]:
        """On process 0, yields the rows of the table in order, in blocks; the others must be running `send_rows`."""
        yield from self.rows.detach().split(_BLOCK_ROWS)
        for process in range(1, dist.get_world_size()):
            first, end = self.bounds(process)
            for start in range(first, end, _BLOCK_ROWS):
                block = self.rows.new_empty(min(_BLOCK_ROWS, end - start), self.rows.shape[1], requires_grad=False)
                dist.recv(block, process)
                yield block


class _ExchangeRows(torch.autograd.Function):
    """Sends rows to the processes that asked for them, and averages their gradients over processes on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, to_send: Sequence[int], to_receive: Sequence[int]) -> torch.Tensor:
        ctx.numbers = to_send, to_receive
        return _exchange(rows, to_send, to_receive)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        to_send, to_receive = ctx.numbers
        return _exchange(gradients[0], to_receive, to_send) / dist.get_world_size(), None, None


def _exchange(values: torch.Tensor, to_send: Sequence[int], to_receive: Sequence[int]) -> torch.Tensor:
    """Sends each process its number of values, in the order of the ranks, and returns the values received."""
    received = values.new_empty(sum(to_receive), *values.shape[1:])
    dist.all_to_all_single(received, values.contiguous(), list(to_receive), list(to_send))
    return received
