"""Values in the order of time, such as what a user liked before."""

import numpy as np

from flip_hf.configuration_flip import FieldConfig
from flip_hf.data.kinds.base import FieldValues
from flip_hf.data.kinds.multi_categorical import MultiCategorical, place_first


class SequenceKind(MultiCategorical):
    """A history, the most recent value last; both views keep the last ones and show the most recent first."""

    def arrange(
        self, ids: np.ndarray, values: FieldValues, field: FieldConfig, oov_id: int, missing_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        assert values.offsets is not None
        return place_first(ids[_most_recent_first(values.offsets)], values.offsets, field.max_values, missing_id)

    def shown(self, values: FieldValues, field: FieldConfig) -> FieldValues:
        assert values.offsets is not None
        lengths = np.minimum(np.diff(values.offsets), field.text_values or field.max_values)
        offsets = np.concatenate([[0], lengths.cumsum()])
        last = np.repeat(values.offsets[1:] - 1, lengths)
        back = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return FieldValues(values.strings.take(last - back), values.flags, offsets)


def _most_recent_first(offsets: np.ndarray) -> np.ndarray:
    """Places of all values with each row's turned round."""
    lengths = np.diff(offsets)
    places: np.ndarray = np.repeat(offsets[:-1] + offsets[1:] - 1, lengths) - np.arange(offsets[-1])
    return places
