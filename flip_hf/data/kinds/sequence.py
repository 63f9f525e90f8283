"""Sequence fields: values in order of time, such as the items that a user liked before."""

import numpy as np

from flip_hf.data.kinds.base import FieldValues
from flip_hf.data.kinds.multi_categorical import MultiCategorical, place_first
from flip_hf.data.ragged import concatenated_ranges
from flip_hf.fields import FieldConfig


class SequenceKind(MultiCategorical):
    """A history, most recent value last. Both views keep the last values and show the most recent first."""

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        assert values.offsets is not None
        recent_first = _most_recent_first(values.offsets, np.diff(values.offsets))
        return place_first(recent_first, values.offsets, field.max_values)

    def shown(self, values: FieldValues, field: FieldConfig) -> FieldValues:
        assert values.offsets is not None
        lengths = np.minimum(np.diff(values.offsets), field.text_values or field.max_values)
        offsets = np.concatenate([[0], lengths.cumsum()])
        order = _most_recent_first(values.offsets, lengths)
        keys = None if values.keys is None else values.keys[order]
        return FieldValues(values.strings.take(order), values.flags, offsets, keys=keys)


def _most_recent_first(offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the indices of each row's last `lengths` values, from the row's end backwards."""
    return -concatenated_ranges(1 - offsets[1:], lengths)
