"""Converts raw column values to canonical strings, numbers and labels.

A value has one canonical spelling, whatever the column's type or the file format. The table is in
docs/how_to/values.md.
"""

import enum
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.spelling import EXACT_BELOW, composed, shown_numbers, spelled_decimals, spelled_floats, spelled_times
from flip_hf.fields import printable

logger = logging.getLogger(__name__)

_NOTHING = object()
_SHOWN_CHARACTERS = 80
_LOOKS_LIKE_A_LIST = r"^\s*(\[.*\]|\(.*\)|\{.*\})\s*$"
_already_warned: set[tuple[str | None, str]] = set()


class InputError(ValueError):
    """Invalid user data. The message names the file, field, row and value, and says what to do.

    Example message: `clicks.csv, field 'user_id', row 3, value 2.5: an id must be ...`. Unknown parts are left out.

    Args:
        message: what is wrong and what to do.
        source: name of the file.
        field: name of the column.
        row: row number in the file, counted from 0 without the header.
        value: the offending value; the message shortens long values.
    """

    def __init__(
        self,
        message: str,
        *,
        source: str | None = None,
        field: str | None = None,
        row: int | None = None,
        value: Any = _NOTHING,
    ) -> None:
        parts = [source] if source is not None else []
        if field is not None:
            parts.append(f"field {field!r}")
        if row is not None:
            parts.append(f"row {row}")
        if value is not _NOTHING:
            parts.append(f"value {_shown(value)}")
        super().__init__(printable(f"{', '.join(parts)}: {message}" if parts else message))
        self.message = message
        self.source = source
        self.field = field
        self.row = row
        self.value = None if value is _NOTHING else value


class Fallback(enum.IntFlag):
    """How a value was normalised or replaced. Each row has one byte of flags per field."""

    OOV = 1
    MISSING = 2
    STRIPPED = 4
    BOOLEAN = 8
    TRUNCATED = 16


