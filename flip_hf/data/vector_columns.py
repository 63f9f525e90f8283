"""Reads columns of vectors, such as embeddings of pictures."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.schema import ColumnPlace, Fallback, canonical_numbers, is_list, is_text, plain_array, spells_number

_A_LIST = r"^\s*\[(.*)\]\s*$"


def canonical_vectors(
    column: pa.Array | pa.ChunkedArray, field: str, size: int, *, first_row: int = 0, source: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the vector of each row of a vector field.

    Accepts lists of numbers of any type, and strings that hold a JSON list (`[0.5, -1]`), as in CSV files. If `size` is
    1, plain numbers are accepted too. A row that is null, an empty string or an empty list is missing.

    Args:
        column: the values.
        field: name of the column, for error messages.
        size: dimension of a vector.
        first_row: row number of the first row, for error messages.
        source: name of the file, for error messages.

    Returns:
        float32 (rows, size), NaN where missing; and the `Fallback` flags, uint8 (rows,), of which only MISSING occurs.

    Raises:
        InputError: a vector has the wrong size; a number is missing, NaN or infinite; or a value is not a number.
    """
    column = plain_array(column)
    at = ColumnPlace(column, field, first_row, source)
    if size == 1 and not is_list(column.type) and not is_text(column.type):
        numbers, _, flags = canonical_numbers(column, field, first_row=first_row, source=source)
        vectors = numbers.astype(np.float32).reshape(-1, 1)
        at.fail(np.isinf(vectors[:, 0]), "the number is too large for a float32; scale it down")
        return vectors, flags & np.uint8(Fallback.MISSING)
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.float32()))
    elif is_text(column.type):
        column = _parsed(column, size, at)
    elif is_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    else:
        at.fail(pc.is_valid(column), f"must be a list of {size} numbers, or a string such as '[0.5, -1]'")
        column = pa.nulls(len(column), pa.list_(pa.float32()))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if (wrong := (lengths != size) & (lengths > 0)).any():
        at.fail(wrong, f"has {lengths[wrong.argmax()]} numbers, but this field's vectors have size={size}")
    present = np.flatnonzero(lengths)
    values = column.flatten()
    try:
        numbers = values.cast(pa.float32(), safe=False)
    except pa.ArrowException as error:
        at.fail(lengths > 0, f"must be a list of numbers, not of {values.type} ({error})")
        raise
    vectors = np.full((len(column), size), np.nan, dtype=np.float32)
    vectors[present] = numbers.to_numpy(zero_copy_only=False).reshape(-1, size)
    finite = np.isfinite(vectors).all(axis=1)
    at.fail(
        (lengths > 0) & ~finite,
        "a number of the vector is missing, NaN, or infinite as a float32; drop the row, or leave the whole vector "
        "empty if it is unknown",
    )
    return vectors, np.where(lengths > 0, 0, np.uint8(Fallback.MISSING)).astype(np.uint8)


def _parsed(texts: pa.Array, size: int, at: ColumnPlace) -> pa.Array:
    """Parses lists of numbers written as JSON. If `size` is 1, a number may also stand without brackets."""
    stripped = pc.utf8_trim_whitespace(texts.cast(pa.string()))
    stripped = pc.if_else(pc.equal(stripped, ""), None, stripped)
    are_lists = pc.match_substring_regex(stripped, _A_LIST)
    if size > 1:
        at.fail(pc.invert(are_lists), f"must be a list of {size} numbers as JSON, such as [0.5, -1]")
    inner = pc.utf8_trim_whitespace(pc.replace_substring_regex(stripped, _A_LIST, r"\1"))
    split = pc.split_pattern(pc.if_else(pc.equal(inner, ""), None, inner), ",")
    words = pc.utf8_trim_whitespace(split.flatten())
    try:
        numbers = words.cast(pa.float64())
    except pa.ArrowInvalid:
        rows = np.repeat(np.arange(len(texts)), pc.fill_null(pc.list_value_length(split), 0).to_numpy(False))
        wrong = np.zeros(len(texts), dtype=bool)
        wrong[rows[[not spells_number(word) for word in words]]] = True
        at.fail(wrong, "a number of the vector can't be read; write it with digits and a decimal point")
        raise
    return pa.ListArray.from_arrays(split.offsets, numbers, mask=pc.is_null(split))
