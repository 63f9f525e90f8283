"""Numeric fields, such as a price or an age."""

import logging

import numpy as np
import pyarrow as pa

from flip_hf.data.kinds.base import CountedFeatures, FeatureCounter, FeatureIndex, FieldKind, FieldValues
from flip_hf.data.schema import canonical_numbers
from flip_hf.fields import MISSING_OFFSET, NUM_RESERVED_FEATURES, FieldConfig

logger = logging.getLogger(__name__)

# Most distinct numbers that fitting holds. Beyond that, it merges neighbours until half of this number is left.
_MOST_NUMBERS = 1 << 20


class Numeric(FieldKind):
    """A number. Its feature is its bucket; the text shows the number itself.

    A bucket is named by its lower bound. The first bucket starts at minus infinity and the last one ends at infinity,
    so every finite number has a bucket.
    """

    column = "numbers"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        numbers, strings, flags = canonical_numbers(column, field.name, first_row=first_row, source=source)
        return FieldValues(strings, flags, numbers=numbers)

    def counter(self, field: FieldConfig) -> FeatureCounter:
        return NumberCounter(field)

    def index(self, field: FieldConfig, values: pa.Array) -> FeatureIndex:
        return NumberIndex(values.cast(pa.float64()).to_numpy())


class NumberCounter(FeatureCounter):
    """Counts numbers in bounded memory.

    Quantiles are exact for up to a million distinct numbers. Beyond that, neighbouring numbers are merged into groups
    of similar weight. Each merge moves a quantile by at most 1 / 500,000 of the rows counted so far.

    Args:
        field: the field, with `bucketing` and `num_buckets`.
    """

    def __init__(self, field: FieldConfig) -> None:
        self.field = field
        self._num_missing = 0
        self._numbers, self._counts = np.empty(0), np.empty(0, dtype=np.int64)
        self._new: list[np.ndarray] = []
        self._num_new = 0

    def add(self, values: FieldValues) -> None:
        assert values.numbers is not None
        numbers = values.numbers[~np.isnan(values.numbers)]
        self._num_missing += len(values.numbers) - len(numbers)
        self._new.append(numbers)
        self._num_new += len(numbers)
        if self._num_new >= _MOST_NUMBERS:
            self._merge()

    def _merge(self) -> None:
        numbers = np.concatenate([self._numbers, *self._new])
        counts = np.concatenate([self._counts, np.ones(self._num_new, dtype=np.int64)])
        self._new, self._num_new = [], 0
        self._numbers, places = np.unique(numbers, return_inverse=True)
        self._counts = np.bincount(places, weights=counts, minlength=len(self._numbers)).astype(np.int64)
        if len(self._numbers) > _MOST_NUMBERS:
            ends = self._counts.cumsum()
            groups = (ends - 1) * (_MOST_NUMBERS // 2) // ends[-1]
            last = np.append(np.flatnonzero(np.diff(groups)), len(groups) - 1)
            self._numbers, self._counts = self._numbers[last], np.diff(ends[last], prepend=0)

    def result(self) -> CountedFeatures:
        self._merge()
        bounds = np.unique(_BOUNDS[self.field.bucketing](self._numbers, self._counts, self.field.num_buckets))
        # No number lies below the smallest one.
        bounds = bounds[bounds > self._numbers[:1]] if len(bounds) else bounds
        if len(self._numbers) == 1:
            logger.warning(
                "field %r holds the number %s in every training row, which carries no information; drop the field",
                self.field.name,
                self._numbers[0],
            )
        places = np.searchsorted(bounds, self._numbers, side="right")
        counts = np.bincount(places, weights=self._counts, minlength=len(bounds) + 1).astype(np.int64)
        values = pa.array([repr(float(bound)) for bound in (-np.inf, *bounds)], pa.string())
        return CountedFeatures(values, counts, 0, self._num_missing)


class NumberIndex(FeatureIndex):
    """Finds the bucket of a number.

    Args:
        lower_bounds: float64 (buckets,), ascending; the first is minus infinity.
    """

    def __init__(self, lower_bounds: np.ndarray) -> None:
        if lower_bounds[0] != -np.inf or not (np.diff(lower_bounds) > 0).all():
            raise ValueError(f"the buckets' lower bounds must ascend from minus infinity; got {lower_bounds}")
        self._bounds = lower_bounds[1:]

    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        assert values.numbers is not None
        places = NUM_RESERVED_FEATURES + np.searchsorted(self._bounds, values.numbers, side="right")
        return np.where(np.isnan(values.numbers), MISSING_OFFSET, places)


def _quantile_bounds(numbers: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns lower bounds of buckets with equally many rows, as far as ties allow; none if there are no numbers."""
    if len(numbers) == 0:
        return numbers
    ends = counts.cumsum()
    ranks = ends[-1] * np.arange(1, num_buckets) / num_buckets
    bounds: np.ndarray = numbers[np.searchsorted(ends, ranks, side="right")]
    return bounds


def _log_bounds(numbers: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns lower bounds with equal ratios between the smallest and largest magnitude, mirrored for negative ones."""
    sizes = np.abs(numbers[numbers != 0])
    if len(sizes) == 0:
        return np.empty(0)
    signs = [sign for sign, there in ((-1, numbers[0] < 0), (1, numbers[-1] > 0)) if there]
    steps = np.geomspace(sizes.min(), sizes.max(), max(num_buckets // len(signs) - 1, 1))
    # Zero starts a bucket of its own if there are negative numbers.
    return np.concatenate([*(sign * steps for sign in signs), [0.0] if numbers[0] < 0 else []])


_BOUNDS = {"quantile": _quantile_bounds, "log": _log_bounds}
