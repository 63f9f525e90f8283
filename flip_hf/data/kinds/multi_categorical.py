"""Fields with any number of unordered values per row, such as a movie's genres."""

import numpy as np
import pyarrow as pa

from flip_hf.data.kinds.base import FieldValues
from flip_hf.data.kinds.categorical import Categorical
from flip_hf.data.schema import canonical_lists
from flip_hf.fields import FieldConfig


class MultiCategorical(Categorical):
    """A bag of values, from a column of lists or of strings with a separator.

    If a row has more values than positions, known values are kept before OOV ones, and frequent before rare ones. The
    order in the row makes no difference.
    """

    column = "lists"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        strings, offsets, flags = canonical_lists(
            column, field.name, field.separator, first_row=first_row, source=source
        )
        return FieldValues(strings, flags, offsets)

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        assert values.offsets is not None
        rows = np.repeat(np.arange(len(values)), np.diff(values.offsets))
        order = np.lexsort((ids, ids == oov_id, rows))
        return place_first(order, values.offsets, field.max_values)


def place_first(order: np.ndarray, offsets: np.ndarray, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Implements `FieldKind.arrange`: keeps the first values of each row.

    Args:
        order: int64 (values,), indices of the values; each row's values are sorted by priority.
        offsets: int64 (rows + 1,), where each row's values start and end.
        num_positions: number of positions per row.
    """
    lengths = np.diff(offsets)
    kept = np.arange(num_positions) < lengths[:, None]
    places = np.minimum(offsets[:-1, None] + np.arange(num_positions), max(len(order) - 1, 0))
    arranged = np.where(kept, order[places] if len(order) else -1, -1)
    return arranged, lengths > num_positions
