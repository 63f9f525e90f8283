"""The feature table with its rows spread over the processes, for tables larger than one process holds."""

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

# What is drawn, sent and written at a time: 8 MB of rows of 32 single-precision numbers.
_BLOCK_ROWS = 1 << 16

_REQUESTED: ContextVar[bool] = ContextVar("sharded_features", default=False)


@contextmanager
def sharded_features(enabled: bool = True) -> Iterator[None]:
    """Of a feature table built or loaded inside, each process holds its own share of the rows.

    Processes work on batches of their own (data parallelism) and look each other's rows up. With one process, or where
    `enabled` is false, nothing changes. `torch.distributed` must be initialised before.
    """
    token = _REQUESTED.set(enabled)
    try:
        yield
    finally:
        _REQUESTED.reset(token)


def feature_embedding_class() -> type[FeatureEmbedding]:
    """The class of the feature tables that are built here and now."""
    return ShardedFeatureEmbedding if _REQUESTED.get() and is_distributed() else FeatureEmbedding


class ShardedFeatureEmbedding(FeatureEmbedding):
    """A feature table of which every process holds one block of consecutive rows.

    A lookup sends each distinct id to the process that owns its row and brings the row back, so all processes must
    look up equally often. Gradients travel the other way and are averaged over processes, like those of the parameters
    that DistributedDataParallel averages; that must leave `rows` alone.

    Arguments and shapes as in `FeatureEmbedding`.
    """

    def _allocate(self, num_features: int, width: int) -> None:
        self.num_features = num_features
        self.block_size = -(-num_features // dist.get_world_size())
        self.first, end = self.bounds(dist.get_rank())
        self.rows = nn.Parameter(torch.empty(end - self.first, width))

    def bounds(self, process: int) -> tuple[int, int]:
        """The first row that a process holds and the end of its rows."""
        first, end = (min(i * self.block_size, self.num_features) for i in (process, process + 1))
        return first, end

    def init_parameters(self) -> None:
        """Starts the rows unless they were loaded, as one process would start them."""
        if getattr(self.rows, "_is_hf_initialized", False):
            return
        end = self.first + len(self.rows)
        for start in range(0, self.num_features, _BLOCK_ROWS):
            # Every process draws the whole table and keeps its rows: so what is drawn next is the same everywhere.
            size = min(_BLOCK_ROWS, self.num_features - start)
            block = self.rows.new_zeros(size, self.rows.shape[1], requires_grad=False)
            nn.init.normal_(block[:, : self.embedding_dim], std=self.initializer_range)
            low, high = max(start, self.first), min(start + size, end)
            if low < high:
                self.rows.detach()[low - self.first : high - self.first] = block[low - start : high - start]
        if self.first == PADDING_ID:
            nn.init.zeros_(self.rows[PADDING_ID])

    def _lookup(self, feature_ids: torch.Tensor) -> torch.Tensor:
        # Sorted, so the ids that one process owns stand together.
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
        """Sends this process's rows to process 0, which must be in `all_rows`."""
        for start in range(0, len(self.rows), _BLOCK_ROWS):
            dist.send(self.rows.detach()[start : start + _BLOCK_ROWS], 0)

    def all_rows(self) -> Iterator[torch.Tensor]:
        """On process 0, the rows of the table in order, a block at a time; the others must be in `send_rows`."""
        yield from self.rows.detach().split(_BLOCK_ROWS)
        for process in range(1, dist.get_world_size()):
            first, end = self.bounds(process)
            for start in range(first, end, _BLOCK_ROWS):
                block = self.rows.new_empty(min(_BLOCK_ROWS, end - start), self.rows.shape[1], requires_grad=False)
                dist.recv(block, process)
                yield block


class _ExchangeRows(torch.autograd.Function):
    """Rows to the processes that asked for them, and their gradients back, averaged over processes."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, to_send: Sequence[int], to_receive: Sequence[int]) -> torch.Tensor:
        ctx.numbers = to_send, to_receive
        return _exchange(rows, to_send, to_receive)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        to_send, to_receive = ctx.numbers
        return _exchange(gradients[0], to_receive, to_send) / dist.get_world_size(), None, None


def _exchange(values: torch.Tensor, to_send: Sequence[int], to_receive: Sequence[int]) -> torch.Tensor:
    """Sends so many of the values to each process, in the order of their ranks; returns what the others sent."""
    received = values.new_empty(sum(to_receive), *values.shape[1:])
    dist.all_to_all_single(received, values.contiguous(), list(to_receive), list(to_send))
    return received