def canonical_strings(
    column: pa.Array | pa.ChunkedArray, field: str, *, first_row: int = 0, source: str | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Converts a column to the strings that identify its values in a categorical field.

    A typed value is spelled by its type; the width of the type makes no difference:

    - Whole numbers and decimals have no leading or trailing zeros: `Decimal("5.00")` becomes `5`.
    - Floating-point numbers must be whole, and are spelled as integers.
    - Booleans become `true` and `false`.
    - Dates and times use the ISO format without trailing zeros in the fraction. Times with a time zone are converted
      to UTC. A timestamp without a time zone at midnight becomes its date.
    - Strings lose white space at both ends and are converted to Unicode normal form C (NFC). They are otherwise
      unchanged, so `007` and `7` differ, and `1` and `"1"` are equal.
    - Bytes are decoded as UTF-8.
    - Null, NaN, NaT and the empty string are missing.

    Args:
        column: the values.
        field: name of the column, for error messages.
        first_row: row number of the first value, for error messages.
        source: name of the file, for error messages.

    Returns:
        The strings, an Arrow string array (rows,), null where missing; and the `Fallback` flags MISSING, STRIPPED and
        BOOLEAN, uint8 (rows,).

    Raises:
        InputError: a floating-point number is not whole, is infinite or is too large to be exact; bytes are not UTF-8;
            a value is a list or struct; or the type has no canonical string.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    flags = np.zeros(len(column), dtype=np.uint8)
    if pa.types.is_boolean(kind):
        strings = pc.if_else(column, "true", "false")
        flags[_mask(pc.is_valid(column))] |= np.uint8(Fallback.BOOLEAN)
    elif pa.types.is_floating(kind):
        strings = _whole_numbers(column, at)
    elif pa.types.is_decimal(kind):
        strings = spelled_decimals(column)
    elif pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        strings = spelled_times(column)
    elif is_text(kind) or _is_bytes(kind):
        strings = composed(_decoded(column, at))
    elif pa.types.is_nested(kind):
        at.fail(
            pc.is_valid(column),
            "this field takes one value per row; declare a field with several as multi_categorical or sequence",
        )
        strings = pa.nulls(len(column), pa.string())
    else:
        strings = _cast(column, at)

    stripped = pc.utf8_trim_whitespace(strings)
    # An Arrow call on a single row is mostly overhead, so the calls below run only if a value needs them.
    if not stripped.equals(strings):
        flags[_mask(pc.not_equal(stripped, strings))] |= np.uint8(Fallback.STRIPPED)
    empty = pc.equal(stripped, "")
    if pc.any(empty).as_py():
        stripped = pc.if_else(empty, None, stripped)
    if stripped.null_count:
        flags[_mask(pc.is_null(stripped))] |= np.uint8(Fallback.MISSING)
    return stripped, flags


def canonical_numbers(
    column: pa.Array | pa.ChunkedArray, field: str, *, first_row: int = 0, source: str | None = None
) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Converts a column to the values of a numeric field and the text that shows them.

    Accepts numbers of any type and strings that spell a number (`-1.5`, `2e3`). A Boolean becomes 1 or 0. Null, NaN and
    the empty string are missing. A number is converted to the float64 nearest to its shortest decimal spelling in its
    own precision. So 0.1 is the same number as float16, float32, float64, decimal or string. The text shows a whole
    number as its digits, and any other number as its shortest spelling that reads back to the same value.

    Args:
        column: the values.
        field: name of the column, for error messages.
        first_row: row number of the first value, for error messages.
        source: name of the file, for error messages.

    Returns:
        The numbers, float64 (rows,), NaN where missing; the text, an Arrow string array (rows,), null where missing;
        and the `Fallback` flags MISSING, STRIPPED and BOOLEAN, uint8 (rows,).

    Raises:
        InputError: a value is infinite or not a number.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    flags = np.zeros(len(column), dtype=np.uint8)
    # The original spelling; a float64 may not hold a large whole number exactly.
    spelled = None
    if pa.types.is_null(kind):
        numbers = column.cast(pa.float64())
    elif pa.types.is_boolean(kind):
        flags[_mask(pc.is_valid(column))] |= np.uint8(Fallback.BOOLEAN)
        numbers = column.cast(pa.float64())
    elif pa.types.is_float64(kind):
        numbers = column
    elif pa.types.is_floating(kind):
        numbers = spelled_floats(column).cast(pa.float64())
    elif pa.types.is_integer(kind):
        spelled = column
        # An unsafe cast is enough: the number only selects a bucket, so a large integer may be rounded to float64.
        numbers = column.cast(pa.float64(), safe=False)
    elif pa.types.is_decimal(kind):
        spelled = column.cast(pa.string())
        numbers = spelled.cast(pa.float64())
    elif is_text(kind):
        texts = _decoded(column, at)
        spelled = pc.utf8_trim_whitespace(texts)
        flags[_mask(pc.not_equal(spelled, texts))] |= np.uint8(Fallback.STRIPPED)
        spelled = pc.if_else(pc.equal(spelled, ""), None, spelled)
        numbers = _parsed(spelled, at)
    else:
        at.fail(pc.is_valid(column), f"a number can't be of type {kind}; store it as an integer or a float")
        numbers = pa.nulls(len(column), pa.float64())
    at.fail(pc.is_inf(numbers), "a number must be finite; drop the row, or leave the value empty if it is unknown")
    # Adding zero turns negative zero into zero.
    numbers = pc.add(pc.if_else(pc.is_nan(numbers), None, numbers), 0.0)
    flags[_mask(pc.is_null(numbers))] |= np.uint8(Fallback.MISSING)
    return numbers.to_numpy(zero_copy_only=False), shown_numbers(numbers, spelled), flags


def canonical_lists(
    column: pa.Array | pa.ChunkedArray,
    field: str,
    separator: str | None,
    *,
    first_row: int = 0,
    source: str | None = None,
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Converts a column to the strings of a field with several values per row. Keeps their order.

    Each value is read as in `canonical_strings`. Missing values are dropped. A row that is null or has no values is
    missing.

    Args:
        column: a column of lists, or of strings whose values are joined by the separator. Strings that look like a list
            written as text (`"[11, 12]"`) cause a warning, once per field and file.
        field: name of the column, for error messages.
        separator: the text between two values of a string; not needed for lists.
        first_row: row number of the first row, for error messages.
        source: name of the file, for error messages.

    Returns:
        All values, an Arrow string array (values,); the offsets at which each row starts and ends, int64 (rows + 1,);
        and the `Fallback` flags MISSING, STRIPPED and BOOLEAN, set if any value of the row has them, uint8 (rows,).

    Raises:
        InputError: the column holds neither lists nor strings with a separator, or a value can't be an id.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    if is_text(kind) or _is_bytes(kind):
        if separator is None:
            at.fail(pc.is_valid(column), f"strings need a separator between values; set the separator of {field!r}")
        texts = _decoded(column, at)
        at.warn_of_lists(texts)
        empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
        texts = pc.if_else(empty, None, texts)
        column = pc.split_pattern(texts, separator or ",")
    elif pa.types.is_null(kind):
        column = column.cast(pa.list_(pa.string()))
    elif not is_list(kind):
        at.fail(pc.is_valid(column), "must be a list of values, or a string with a separator between values")
        column = pa.nulls(len(column), pa.list_(pa.string()))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(column)), lengths)
    try:
        strings, value_flags = canonical_strings(column.flatten(), field)
    except InputError as error:
        row = None if error.row is None else first_row + int(rows[error.row])
        value = {} if error.row is None else {"value": error.value}
        raise InputError(error.message, source=source, field=field, row=row, **value) from error
    flags = np.zeros(len(column), dtype=np.uint8)
    np.bitwise_or.at(flags, rows, value_flags)
    present = _mask(pc.is_valid(strings))
    counts = np.bincount(rows[present], minlength=len(column))
    flags[counts == 0] |= np.uint8(Fallback.MISSING)
    return strings.filter(pa.array(present)), np.concatenate([[0], counts.cumsum()]).astype(np.int64), flags


