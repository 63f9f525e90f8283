"""The contract that kinds of field share: from raw columns to features and text."""

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
    """A field's values in some rows.

    Attributes:
        strings: Arrow string (values,), what stands for each value and what the text shows, null where missing.
        flags: uint8 (rows,), of `data.schema.Fallback`.
        offsets: int64 (rows + 1,), where each row's values begin and end; None where each row has one.
        numbers: float64 (values,), of a numeric field, NaN where missing.
        keys: int64 (values,), the feature that stands for exactly this string and no other, -1 where none does.
        vectors: float32 (values, size), of a vector field, NaN where missing.
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
        """These with null for each value that no feature stands for; of several a row has those without."""
        assert self.keys is not None, "of fields whose features stand for values"
        known = self.keys >= 0
        if self.offsets is None:
            return replace(self, strings=pc.if_else(pa.array(known), self.strings, None))
        offsets = np.concatenate([[0], known.cumsum()])[self.offsets]
        return FieldValues(self.strings.filter(pa.array(known)), self.flags, offsets, keys=self.keys[known])


@dataclass(frozen=True)
class CountedFeatures:
    """The features that fitting found.

    Attributes:
        values: Arrow string (features,), what each stands for, in the order of their ids.
        counts: int64 (features,), how often each was seen.
        num_oov: values that got no feature of their own.
        num_missing: rows without a value.
    """

    values: pa.Array
    counts: np.ndarray
    num_oov: int
    num_missing: int


class FeatureCounter(ABC):
    """Sees a field's training rows, batch by batch, and says which features they make."""

    @abstractmethod
    def add(self, values: FieldValues) -> None:
        """Some rows more."""

    @abstractmethod
    def result(self) -> CountedFeatures:
        """What all rows make."""


class FeatureIndex(ABC):
    """Finds the features of values."""

    @abstractmethod
    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        """The offset of each value's feature within its field, int64 (values,): 0 is OOV, 1 MISSING."""


class FieldKind(ABC):
    """How a kind of field is read, fitted and shown. Text-only kinds have neither counter nor index.

    Attributes:
        column: what a column of Python objects holds, by `data.tables.to_table`'s `contents`.
    """

    column: ClassVar[Contents] = "ids"

    @abstractmethod
    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        """The values of a raw column.

        Raises:
            flip_hf.data.schema.InputError: a value can't be of this kind.
        """

    def remembers(self, field: FieldConfig) -> bool:
        """Whether a feature stands for one value, so that others can get features of their own later."""
        return False

    def counter(self, field: FieldConfig) -> FeatureCounter:
        """What fits the field."""
        raise NotImplementedError(f"a field of kind {field.kind!r} has no features")

    def index(self, field: FieldConfig, values: pa.Array) -> FeatureIndex:
        """What finds the features that fitting found, `CountedFeatures.values`.

        Raises:
            ValueError: fitting such a field can't have found these.
        """
        raise NotImplementedError(f"a field of kind {field.kind!r} has no features")

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which value each position of a row holds.

        Args:
            ids: int64 (values,), each value's feature.
            values: the values.
            field: the field.
            oov_id: the field's OOV feature.

        Returns:
            int64 (rows, field.num_positions), places among the values, -1 behind the last one of a row; and bool
            (rows,), which rows had more values than that.
        """
        return np.arange(len(ids)).reshape(-1, 1), np.zeros(len(ids), dtype=bool)

    def shown(self, values: FieldValues, field: FieldConfig) -> FieldValues:
        """The values in the order in which the text shows them."""
        return values
