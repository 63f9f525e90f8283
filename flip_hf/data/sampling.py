"""Decides the order in which rows are read."""

from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Sampler

# Number of batches that are sorted together: enough for rows of similar length, few enough to stay random.
_BATCHES_IN_A_GROUP = 50


def text_lengths(encoded: datasets.Dataset | pa.Table) -> np.ndarray:
    """Returns the number of tokens of each row, int64 (rows,).

    Args:
        encoded: the output of `FlipProcessor.encode` or `encode_dataset`.
    """
    if isinstance(encoded, datasets.Dataset):
        encoded = encoded.with_format("arrow").select_columns(["input_ids"])[:]
    chunks = encoded["input_ids"].chunks
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks]).astype(np.int64)


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches rows of similar length, in an order that depends only on the seed and the epoch.

    Rows are shuffled and cut into batches whose sizes differ by at most one, so no small batch is left over. Each group
    of 50 batches is sorted by length, and then the batches are shuffled. If several processes train, each takes its
    share of every batch. Every row is read once per epoch.

    Args:
        lengths: int (rows,), number of tokens of each row.
        batch_size: maximum number of rows of a batch per process. With several processes, a batch size of 1 becomes 2
            if a process would otherwise have no row.
        seed: the run's seed.
        num_processes: number of processes that share the batches.
        process_index: index of this process.

    Raises:
        ValueError: there are fewer rows than processes.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, seed: int, num_processes: int = 1, process_index: int = 0
    ) -> None:
        if len(lengths) < num_processes:
            raise ValueError(f"{len(lengths)} rows can't be shared by {num_processes} processes; use fewer processes")
        self.lengths = lengths
        # Every batch must have at least one row per process.
        self.num_batches = min(-(-len(lengths) // (batch_size * num_processes)), len(lengths) // num_processes)
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Sets the epoch of the next pass, and the batch that it starts with."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        # RandomState's stream is the same in every numpy version (NEP 19).
        random = np.random.RandomState([self.seed % (1 << 32), self.epoch])
        order = random.permutation(len(self.lengths))
        ends = np.arange(1, self.num_batches + 1) * len(order) // self.num_batches
        for group in np.split(order, ends[_BATCHES_IN_A_GROUP - 1 : -1 : _BATCHES_IN_A_GROUP]):
            group[:] = group[np.argsort(self.lengths[group], kind="stable")]
        batches = np.split(order, ends[:-1])
        for i in random.permutation(self.num_batches)[self.first_batch :]:
            yield batches[i][self.process_index :: self.num_processes].tolist()
