"""Rows of different lengths, held one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of each range, one range after the other, int64 (sum of lengths,).

    Args:
        starts: int64 (ranges,), where each range starts.
        lengths: int64 (ranges,), how long each is.
    """
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    result: np.ndarray = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return result


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths.

    Attributes:
        values: (sum of lengths,), the rows one after the other.
        lengths: int64 (rows,).
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Any] | pa.ChunkedArray) -> Self:
        """Of a sequence of rows, or of an Arrow column of lists."""
        if isinstance(rows, pa.ChunkedArray):
            lists = rows.combine_chunks()
            return cls(lists.flatten().to_numpy(), np.diff(lists.offsets.to_numpy()).astype(np.int64))
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows) if len(rows) else np.empty(0, dtype=np.int64), lengths)

    def padded(self, value: int, multiple_of: int = 1) -> np.ndarray:
        """As one int64 (rows, length), filled up with `value`.

        `length` is the longest row's, rounded up to a multiple of `multiple_of`.
        """
        longest = -(-int(self.lengths.max(initial=1)) // multiple_of) * multiple_of
        result = np.full((len(self.lengths), longest), value, dtype=np.int64)
        result[self.mask(longest)] = self.values
        return result

    def mask(self, length: int) -> np.ndarray:
        """Where rows padded to a length hold values of their own, bool (rows, length)."""
        result: np.ndarray = np.arange(length) < self.lengths[:, None]
        return result
