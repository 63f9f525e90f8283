"""Vector fields, such as the embedding of a picture."""

import numpy as np
import pyarrow as pa

from flip_hf.data.kinds.base import CountedFeatures, FeatureCounter, FeatureIndex, FieldKind, FieldValues
from flip_hf.data.kinds.categorical import count_missing
from flip_hf.data.vector_columns import canonical_vectors
from flip_hf.fields import MISSING_OFFSET, NUM_RESERVED_FEATURES, FieldConfig

_PRESENT = "vector"


class Vector(FieldKind):
    """One vector per row. One feature stands for any vector, MISSING for none; the model adds the projected vector."""

    column = "vectors"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        assert field.size is not None
        vectors, flags = canonical_vectors(column, field.name, field.size, first_row=first_row, source=source)
        is_missing = np.isnan(vectors[:, 0])
        strings = pa.array(np.full(len(vectors), _PRESENT), pa.string(), mask=is_missing)
        return FieldValues(strings, flags, vectors=vectors)

    def counter(self, field: FieldConfig) -> FeatureCounter:
        return VectorCounter()

    def index(self, field: FieldConfig, values: pa.Array) -> FeatureIndex:
        if values.to_pylist() != [_PRESENT]:
            raise ValueError(
                f"field {field.name!r} must have {_PRESENT!r} as its only feature, which stands for any vector"
            )
        return VectorIndex()


class VectorCounter(FeatureCounter):
    """Counts vectors and missing vectors."""

    def __init__(self) -> None:
        self._num_vectors = self._num_missing = 0

    def add(self, values: FieldValues) -> None:
        missing = count_missing(values)
        self._num_missing += missing
        self._num_vectors += len(values) - missing

    def result(self) -> CountedFeatures:
        counts = np.array([self._num_vectors], dtype=np.int64)
        return CountedFeatures(pa.array([_PRESENT], pa.string()), counts, 0, self._num_missing)


class VectorIndex(FeatureIndex):
    """Distinguishes vectors from missing vectors."""

    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        missing = values.strings.is_null().to_numpy(zero_copy_only=False)
        return np.where(missing, MISSING_OFFSET, NUM_RESERVED_FEATURES).astype(np.int64)
