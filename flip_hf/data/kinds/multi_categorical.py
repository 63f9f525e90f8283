"""Any number of values a row whose order means nothing, such as a movie's genres."""

import numpy as np
import pyarrow as pa

from flip_hf.data.kinds.base import FieldValues
from flip_hf.data.kinds.categorical import Categorical
from flip_hf.data.schema import canonical_lists
from flip_hf.fields import PADDING_ID, FieldConfig


class MultiCategorical(Categorical):
    """A bag of values, from a column of lists or of strings with a separator.

    Of a row with more values than positions, known ones are kept before OOV ones and frequent ones before rare ones,
    whatever their order in the row.
    """

    column = "lists"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        strings, offsets, flags = canonical_lists(
            column, field.name, field.separator, first_row=first_row, source=source
        )
        return FieldValues(strings, flags, offsets)

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int, missing_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        assert values.offsets is not None
        rows = np.repeat(np.arange(len(values)), np.diff(values.offsets))
        order = np.lexsort((ids, ids == oov_id, rows))
        return place_first(ids[order], values.offsets, field.max_values, missing_id)


def place_first(
    ids: np.ndarray, offsets: np.ndarray, num_positions: int, missing_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ids of each row, int64 (rows, num_positions), padded; and bool (rows,), which had more than that.

    Args:
        ids: int64 (values,).
        offsets: int64 (rows + 1,).
        num_positions: width of the result.
        missing_id: what a row without a value holds.
    """
    lengths = np.diff(offsets)
    placed = np.full((len(lengths), num_positions), PADDING_ID, dtype=np.int64)
    placed[lengths == 0, 0] = missing_id
    kept = np.arange(num_positions) < lengths[:, None]
    places = np.minimum(offsets[:-1, None] + np.arange(num_positions), max(len(ids) - 1, 0))
    placed[kept] = ids[places[kept]] if len(ids) else []
    return placed, lengths > num_positions
