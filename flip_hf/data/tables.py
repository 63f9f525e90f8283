"""Converts rows in any supported form to Arrow tables with the wanted columns."""

import logging
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from flip_hf.data.schema import InputError, canonical_numbers, canonical_strings

logger = logging.getLogger(__name__)

_already_ignored: set[tuple[str, ...]] = set()
Contents = Literal["ids", "numbers", "lists", "texts", "vectors"]
"""How to read a column of Python objects of mixed types."""

# With these contents, a row holds a list of values.
_SEVERAL = ("lists", "vectors")
# NumPy time units that Arrow lacks, and the units to convert them to.
_ARROW_UNITS = {"Y": "M8[D]", "M": "M8[D]", "W": "M8[D]", "h": "M8[s]", "m": "M8[s]"}
# Arrow may convert these types to float64; it raises if a number would change.
_WIDE = {int, float, np.float64}
# The errors that Arrow raises if it can't convert Python objects to an array.
_NOT_ARROW = (pa.ArrowException, OverflowError, TypeError, ValueError)


def to_table(
    rows: Any,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    contents: Mapping[str, Contents] | None = None,
    first_row: int = 0,
    source: str | None = None,
) -> pa.Table:
    """Selects the wanted columns of some rows and returns them unconverted. `data.schema` interprets the values.

    The exception is a column that Arrow can't hold: values of several Python types, or integers beyond 64 bits. Such a
    column is converted to strings (or lists of strings) by the rules of `data.schema`.

    Args:
        rows: a list of dicts, one dict, a dict of columns, a pandas DataFrame, an Arrow table or record batch, a
            `datasets.Dataset`, or any object with `__arrow_c_stream__` or `__arrow_c_array__`, such as a polars
            DataFrame.
        columns: names of the required columns, in the order of the result.
        optional: names of columns to take if they exist.
        contents: the contents of each column, by name; "ids" by default.
        first_row: row number of the first row, for error messages.
        source: name of the file, for error messages.

    Raises:
        InputError: a column is missing or repeated; columns differ in length; a row lacks a key; or a column of
            mixed types holds a value that can't be an id.
    """
    contents = contents or {}
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        return rows.select(wanted_columns(rows.column_names, columns, optional, source))
    if isinstance(rows, pd.DataFrame):
        names = [str(name) for name in rows.columns]
        wanted = wanted_columns(names, columns, optional, source)
        return _from_columns({name: rows.iloc[:, names.index(name)] for name in wanted}, contents, first_row, source)
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        there = ", ".join(map(repr, rows))
        raise InputError(f"these rows have several splits, {there}; select one, such as rows['train']", source=source)
    if isinstance(rows, Mapping):
        wanted = wanted_columns(list(rows), columns, optional, source)
        values = {name: rows[name] for name in wanted}
        # If another field shows that this is a single row, a list is that row's value and not a column.
        is_row = any(_is_scalar(v) for k, v in values.items() if contents.get(k) not in _SEVERAL)
        wrapped = {
            k: [v] if _is_scalar(v) or (is_row and contents.get(k) in _SEVERAL) else v for k, v in values.items()
        }
        return _from_columns(wrapped, contents, first_row, source)
    if hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        wanted = wanted_columns(rows.column_names, columns, optional, source)
        return as_arrow(rows.select_columns(wanted))[:].select(wanted)
    if isinstance(rows, pd.Series):
        raise InputError("a Series may be a column or a row; pass a DataFrame, or a dict of columns", source=source)
    if hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        table = _handed_over(rows, source)
        return table.select(wanted_columns(table.column_names, columns, optional, source))
    if not isinstance(rows, Iterable):
        raise InputError("rows must be a list of dicts, a dict of lists or a table", source=source, value=rows)
    return _from_dicts(list(rows), columns, optional, contents, first_row, source)


def column_names(rows: Any) -> list[str]:
    """Returns the column names of rows in any form that `to_table` takes, or of a stream; none if they are unknown.

    For a list of dicts, or an `IterableDataset` that does not know its columns, returns the keys of the first row.
    """
    if isinstance(rows, datasets.IterableDataset) and rows.column_names is None:
        rows = list(rows.take(1))
    if isinstance(rows, list | tuple):
        rows = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    names = rows if isinstance(rows, Mapping) else getattr(rows, "column_names", getattr(rows, "columns", ()))
    return [str(name) for name in names]


def as_arrow(dataset: Any) -> Any:
    """Formats a `datasets.Dataset` to return Arrow tables. Raises the errors of `refuse_transform`."""
    refuse_transform(dataset)
    return dataset.with_format("arrow")


def refuse_transform(dataset: Any) -> None:
    """Raises InputError if a `datasets.Dataset` or `IterableDataset` has a transform, which would be ignored."""
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise InputError(
            "the dataset has a transform (set_transform), which would be ignored; apply it with dataset.map, or "
            "remove it with dataset.reset_format()"
        )


