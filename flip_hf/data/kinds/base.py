"""Base classes for kinds of field: from raw columns to features and text."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.tables import Contents
from flip_hf.fields import FieldConfig


@dataclass(frozen=True)
class FieldValues:
    """A field's values in a batch of rows.

    Attributes:
        strings: Arrow string array (values,): the value as the text shows it, null where missing.
        flags: uint8 (rows,), flags of `data.schema.Fallback`.
        offsets: int64 (rows + 1,), where each row's values start and end; None if each row has one value.
        numbers: float64 (values,), NaN where missing; numeric fields only.
        keys: int64 (values,), the id of the feature that stands for exactly this string, or -1 if there is none.
        vectors: float32 (values, size), NaN where missing; vector fields only.
    """

    strings: pa.Array
    flags: np.ndarray
    offsets: np.ndarray | None = None
    numbers: np.ndarray | None = None
    keys: np.ndarray | None = None
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.flags)

    def without_oov(self) -> "FieldValues":
        """Returns a copy without OOV values: they become null, or are dropped if rows have several values."""
        assert self.keys is not None, "only for fields whose features stand for values"
        known = self.keys >= 0
        if self.offsets is None:
            return replace(self, strings=pc.if_else(pa.array(known), self.strings, None))
        offsets = np.concatenate([[0], known.cumsum()])[self.offsets]
        return FieldValues(self.strings.filter(pa.array(known)), self.flags, offsets, keys=self.keys[known])


@dataclass(frozen=True)
class CountedFeatures:
    """The features that fitting found.

    Attributes:
        values: Arrow string array (features,), the value of each feature, in the order of the feature ids.
        counts: int64 (features,), how often each was seen.
        num_oov: number of values without a feature of their own.
        num_missing: number of rows without a value.
    """

    values: pa.Array
    counts: np.ndarray
    num_oov: int
    num_missing: int


class FeatureCounter(ABC):
    """Finds the features of a field in its training rows, one batch at a time."""

    @abstractmethod
    def add(self, values: FieldValues) -> None:
        """Adds a batch of rows."""

    @abstractmethod
    def result(self) -> CountedFeatures:
        """Returns the features of all rows added so far."""


class FeatureIndex(ABC):
    """Looks up the features of values."""

    @abstractmethod
    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        """Returns each value's feature as an offset in its field's range, int64 (values,): 0 is OOV, 1 is MISSING."""


class FieldKind(ABC):
    """Defines how a kind of field is read, fitted and shown. Text-only kinds have neither counter nor index.

    Attributes:
        column: what a column of Python objects holds; see `contents` of `data.tables.to_table`.
    """

    column: ClassVar[Contents] = "ids"

    @abstractmethod
    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        """Reads the values of a raw column.

        Raises:
            flip_hf.data.schema.InputError: a value is invalid for this kind.
        """

    def remembers(self, field: FieldConfig) -> bool:
        """Whether each feature stands for one value, so that `FeatureVocabulary.extended` can add features."""
        return False

    def counter(self, field: FieldConfig) -> FeatureCounter:
        """Returns a counter that finds the field's features."""
        raise NotImplementedError(f"a field of kind {field.kind!r} has no features")

    def index(self, field: FieldConfig, values: pa.Array) -> FeatureIndex:
        """Returns an index of the features that fitting found.

        Args:
            field: the fitted field.
            values: `CountedFeatures.values` of the fit.

        Raises:
            ValueError: the values are not a possible result of fitting this field.
        """
        raise NotImplementedError(f"a field of kind {field.kind!r} has no features")

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Assigns each row's values to its positions.

        Args:
            ids: int64 (values,), each value's feature id.
            values: the values.
            field: the field.
            oov_id: id of the field's OOV feature.

        Returns:
            int64 (rows, field.num_positions), the index of the value at each position, -1 after the row's last value;
            and bool (rows,), true for rows with more values than positions.
        """
        return np.arange(len(ids)).reshape(-1, 1), np.zeros(len(ids), dtype=bool)

    def shown(self, values: FieldValues, field: FieldConfig) -> FieldValues:
        """Returns the values in the order in which the text shows them."""
        return values
