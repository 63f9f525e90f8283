"""Rows of different lengths, held one after the other."""

import numpy as np


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