def typed_columns(values: Mapping[str, list[Any]], features: datasets.Features | None) -> Any:
    """Converts a batch of a streaming dataset, a dict of columns, to an Arrow table if the stream's types are known."""
    if features is None:
        return values
    kinds = {field.name: field.type for field in features.arrow_schema}
    return pa.table({name: pa.array(column, kinds[name]) for name, column in values.items()})


def _handed_over(rows: Any, source: str | None) -> pa.Table:
    schema = getattr(rows, "schema", None)
    if isinstance(schema, Mapping):
        for name, kind in schema.items():
            # polars would pass memory addresses instead of these values.
            if str(kind) == "Object":
                message = "the column holds polars objects, which can't be read; cast it to strings or numbers"
                raise InputError(message, source=source, field=str(name))
    try:
        return pa.table(rows)
    except _NOT_ARROW as error:
        raise InputError(
            f"rows must be a table that Arrow can read ({error}); pass a DataFrame", source=source
        ) from error


def _from_columns(
    values: Mapping[str, Any], contents: Mapping[str, Contents], first_row: int, source: str | None
) -> pa.Table:
    for name, column in values.items():
        if isinstance(column, Mapping | Set):
            raise InputError("a column must be a list or an array", source=source, field=name, value=column)
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise InputError(f"columns must have the same length, but {described} values", source=source)
    return pa.table(
        {name: _to_array(column, contents.get(name, "ids"), name, first_row, source) for name, column in values.items()}
    )


def _from_dicts(
    rows: list[Any],
    columns: Sequence[str],
    optional: Sequence[str],
    contents: Mapping[str, Contents],
    first_row: int,
    source: str | None,
) -> pa.Table:
    for number, row in enumerate(rows, first_row):
        if not isinstance(row, Mapping):
            raise InputError("a row must be a dict with the fields as keys", source=source, row=number, value=row)
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else [*columns, *optional]
    wanted = wanted_columns(names, columns, optional, source)
    for number, row in enumerate(rows, first_row):
        for name in wanted:
            if name not in row:
                message = "the row lacks this field; use None for a missing value"
                raise InputError(message, source=source, field=name, row=number)
    values = {name: [row[name] for row in rows] for name in wanted}
    return _from_columns(values, contents, first_row, source)


def wanted_columns(
    names: Sequence[Any], columns: Sequence[str], optional: Sequence[str], source: str | None
) -> list[str]:
    """Checks the column names and returns those to take: the required ones, then the optional ones that exist."""
    if repeated := [str(name) for name, count in Counter(names).items() if count > 1]:
        raise InputError("the column occurs twice; rename or drop one", source=source, field=repeated[0])
    if absent := [name for name in columns if name not in names]:
        there = ", ".join(repr(name) for name in names) or "none"
        raise InputError(f"the column is missing; the columns are: {there}", source=source, field=absent[0])
    extra = tuple(sorted(str(name) for name in {*names} - {*columns, *optional}))
    if extra and extra not in _already_ignored:
        _already_ignored.add(extra)
        logger.warning("ignoring columns that are not fields: %s", ", ".join(map(repr, extra)))
    return [*columns, *(name for name in optional if name in names)]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bytes) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0


def _to_array(
    values: Any, contents: Contents, field: str, first_row: int, source: str | None
) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if not isinstance(values, pd.Series):
        if hasattr(values, "__arrow_c_stream__"):
            return pa.chunked_array(values)
        if hasattr(values, "__arrow_c_array__"):
            return pa.array(values)
    if contents == "vectors":
        return _vectors(values, field, first_row, source)
    # In a mixed column, Arrow would convert integers to floats, which is right for numbers only. It would also widen
    # floats of lower precision. It can't mix other types at all.
    mixed = isinstance(values, list | tuple) or isinstance(getattr(values, "dtype", None), np.dtypes.ObjectDType)
    types = {type(v) for v in values if v is not None} if mixed else set()
    if (len(types) <= 1 and not _mixes_zones(values, types)) or (contents == "numbers" and types <= _WIDE):
        with suppress(*_NOT_ARROW):
            return _from_python(values, types)
    as_one_type = _CONVERSIONS[contents]
    converted = [as_one_type(v, field, row, source) for row, v in enumerate(values, first_row)]
    try:
        return pa.array(converted, pa.list_(pa.string()) if contents == "lists" else pa.string())
    except UnicodeEncodeError as error:
        message = "the text holds half of a surrogate pair, which is not valid Unicode; repair it"
        row = next(
            i for i, v in enumerate(converted) if v is not None and error.object in (v if contents == "lists" else [v])
        )
        raise InputError(message, source=source, field=field, row=first_row + row, value=error.object) from error


