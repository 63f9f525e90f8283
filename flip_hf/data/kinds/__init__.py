"""Kinds of field, one file each. To add a kind, write its file and add a line here and in `FIELD_KINDS`."""

from flip_hf.data.kinds.base import FieldKind, FieldValues
from flip_hf.data.kinds.categorical import Categorical
from flip_hf.data.kinds.multi_categorical import MultiCategorical
from flip_hf.data.kinds.numeric import Numeric
from flip_hf.data.kinds.sequence import SequenceKind
from flip_hf.data.kinds.text import Text
from flip_hf.data.kinds.vector import Vector

KINDS: dict[str, FieldKind] = {
    "categorical": Categorical(),
    "numeric": Numeric(),
    "multi_categorical": MultiCategorical(),
    "sequence": SequenceKind(),
    "text": Text(),
    "vector": Vector(),
}
"""Reads, fits and shows the values of each kind in `flip_hf.fields.FIELD_KINDS`."""

__all__ = ["KINDS", "FieldKind", "FieldValues"]
