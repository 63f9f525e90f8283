"""The order in which rows are read."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

# Batches that are shuffled and then sorted together: enough for rows of like length, few enough to stay random.
_BATCHES_IN_A_GROUP = 50


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of rows of like length, in an order that depends on the seed and the epoch alone.

    Rows are shuffled, cut into groups of 50 batches, sorted by length within each group and cut into batches, and the
    batches are shuffled.

    Args:
        lengths: int (rows,), tokens of each row.
        batch_size: rows of a batch; the last may be smaller.
        seed: the run's seed.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = False
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is in this epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # RandomState's stream is the same in every numpy version (NEP 19).
        random = np.random.RandomState([self.seed % (1 << 32), self.epoch])
        order = random.permutation(len(self.lengths))
        size = _BATCHES_IN_A_GROUP * self.batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for i in random.permutation(len(batches)):
            yield batches[i].tolist()
