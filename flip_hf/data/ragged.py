"""Rows of different lengths, stored in one array."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch


def padding_multiple() -> int:
    """Returns the multiple to which batches of texts are padded: 8 for an accelerator's matrix units, 2 on a CPU."""
    return 8 if torch.accelerator.is_available() else 2


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates ranges `start, start + 1, ...`; (sum of lengths,) with the dtype of `starts`.

    Args:
        starts: whole numbers (ranges,), the first number of each range.
        lengths: int64 (ranges,), the length of each range.
    """
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    result: np.ndarray = np.repeat((starts - (ends - lengths)).astype(starts.dtype), lengths)
    result += np.arange(total, dtype=starts.dtype)
    return result


class Growing:
    """Growable one-dimensional array. Arrays read earlier keep their values.

    Args:
        dtype: NumPy type of the numbers.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self._held = np.empty(1024, dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """All numbers, not copied."""
        return self._held[: self._size]

    def extend(self, values: Sequence[int] | np.ndarray) -> None:
        """Appends numbers."""
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
        values: (sum of lengths,), the concatenated rows.
        lengths: int64 (rows,).
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Any] | pa.ChunkedArray) -> Self:
        """Creates it from a sequence of rows or an Arrow column of lists."""
        if isinstance(rows, pa.ChunkedArray):
            lists = rows.combine_chunks()
            return cls(
                lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy()).astype(np.int64)
            )
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows) if len(rows) else np.empty(0, dtype=np.int64), lengths)

    def padded(self, value: int, multiple_of: int = 1) -> np.ndarray:
        """Pads the rows with `value` to int64 (rows, length).

        `length` is the longest row's, rounded up to a multiple of `multiple_of`.
        """
        longest = -(-int(self.lengths.max(initial=1)) // multiple_of) * multiple_of
        result = np.full((len(self.lengths), longest), value, dtype=np.int64)
        result[self.mask(longest)] = self.values
        return result

    def mask(self, length: int) -> np.ndarray:
        """Returns true where rows padded to `length` hold their own values, bool (rows, length)."""
        result: np.ndarray = np.arange(length) < self.lengths[:, None]
        return result
