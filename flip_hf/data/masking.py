"""Draws the masked fields of a row, as a pure function of (seed, epoch, row number)."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): mixes the bits of uint64 numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, epoch: int, rows: np.ndarray, stream: int, size: int) -> np.ndarray:
    """Draws numbers in [0, 1) that depend only on the arguments, float64 (rows, size).

    Args:
        seed: the run's seed.
        epoch: the epoch's number.
        rows: int64 (rows,), row numbers.
        stream: the purpose of the numbers; different streams are independent.
        size: how many numbers to draw per row.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(0)
        for part in (seed, epoch, stream):
            key = _mix(np.atleast_1d(key + _GOLDEN + np.uint64(part % (1 << 64))))[0]
        by_row = _mix(key + _GOLDEN * (rows.astype(np.uint64) + np.uint64(1)))
        bits = _mix(by_row[:, None] + _GOLDEN * np.arange(1, size + 1, dtype=np.uint64))
    numbers: np.ndarray = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def masked_fields(seed: int, epoch: int, rows: np.ndarray, num_fields: int, ratio: float, stream: int) -> np.ndarray:
    """Draws the masked fields of each row without replacement, bool (rows, num_fields).

    Each row masks `ratio * num_fields` fields, but at least one. A fraction is rounded up or down at random, so that
    the average is exact.
    """
    numbers = uniform(seed, epoch, rows, stream, num_fields + 1)
    how_many = np.maximum(np.floor(ratio * num_fields + numbers[:, :1]), 1)
    ranks = numbers[:, 1:].argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    chosen: np.ndarray = ranks < how_many
    return chosen
