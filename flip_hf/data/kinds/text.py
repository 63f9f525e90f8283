"""Text without an id, such as an advertisement's description."""

import pyarrow as pa

from flip_hf.data.kinds.base import FieldKind, FieldValues
from flip_hf.data.schema import canonical_numbers, canonical_strings, plain_array
from flip_hf.fields import FieldConfig


class Text(FieldKind):
    """Shown in the text, absent from the table."""

    column = "texts"

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        column = plain_array(column)
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            # As an id a number that is not whole would be an error; as text it is shown as a numeric field shows it.
            _, strings, flags = canonical_numbers(column, field.name, first_row=first_row, source=source)
            return FieldValues(strings, flags)
        return FieldValues(*canonical_strings(column, field.name, first_row=first_row, source=source))