def _vectors(values: Any, field: str, first_row: int, source: str | None) -> pa.Array:
    """Converts vectors (lists or a 2-D NumPy array) to lists of numbers. Keeps strings, which may spell lists."""
    if getattr(values, "ndim", 1) == 2:
        rows = np.ascontiguousarray(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    with suppress(*_NOT_ARROW):
        return pa.array(values, from_pandas=True)
    converted = []
    for row, value in enumerate(values, first_row):
        try:
            converted.append(None if _is_nothing(value) else np.asarray(value, np.float64).reshape(-1))
        except (TypeError, ValueError) as error:
            message = "must be a list of numbers, as in other rows of this column"
            raise InputError(message, source=source, field=field, row=row, value=value) from error
    return pa.array(converted, pa.list_(pa.float64()))


def _from_python(values: Any, types: Set[type]) -> pa.Array:
    """Converts values of one type to an Arrow array. Times keep all their digits."""
    if any(issubclass(kind, pd.Timestamp) for kind in types):
        # Arrow would read them as Python datetimes, without nanoseconds.
        values = pd.Series(list(values))
    elif any(issubclass(kind, np.datetime64) for kind in types):
        values = np.array(list(values), dtype="datetime64")
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        # Arrow has no other units.
        unit = np.datetime_data(values.dtype)[0]
        values = values.astype(_ARROW_UNITS.get(unit, values.dtype))
    return pa.array(values, from_pandas=True)


def _mixes_zones(values: Any, types: Set[type]) -> bool:
    """Whether only some of the times have a time zone. Arrow would read them as if all had one."""
    are_times = any(issubclass(kind, datetime) for kind in types)
    return are_times and len({v.tzinfo is None for v in values if v is not None and v is not pd.NaT}) > 1


def _as_number(value: Any, field: str, row: int, source: str | None) -> str | None:
    """Converts one number of a column of mixed types to a string."""
    if isinstance(value, str) or _is_nothing(value):
        return value if isinstance(value, str) else None
    value = _number(value)
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    if isinstance(value, numbers.Number | Decimal):
        return str(value)
    message = f"a number can't be of type {type(value).__name__}; store it as an integer or a float"
    raise InputError(message, source=source, field=field, row=row, value=value)


def _as_text(value: Any, field: str, row: int, source: str | None) -> str | None:
    """Converts one text of a column of mixed types to a string."""
    value = _number(value)
    if isinstance(value, float | np.floating | Decimal) and not _is_small_whole(value):
        alone = pa.array([_as_number(value, field, row, source)], pa.string())
        text: str | None = canonical_numbers(alone, field, first_row=row, source=source)[1][0].as_py()
        return text
    return _as_string(value, field, row, source)


def _as_strings(value: Any, field: str, row: int, source: str | None) -> list[str | None] | None:
    """Converts one row's list of values, in a column of mixed types, to strings."""
    if _is_nothing(value) or (isinstance(value, float) and value != value):
        return None
    if _is_scalar(value) or isinstance(value, Mapping):
        message = "must be a list of values here, as in other rows of this column"
        raise InputError(message, source=source, field=field, row=row, value=value)
    return [_as_string(v, field, row, source) for v in value]


def _as_string(value: Any, field: str, row: int, source: str | None) -> str | None:
    """Converts one value of a column of mixed types to a string."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    elif isinstance(value, numbers.Integral):
        # Python refuses to print integers of more than 4300 digits.
        with suppress(ValueError):
            return str(int(value))
    elif isinstance(value, float) and _is_small_whole(value):
        # A shortcut: `canonical_strings` below takes a hundred times as long per value.
        return str(int(value))
    elif isinstance(value, float) and value != value:
        return None
    value = _number(value)
    try:
        alone = _from_python([value], {type(value)})
    except _NOT_ARROW as error:
        message = f"an id can't be of type {type(value).__name__}; store it as a string or an integer"
        raise InputError(message, source=source, field=field, row=row, value=value) from error
    string: str | None = canonical_strings(alone, field, first_row=row, source=source)[0][0].as_py()
    return string


def _number(value: Any) -> Any:
    """Unwraps a NumPy array or PyTorch tensor that holds one number. Returns anything else unchanged."""
    if not hasattr(value, "__array__"):
        return value
    # Several numbers stay an array. Types that NumPy lacks, such as bfloat16, stay a tensor.
    with suppress(TypeError):
        return np.asarray(value)[()]
    return value


def _is_nothing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT


def _is_small_whole(value: Any) -> bool:
    return math.isfinite(value) and bool(abs(value) < 2**53 and value == int(value))


_CONVERSIONS: dict[Contents, Callable[[Any, str, int, str | None], Any]] = {
    "ids": _as_string,
    "numbers": _as_number,
    "lists": _as_strings,
    "texts": _as_text,
}
