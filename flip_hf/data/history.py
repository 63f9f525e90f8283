"""Builds user histories: what a user did before each impression, from strictly earlier rows only."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import update_fingerprint

from flip_hf.data.ragged import concatenated_ranges
from flip_hf.data.schema import InputError, canonical_strings

# An Arrow string chunk holds at most 2 GiB, less than the histories of a large log.
_CHUNK_VALUES = 1 << 20

_DATE = r"^\d{4}-\d{2}-\d{2}$"
_MOMENT = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?"
_ZONE = r"(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$"
_ISO_FORMATS = {"a date": _DATE, "a time without a zone": _MOMENT + "$", "a time with a zone": _MOMENT + _ZONE}
_NANOSECOND_DIGITS = 9
_ISO_ADVICE = (
    "convert the column to numbers, dates or timestamps, or write all of its values in one ISO 8601 format: "
    "2024-05-31, 2024-05-31T17:05:09.25 or, with a time zone, 2024-05-31T17:05:09Z"
)


def time_ranks(column: pa.Array | pa.ChunkedArray, field: str) -> np.ndarray:
    """Converts a column of times to whole numbers with exactly the same order.

    Args:
        column: integers, floating-point numbers, decimals, dates, timestamps, durations, or strings. Timestamps with a
            time zone are compared as instants. Strings must all have one ISO 8601 format: `YYYY-MM-DD`, or
            `YYYY-MM-DD[T ]HH:MM:SS[.fraction]` with a zone (`Z` or `+HH:MM`) in all rows or in none.
        field: name of the column, for error messages.

    Returns:
        int64 (rows,): equal for equal times, and smaller for earlier ones.

    Raises:
        InputError: a time is missing (null, NaN, NaT or an empty string), a string's format differs from the others',
            or the column has another type.
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if is_text:
        column = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        column = pc.if_else(pc.equal(column, ""), None, column)
    unknown = pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)
    if unknown.any():
        raise InputError("the row has no time, and so no history; drop it", field=field, row=int(unknown.argmax()))
    if not len(column):
        return np.empty(0, dtype=np.int64)
    if is_text:
        return _ranks(*_parsed_times(column, field))
    if pa.types.is_decimal(kind):
        # A float64 would lose digits, and NumPy has no decimal type.
        ranks = pc.rank(column.cast(pa.decimal256(76, kind.scale)), tiebreaker="dense")
        return ranks.to_numpy().astype(np.int64)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _ranks(column.to_numpy(zero_copy_only=False))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        stored = pa.int32() if pa.types.is_date32(kind) else pa.int64()
        return _ranks(column.view(stored).to_numpy(zero_copy_only=False))
    message = f"a time can't be of type {kind}; {_ISO_ADVICE}"
    raise InputError(message, field=field, row=0, value=column[0].as_py())


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """Returns the dense ranks of rows by one or more keys, most significant key first, int64 (rows,)."""
    order = np.lexsort(keys[::-1])
    is_new = np.zeros(len(order), dtype=bool)
    for key in keys:
        is_new[1:] |= key[order][1:] != key[order][:-1]
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = is_new.cumsum()
    return ranks


