"""Rows of different lengths, held one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch


def padding_multiple() -> int:
    """What the length of a batch of texts is rounded up to: 8 suits an accelerator's matrix units; a CPU needs 2."""
    return 8 if torch.accelerator.is_available() else 2


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of each range, one range after the other, (sum of lengths,) of the starts' type.

    Args:
        starts: whole numbers (ranges,), where each range starts.
        lengths: int64 (ranges,), how long each is.
    """
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    result: np.ndarray = np.repeat((starts - (ends - lengths)).astype(starts.dtype), lengths)
    result += np.arange(total, dtype=starts.dtype)
    return result


class Growing:
    """Numbers in one row to which more are added; what was read before stays as it was.

    Args:
        dtype: their type.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self._held = np.empty(1024, dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """All of them, not copied."""
        return self._held[: self._size]

    def extend(self, values: Sequence[int] | np.ndarray) -> None:
        """Adds some at the end."""
        end = self._size + len(values)
        if end > len(self._held):
            held = np.empty(max(end, 2 * len(self._held)), dtype=self._held.dtype)
            held[: self._size] = self.values
            self._held = held
        self._held[self._size : end] = values
        self._size = end


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
            return cls(
                lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy()).astype(np.int64)
            )
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
