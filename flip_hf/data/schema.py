"""What a raw column value means: the canonical strings of a field, and labels.

One value has one spelling, whatever its column's type or its file's format: docs/how_to/values.md has the table.
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
    """Something in a user's data, named by file, field, row and value, with what to do about it.

    Reads `clicks.csv, field 'user_id', row 3, value 2.5: an id must be ...`; what is not known is left out.

    Args:
        message: what is wrong and what to do.
        source: the file.
        field: the column.
        row: the row's number, counted from 0 without the header.
        value: the value; a long one is cut in the message.
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
    """The defined fallback that stood in for what a value was; a row has one byte of flags for each field."""

    OOV = 1
    MISSING = 2
    STRIPPED = 4
    BOOLEAN = 8
    TRUNCATED = 16


def canonical_strings(
    column: pa.Array | pa.ChunkedArray, field: str, *, first_row: int = 0, source: str | None = None
) -> tuple[pa.Array, np.ndarray]:
    """The string that stands for each value of a categorical field.

    A typed value is spelled by its type, whatever the type's width: whole numbers and decimals without leading or
    trailing zeros (`5` for `Decimal("5.00")`), floating-point numbers as the whole numbers that they are, Booleans as
    `true` and `false`, dates and times in ISO form, without a fraction of zeros, and in UTC where they have a time
    zone; a time at midnight without a zone is spelled as its date. Strings stay what they are, but for white space
    at their ends and Unicode's normal form C (NFC), so `007` and `7` differ and `1` and `"1"` do not. Bytes are read as
    UTF-8. Null, NaN, NaT and the empty string are missing.

    Args:
        column: the values.
        field: the column's name, for errors.
        first_row: number of the first row, for errors.
        source: the file, for errors.

    Returns:
        The strings, Arrow string (rows,), null where missing; and flags of `Fallback` out of MISSING, STRIPPED and
        BOOLEAN, uint8 (rows,).

    Raises:
        InputError: a floating-point number is not whole, infinite or too large to be exact; bytes are not UTF-8; a
            value holds several or is of a kind that has no string.
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
            "there must be one value per row here; several make a field of the kind multi_categorical or sequence",
        )
        strings = pa.nulls(len(column), pa.string())
    else:
        strings = _cast(column, at)

    stripped = pc.utf8_trim_whitespace(strings)
    # Each call of Arrow costs a single row more than all its work: most columns need only these few.
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
    """The number that each value of a numeric field is, and how the text shows it.

    Numbers of any type are read, and strings that spell one (`-1.5`, `2e3`); a Boolean is 1 or 0. What is null, NaN or
    empty is missing. A number is the float64 nearest to its shortest decimal spelling in its own precision: 0.1 is the
    same number as float16, float32, float64, decimal or string. Whole numbers are shown by their digits, others as
    short as they can be read back.

    Args:
        column: the values.
        field: the column's name, for errors.
        first_row: number of the first row, for errors.
        source: the file, for errors.

    Returns:
        The numbers, float64 (rows,), NaN where missing; the text, Arrow string (rows,), null where missing; and flags
        of `Fallback` out of MISSING, STRIPPED and BOOLEAN, uint8 (rows,).

    Raises:
        InputError: a value is infinite or no number.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    flags = np.zeros(len(column), dtype=np.uint8)
    # The spelling that a large whole number is shown by, which a float64 may not hold.
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
        # Not a safe cast: a number is put into a bucket, for which a float64 is near enough to a large integer.
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
    at.fail(pc.is_inf(numbers), "a number must be finite; drop the row, or leave the value empty if it is not known")
    # Adding zero makes the negative zero a plain one.
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
    """The strings that stand for the values of a field that holds several, in their order.

    Single values are read as in `canonical_strings`; what is missing among them is left out. A row that is null or
    holds no value is missing.

    Args:
        column: a column of lists, or of strings in which the separator stands between values. Strings that look like
            lists written as text (`"[11, 12]"`) are warned of, once for each field and file.
        field: the column's name, for errors.
        separator: what stands between the values of a string.
        first_row: number of the first row, for errors.
        source: the file, for errors.

    Returns:
        All values, Arrow string (values,); where each row's begin and end, int64 (rows + 1,); and flags of `Fallback`
        out of MISSING, STRIPPED and BOOLEAN of any of a row's values, uint8 (rows,).

    Raises:
        InputError: the column holds neither lists nor strings with a separator, or a value can't be an id.
    """
    column = plain_array(column)
    kind = column.type
    at = ColumnPlace(column, field, first_row, source)
    if is_text(kind) or _is_bytes(kind):
        if separator is None:
            at.fail(pc.is_valid(column), f"strings need a separator between their values: set it for {field!r}")
        texts = _decoded(column, at)
        at.warn_of_lists(texts)
        empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
        texts = pc.if_else(empty, None, texts)
        column = pc.split_pattern(texts, separator or ",")
    elif pa.types.is_null(kind):
        column = column.cast(pa.list_(pa.string()))
    elif not is_list(kind):
        at.fail(pc.is_valid(column), "must be a list of values, or a string with a separator between them")
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
    """Labels as numbers, float32 (rows,) of 0 and 1.

    Takes 0 and 1 of any type of number, decimals too, Booleans, and the strings `0`, `1`, both also with a fraction of
    zeros (`1.0`), and `true` and `false` in any case.

    Args:
        column: the values.
        field: the column's name, for errors.
        first_row: number of the first row, for errors.
        source: the file, for errors.

    Raises:
        InputError: a value is anything else, missing included.
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
        # Not a safe cast: a whole number too large to be exact is no label either way.
        numbers = column.cast(pa.float64(), safe=False)
        clicked, skipped = pc.equal(numbers, 1), pc.equal(numbers, 0)
    labels = _mask(clicked)
    at.fail(~(labels | _mask(skipped)), "a label is 0 or 1; turn ratings into labels and drop rows without one before")
    return labels.astype(np.float32)


class ColumnPlace:
    """Where a column is from: what an error about one of its values says.

    Args:
        column: the values.
        field: its name.
        first_row: number of the first row.
        source: the file.
    """

    def __init__(self, column: pa.Array, field: str, first_row: int, source: str | None) -> None:
        self.column, self.field, self.first_row, self.source = column, field, first_row, source

    def fail(self, bad: pa.Array | np.ndarray, message: str) -> None:
        """Raises for the first row where `bad` holds, if there is one."""
        rows = np.flatnonzero(bad if isinstance(bad, np.ndarray) else _mask(bad))
        if len(rows):
            row = int(rows[0])
            value = self.column[row].as_py()
            raise InputError(message, source=self.source, field=self.field, row=self.first_row + row, value=value)

    def warn_of_lists(self, texts: pa.Array) -> None:
        """Warns where a text looks like a list that was written as text, once for each field and file."""
        if (key := (self.source, self.field)) in _already_warned:
            return
        rows = np.flatnonzero(_mask(pc.match_substring_regex(texts, _LOOKS_LIKE_A_LIST)))
        if len(rows):
            _already_warned.add(key)
            logger.warning(
                "%s",
                InputError(
                    "looks like a list written as text, and is split at its separator, brackets included; store lists "
                    "(Parquet, JSON Lines), or values with a separator alone",
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
    except Exception:  # a whole number of over 4300 digits, or an object whose repr is broken
        shown = f"of type {type(value).__name__}"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."


def plain_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column in one piece, without dictionaries, runs and views, on which not all functions of Arrow work."""
    if isinstance(column, pa.ChunkedArray):
        # Arrow can't join pieces of all of these types.
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
    """Whether a column of this type holds lists of any kind."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_kind(kind) for is_kind in (*kinds, *views))


def _whole_numbers(column: pa.Array, at: ColumnPlace) -> pa.Array:
    exact_below = {16: 2.0**11, 32: 2.0**24, 64: EXACT_BELOW}[column.type.bit_width]
    numbers = column.cast(pa.float64())
    numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
    broken = _mask(pc.not_equal(pc.floor(numbers), numbers)) | _mask(pc.is_inf(numbers))
    inexact = _mask(pc.greater_equal(pc.abs(numbers), exact_below)) & ~broken
    # The first row that is wrong is named, whichever way it is wrong.
    if inexact.any() and not broken[: inexact.argmax()].any():
        at.fail(inexact, f"too large to be exact as {column.type}, so the id may have changed; store it as a string")
    at.fail(broken, "an id must be a whole number; store it as a string or an integer")
    return numbers.cast(pa.int64()).cast(pa.string())


def _parsed(texts: pa.Array, at: ColumnPlace) -> pa.Array:
    """The numbers that texts spell."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        at.fail(
            np.array([not spells_number(v) for v in texts]), "not a number; write it with digits and a decimal point"
        )
        raise


def spells_number(value: pa.Scalar) -> bool:
    """Whether a string is a number's spelling."""
    try:
        value.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _decoded(column: pa.Array, at: ColumnPlace) -> pa.Array:
    """Text or bytes as text that is UTF-8. Arrow takes a Parquet file's word that its strings are."""
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        broken = np.array([not _is_utf8(v) for v in raw.to_pylist()])
        ColumnPlace(raw, at.field, at.first_row, at.source).fail(broken, "not UTF-8; convert it to UTF-8 before")
        raise


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _cast(column: pa.Array, at: ColumnPlace) -> pa.Array:
    message = f"an id can't be of type {column.type}; store it as a string or an integer"
    # Arrow would cast what an extension type is stored as, such as the 16 bytes of a UUID, and write a duration as a
    # count of its unit.
    if isinstance(column.type, pa.BaseExtensionType) or pa.types.is_duration(column.type):
        raise InputError(message, source=at.source, field=at.field)
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(message, source=at.source, field=at.field) from error