def _parsed_times(texts: pa.Array, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Parses ISO times to seconds since 1970 (in UTC if they have zones) and nanoseconds, two int64 arrays (rows,)."""
    matches = {name: pc.match_substring_regex(texts, pattern) for name, pattern in _ISO_FORMATS.items()}
    name = next((name for name, found in matches.items() if found[0].as_py()), None)
    if name is None:
        message = f"not an ISO 8601 time (compared as text, '10' would come before '9'); {_ISO_ADVICE}"
        raise InputError(message, **_at(texts, field, 0))
    is_other = ~matches[name].to_numpy(zero_copy_only=False)
    if is_other.any():
        row = int(is_other.argmax())
        raise InputError(
            f"row 0 holds {name}, {texts[0].as_py()!r}, but this row does not; {_ISO_ADVICE}", **_at(texts, field, row)
        )
    # Fractions are kept apart because nanoseconds since 1970 overflow in 2262.
    wholes = pc.utf8_slice_codeunits(texts, 0, 19)
    try:
        seconds = wholes.cast(pa.timestamp("s")).cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        row = next(row for row, text in enumerate(wholes) if not _is_time(text))
        raise InputError("there is no such day or time; correct it", **_at(texts, field, row)) from error
    if name == "a date":
        return seconds, np.zeros_like(seconds)
    parts = pc.extract_regex(texts, r"^.{19}\.?(?P<digits>\d*)(?P<zone>.*)$")
    digits = pc.utf8_rpad(parts.field("digits"), _NANOSECOND_DIGITS, "0")
    nanoseconds = digits.cast(pa.int64()).to_numpy(zero_copy_only=False)
    zones = parts.field("zone").dictionary_encode()
    offsets = np.array([_offset_seconds(zone) for zone in zones.dictionary.to_pylist()], dtype=np.int64)
    return seconds - offsets[zones.indices.to_numpy(zero_copy_only=False)], nanoseconds


def _at(texts: pa.Array, field: str, row: int) -> dict[str, Any]:
    return {"field": field, "row": row, "value": texts[row].as_py()}


def _is_time(text: pa.Scalar) -> bool:
    try:
        text.cast(pa.timestamp("s"))
    except pa.ArrowInvalid:
        return False
    return True


def _offset_seconds(zone: str) -> int:
    """Returns a time zone's offset from UTC in seconds, positive if ahead."""
    if zone in ("", "Z"):
        return 0
    seconds = 3600 * int(zone[1:3]) + 60 * int(zone[4:6])
    return -seconds if zone[0] == "-" else seconds


def earlier_positions(
    groups: np.ndarray, times: np.ndarray, eligible: np.ndarray, max_values: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds, for each row, the last eligible rows of its group with a strictly smaller time.

    Rows with equal times are never in each other's history. A history is sorted by time, and rows with equal times by
    row number.

    Args:
        groups: int64 (rows,), the group of each row.
        times: (rows,), numbers or dates, all in one unit.
        eligible: bool (rows,), which rows may be part of a history.
        max_values: maximum number of rows of a history, at least 1.

    Returns:
        The offsets at which each row's history starts and ends, int64 (rows + 1,); and the row numbers in the
        histories, oldest first, int64 (offsets[-1],).

    Raises:
        ValueError: a time is NaN or NaT, or `max_values` is not a whole number of at least 1.
    """
    _check_max_values(max_values)
    # Only NaN and NaT differ from themselves.
    unknown = times != times
    if unknown.any():
        raise ValueError(f"row {int(unknown.argmax())} has no time")
    order = np.lexsort((times, groups))
    sorted_groups, sorted_times = groups[order], times[order]
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = sorted_groups[1:] != sorted_groups[:-1]
    new_time = new_group.copy()
    new_time[1:] |= sorted_times[1:] != sorted_times[:-1]
    places = np.arange(len(order))
    group_starts = np.maximum.accumulate(np.where(new_group, places, 0))
    time_starts = np.maximum.accumulate(np.where(new_time, places, 0))
    # The number of eligible rows before each place.
    before = np.append(0, eligible[order].cumsum())
    ends = before[time_starts]
    starts = np.maximum(ends - max_values, before[group_starts])

    lengths = np.empty(len(order), dtype=np.int64)
    lengths[order] = ends - starts
    first = np.empty(len(order), dtype=np.int64)
    first[order] = starts
    return np.append(0, lengths.cumsum()), order[eligible[order]][concatenated_ranges(first, lengths)]


def _check_max_values(max_values: Any) -> None:
    if not isinstance(max_values, int | np.integer) or isinstance(max_values, bool) or max_values < 1:
        raise ValueError(f"max_values={max_values!r} must be a whole number of at least 1")


def add_history(
    dataset: datasets.Dataset,
    name: str,
    *,
    user: str,
    item: str,
    time: str,
    eligible: Any = None,
    max_values: int = 50,
) -> datasets.Dataset:
    """Adds a column that holds the items of the user's earlier rows, most recent last.

    A history holds only rows with a strictly smaller time. The row's own label and later rows therefore can't leak into
    it. Use `eligible` to exclude earlier rows that were not yet known when a row was shown.

    Args:
        dataset: the log; its rows may be in any order.
        name: name of the new column, a list of values with the type of `item`.
        user: name of the user column. Users are compared as ids are (`canonical_strings`): 196 in an integer column and
            196.0 in a float column are one user. A row without a user (null, NaN or blank) has an empty history and is
            in no history.
        item: name of the column whose values make up the history, of any type. A row without an item (null, NaN or
            blank) is in no history.
        time: name of the time column: numbers, dates, timestamps or ISO strings, see `time_ranks`.
        eligible: Booleans (rows,), which rows may be part of a history, such as rows with a like. A NumPy or Arrow
            array, a pandas Series or a list; by default all rows.
        max_values: maximum number of items of a history.

    Raises:
        InputError: a column is missing; a column `name` exists already; a time is missing or can't be read; or a user
            can't be an id.
        ValueError: `dataset` is not a `datasets.Dataset`, `eligible` is not one Boolean per row, or `max_values` is not
            a whole number of at least 1.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"add_history takes a datasets.Dataset, not a {type(dataset).__name__}. Convert a table with "
            "datasets.Dataset.from_pandas(frame) or datasets.Dataset(arrow_table), and select one split of a "
            "DatasetDict. Read a stream into a Dataset first, because a history needs all rows"
        )
    _check_max_values(max_values)
    may_be_part = np.ones(len(dataset), dtype=bool) if eligible is None else _booleans(eligible, len(dataset))
    for column in (user, item, time):
        if column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise InputError(f"the column is missing; the columns are: {there}", field=column)
    if name in dataset.column_names:
        raise InputError("the column exists already; choose another name for the history", field=name)
    table = dataset.with_format("arrow")[:]
    times = time_ranks(table[time], time)
    users = canonical_strings(table[user], user)[0].dictionary_encode()
    known = pc.is_valid(users.indices).to_numpy(zero_copy_only=False)
    # Rows without a user form a group, but none of them is eligible.
    groups = pc.fill_null(users.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    items = table[item].combine_chunks()
    may_be_part = may_be_part & known & ~_is_missing(items)
    offsets, rows = earlier_positions(groups, times, may_be_part, max_values)

    rows_per_chunk = max(1, _CHUNK_VALUES // max_values)
    chunks = []
    for start in range(0, len(dataset), rows_per_chunk):
        bounds = offsets[start : start + rows_per_chunk + 1]
        values = _taken(items, rows[bounds[0] : bounds[-1]])
        chunks.append(pa.ListArray.from_arrays(pa.array((bounds - bounds[0]).astype(np.int32)), values))
    history = pa.chunked_array(chunks, type=pa.list_(items.type))
    features = datasets.Features({**dataset.features, name: datasets.List(dataset.features[item])})
    # Given a fingerprint, Dataset does not join the chunks and hash all values, which is slow and may overflow.
    arguments = {"name": name, "user": user, "item": item, "time": time, "rows": may_be_part, "max_values": max_values}
    fingerprint = update_fingerprint(dataset._fingerprint, add_history, arguments)
    return datasets.Dataset(table.append_column(name, history).cast(features.arrow_schema), fingerprint=fingerprint)


def _booleans(eligible: Any, num_rows: int) -> np.ndarray:
    """Converts `eligible` to bool (rows,). Rejects numbers, and strings because NumPy reads `"0"` as true."""
    values = np.asarray(eligible)
    if values.shape != (num_rows,):
        number = len(values) if values.ndim == 1 else f"{values.ndim} dimensions of"
        raise ValueError(f"eligible has {number} values, but there are {num_rows} rows; give one Boolean per row")
    if values.dtype == bool or not num_rows:
        return values.astype(bool)
    row = next((i for i, value in enumerate(values) if not isinstance(value, bool | np.bool_)), 0)
    raise ValueError(
        f"eligible must hold one Boolean per row; row {row} holds {values.tolist()[row]!r} ({values.dtype}). Use a "
        "comparison, such as labels == 1, and fill in missing values first"
    )


def _is_missing(items: pa.Array) -> np.ndarray:
    """Returns true where an item is null, NaN or a blank string, bool (rows,)."""
    missing = pc.is_null(items, nan_is_null=True)
    if pa.types.is_string(items.type) or pa.types.is_large_string(items.type) or pa.types.is_string_view(items.type):
        texts = items.cast(pa.large_string())
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), False))
    result: np.ndarray = missing.to_numpy(zero_copy_only=False)
    return result


def _taken(items: pa.Array, rows: np.ndarray) -> pa.Array:
    """Returns the items of these rows."""
    # Arrow's take does not support views.
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return items.cast(views.get(items.type, items.type)).take(pa.array(rows)).cast(items.type)
