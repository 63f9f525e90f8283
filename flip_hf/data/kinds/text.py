"""Text fields, which have no feature id, such as an advertisement's description."""

import pyarrow as pa

from flip_hf.data.kinds.base import FieldKind, FieldValues
from flip_hf.data.schema import canonical_numbers, canonical_strings, plain_array
from flip_hf.fields import FieldConfig


class Text(FieldKind):
    """A value that only the textual view shows."""

    column = "texts"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        column = plain_array(column)
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            # A fraction is invalid as an id but valid as text. Show it as a numeric field does.
            _, strings, flags = canonical_numbers(column, field.name, first_row=first_row, source=source)
            return FieldValues(strings, flags)
        return FieldValues(*canonical_strings(column, field.name, first_row=first_row, source=source))