def canonical_labels(
    column: pa.Array | pa.ChunkedArray, field: str, *, first_row: int = 0, source: str | None = None
) -> np.ndarray:
    """Converts a label column to 0 and 1, float32 (rows,).

    Accepts 0 and 1 as any numeric type (decimals included), Booleans, and the strings `0`, `1`, `true` and `false` in
    any case. The numbers may have a fraction of zeros (`1.0`).

    Args:
        column: the values.
        field: name of the column, for error messages.
        first_row: row number of the first value, for error messages.
        source: name of the file, for error messages.

    Raises:
        InputError: a value is missing or is anything else.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    clicked = skipped = pa.array(np.zeros(len(column), dtype=bool))
    if is_text(kind) or pa.types.is_decimal(kind):
        texts = _decoded(column, at) if is_text(kind) else spelled_decimals(column)
        words = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
        clicked = pc.match_substring_regex(words, r"^(1(\.0+)?|true)$")
        skipped = pc.match_substring_regex(words, r"^(0(\.0+)?|false)$")
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        # An unsafe cast is enough: a whole number that a float64 rounds is neither 0 nor 1.
        numbers = column.cast(pa.float64(), safe=False)
        clicked, skipped = pc.equal(numbers, 1), pc.equal(numbers, 0)
    labels = _mask(clicked)
    at.fail(~(labels | _mask(skipped)), "a label must be 0 or 1; convert ratings to labels, and drop unlabelled rows")
    return labels.astype(np.float32)


class ColumnPlace:
    """The origin of a column, used to locate a value in an error message.

    Args:
        column: the values.
        field: name of the column.
        first_row: row number of the first value.
        source: name of the file.
    """

    def __init__(self, column: pa.Array, field: str, first_row: int, source: str | None) -> None:
        self.column, self.field, self.first_row, self.source = column, field, first_row, source

    def fail(self, bad: pa.Array | np.ndarray, message: str) -> None:
        """Raises InputError for the first row where `bad` is true, if any."""
        rows = np.flatnonzero(bad if isinstance(bad, np.ndarray) else _mask(bad))
        if len(rows):
            row = int(rows[0])
            value = self.column[row].as_py()
            raise InputError(message, source=self.source, field=self.field, row=self.first_row + row, value=value)

    def warn_of_lists(self, texts: pa.Array) -> None:
        """Warns if a text looks like a list written as text; once per field and file."""
        if (key := (self.source, self.field)) in _already_warned:
            return
        rows = np.flatnonzero(_mask(pc.match_substring_regex(texts, _LOOKS_LIKE_A_LIST)))
        if len(rows):
            _already_warned.add(key)
            logger.warning(
                "%s",
                InputError(
                    "looks like a list written as text; it is split at its separator, brackets included. Store lists "
                    "(Parquet, JSON Lines), or separate the values by the separator only",
                    source=self.source,
                    field=self.field,
                    row=self.first_row + int(rows[0]),
                    value=texts[int(rows[0])].as_py(),
                ),
            )


def _shown(value: Any) -> str:
    if isinstance(value, str | bytes):
        value = value[: _SHOWN_CHARACTERS + 1]
    try:
        shown = repr(value)
    except Exception:  # an integer of more than 4300 digits, or an object with a broken __repr__
        shown = f"of type {type(value).__name__}"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."


def plain_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Joins chunks and decodes dictionaries, run-end encoding and views, which some Arrow functions don't support."""
    if isinstance(column, pa.ChunkedArray):
        # Arrow can't concatenate chunks of all of these types.
        chunks = [plain_array(chunk) for chunk in column.chunks]
        column = pa.concat_arrays(chunks) if chunks else column.combine_chunks()
    kind = column.type
    if pa.types.is_run_end_encoded(kind):
        return plain_array(pc.run_end_decode(column))
    if pa.types.is_dictionary(kind):
        return plain_array(column.dictionary).take(column.indices)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return column.cast(pa.string() if pa.types.is_string_view(kind) else pa.binary())
    return column


def _mask(condition: pa.Array) -> np.ndarray:
    mask: np.ndarray = pc.fill_null(condition, False).to_numpy(zero_copy_only=False)
    return mask


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_bytes(kind: pa.DataType) -> bool:
    views = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in views)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists, of any Arrow list type."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_kind(kind) for is_kind in (*kinds, *views))


def _whole_numbers(column: pa.Array, at: ColumnPlace) -> pa.Array:
    exact_below = {16: 2.0**11, 32: 2.0**24, 64: EXACT_BELOW}[column.type.bit_width]
    numbers = column.cast(pa.float64())
    numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
    broken = _mask(pc.not_equal(pc.floor(numbers), numbers)) | _mask(pc.is_inf(numbers))
    inexact = _mask(pc.greater_equal(pc.abs(numbers), exact_below)) & ~broken
    # Report the first bad row, whichever of the two errors it has.
    if inexact.any() and not broken[: inexact.argmax()].any():
        at.fail(inexact, f"too large to be exact as {column.type}, so the id may have changed; store it as a string")
    at.fail(broken, "an id must be a whole number; store it as a string or an integer")
    return numbers.cast(pa.int64()).cast(pa.string())


def _parsed(texts: pa.Array, at: ColumnPlace) -> pa.Array:
    """Parses strings as float64 numbers."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        at.fail(
            np.array([not spells_number(v) for v in texts]), "not a number; write it with digits and a decimal point"
        )
        raise


def spells_number(value: pa.Scalar) -> bool:
    """Whether a string spells a number."""
    try:
        value.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _decoded(column: pa.Array, at: ColumnPlace) -> pa.Array:
    """Converts text or bytes to valid UTF-8 strings. Arrow does not check that a Parquet file's strings are UTF-8."""
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        broken = np.array([not _is_utf8(v) for v in raw.to_pylist()])
        ColumnPlace(raw, at.field, at.first_row, at.source).fail(broken, "not UTF-8; convert the file to UTF-8")
        raise


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _cast(column: pa.Array, at: ColumnPlace) -> pa.Array:
    message = f"an id can't be of type {column.type}; store it as a string or an integer"
    # Arrow would cast an extension type's storage, such as the 16 bytes of a UUID. It would write a duration as a count
    # of its unit.
    if isinstance(column.type, pa.BaseExtensionType) or pa.types.is_duration(column.type):
        raise InputError(message, source=at.source, field=at.field)
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(message, source=at.source, field=at.field) from error
