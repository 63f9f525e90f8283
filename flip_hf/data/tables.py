"""Rows in whatever form users hold them -> Arrow tables with the wanted columns."""

import csv
import io
import logging
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from flip_hf.configuration_flip import printable
from flip_hf.data.schema import InputError, canonical_numbers, canonical_strings

logger = logging.getLogger(__name__)

_already_ignored: set[tuple[str, ...]] = set()
# How much of a CSV file is parsed at a time; a row must fit into it, and Arrow reads some 32 of these ahead.
_CSV_BLOCK_BYTES = 1 << 22
Contents = Literal["ids", "numbers", "lists", "texts"]
"""What a column of Python objects of several types is to be read as."""

# Numbers that a float64 holds as they are, or else Arrow says so.
_WIDE = {int, float, np.float64}
# What Arrow raises where it can't make an array of Python objects.
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
    """The wanted columns of some rows, as they are: what a value means is `data.schema`'s to say.

    Only where a column holds values of several Python types, or integers beyond 64 bits, is it turned into strings (or
    lists of strings) here, by the rules of `data.schema`, since Arrow can't hold it.

    Args:
        rows: a list of dicts, one dict, a dict of columns, a pandas DataFrame, an Arrow table or record batch, a
            `datasets.Dataset`, or anything that hands over Arrow data by `__arrow_c_stream__` or `__arrow_c_array__`,
            such as a polars DataFrame.
        columns: names of the columns that must be there, in the order of the result.
        optional: names of columns that are taken where they are there.
        contents: what columns hold, by name; "ids" where left out.
        first_row: number of the first row, for errors.
        source: the file, for errors.

    Raises:
        InputError: a column is missing or there twice, columns differ in length, a row lacks a key, or a column of
            several types holds a value that can't be an id.
    """
    contents = contents or {}
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        return rows.select(_wanted(rows.column_names, columns, optional, source))
    if isinstance(rows, pd.DataFrame):
        names = [str(name) for name in rows.columns]
        wanted = _wanted(names, columns, optional, source)
        return _from_columns({name: rows.iloc[:, names.index(name)] for name in wanted}, contents, first_row, source)
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        there = ", ".join(map(repr, rows))
        raise InputError(f"these are several splits, {there}; take one of them, such as rows['train']", source=source)
    if isinstance(rows, Mapping):
        wanted = _wanted(list(rows), columns, optional, source)
        values = {name: rows[name] for name in wanted}
        # A row's list of values is no column where another field says that there is one row.
        is_row = any(_is_scalar(v) for k, v in values.items() if contents.get(k) != "lists")
        wrapped = {k: [v] if _is_scalar(v) or (is_row and contents.get(k) == "lists") else v for k, v in values.items()}
        return _from_columns(wrapped, contents, first_row, source)
    if hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        wanted = _wanted(rows.column_names, columns, optional, source)
        return rows.select_columns(wanted).with_format("arrow")[:].select(wanted)
    if hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        table = pa.table(rows)
        return table.select(_wanted(table.column_names, columns, optional, source))
    if not isinstance(rows, Iterable):
        raise InputError("rows must be a list of dicts, a dict of lists or a table", source=source, value=rows)
    return _from_dicts(list(rows), columns, optional, contents, first_row, source)


def _from_columns(
    values: Mapping[str, Any], contents: Mapping[str, Contents], first_row: int, source: str | None
) -> pa.Table:
    for name, column in values.items():
        if isinstance(column, Mapping | Set):
            raise InputError("a column must be a list or an array", source=source, field=name, value=column)
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise InputError(f"columns must be equally long, but {described} values", source=source)
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
    wanted = _wanted(names, columns, optional, source)
    for number, row in enumerate(rows, first_row):
        for name in wanted:
            if name not in row:
                message = "the row lacks this field; None says that a value is missing"
                raise InputError(message, source=source, field=name, row=number)
    values = {name: [row[name] for row in rows] for name in wanted}
    return _from_columns(values, contents, first_row, source)


def _wanted(names: Sequence[Any], columns: Sequence[str], optional: Sequence[str], source: str | None) -> list[str]:
    """The names of the columns to take, once it is sure that they can be taken."""
    if repeated := [str(name) for name, count in Counter(names).items() if count > 1]:
        raise InputError("the column is there twice; rename or drop one", source=source, field=repeated[0])
    if absent := [name for name in columns if name not in names]:
        there = ", ".join(repr(name) for name in names) or "none"
        raise InputError(f"the column is missing; the columns there are: {there}", source=source, field=absent[0])
    extra = tuple(sorted(str(name) for name in {*names} - {*columns, *optional}))
    if extra and extra not in _already_ignored:
        _already_ignored.add(extra)
        logger.warning("ignoring columns that are not fields: %s", printable(", ".join(extra)))
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
    # Arrow would make floating-point numbers of integers that stand beside them, which only numbers may become, and
    # widen those of lower precision; it can't mix other types at all.
    mixed = isinstance(values, list | tuple) or isinstance(getattr(values, "dtype", None), np.dtypes.ObjectDType)
    types = {type(v) for v in values if v is not None} if mixed else set()
    if (len(types) <= 1 and not _mixes_zones(values, types)) or (contents == "numbers" and types <= _WIDE):
        with suppress(*_NOT_ARROW):
            return pa.array(values, from_pandas=True)
    as_one_type = _CONVERSIONS[contents]
    converted = [as_one_type(v, field, row, source) for row, v in enumerate(values, first_row)]
    try:
        return pa.array(converted, pa.list_(pa.string()) if contents == "lists" else pa.string())
    except UnicodeEncodeError as error:
        message = "text with half of a surrogate pair, which is not Unicode; mend it"
        row = next(
            i for i, v in enumerate(converted) if v is not None and error.object in (v if contents == "lists" else [v])
        )
        raise InputError(message, source=source, field=field, row=first_row + row, value=error.object) from error


def _mixes_zones(values: Any, types: Set[type]) -> bool:
    """Whether some of the times have a zone and others have none, which Arrow reads as if all had."""
    are_times = any(issubclass(kind, datetime) for kind in types)
    return are_times and len({v.tzinfo is None for v in values if v is not None and v is not pd.NaT}) > 1


def _as_number(value: Any, field: str, row: int, source: str | None) -> str | None:
    """One number of a column of several types."""
    if isinstance(value, str) or value is None or value is pd.NA:
        return None if value is pd.NA else value
    if hasattr(value, "__array__"):
        # A NumPy or PyTorch number; what holds several stays an array.
        value = np.asarray(value)[()]
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    if isinstance(value, numbers.Number | Decimal):
        return str(value)
    message = f"a number can't be of type {type(value).__name__}; store it as an integer or a float"
    raise InputError(message, source=source, field=field, row=row, value=value)


def _as_text(value: Any, field: str, row: int, source: str | None) -> str | None:
    """One text of a column of several types."""
    if isinstance(value, float | np.floating | Decimal) and not _is_small_whole(value):
        alone = pa.array([_as_number(value, field, row, source)], pa.string())
        text: str | None = canonical_numbers(alone, field, first_row=row, source=source)[1][0].as_py()
        return text
    return _as_string(value, field, row, source)


def _as_strings(value: Any, field: str, row: int, source: str | None) -> list[str | None] | None:
    """The values of one row of a column of several types."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if _is_scalar(value) or isinstance(value, Mapping):
        message = "must be a list of values here, as in other rows of this column"
        raise InputError(message, source=source, field=field, row=row, value=value)
    return [_as_string(v, field, row, source) for v in value]


def _as_string(value: Any, field: str, row: int, source: str | None) -> str | None:
    """One value of a column of several types."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    elif isinstance(value, numbers.Integral):
        # Python refuses to write whole numbers of over 4300 digits.
        with suppress(ValueError):
            return str(int(value))
    elif isinstance(value, float) and _is_small_whole(value):
        # What is left to `canonical_strings` below costs a hundred times as much a value.
        return str(int(value))
    elif isinstance(value, float) and value != value:
        return None
    elif hasattr(value, "__array__"):
        # A NumPy or PyTorch number; what holds several stays an array.
        value = np.asarray(value)[()]
    try:
        alone = pa.array([value], from_pandas=True)
    except _NOT_ARROW as error:
        message = f"an id can't be of type {type(value).__name__}; store it as a string or an integer"
        raise InputError(message, source=source, field=field, row=row, value=value) from error
    string: str | None = canonical_strings(alone, field, first_row=row, source=source)[0][0].as_py()
    return string


def _is_small_whole(value: Any) -> bool:
    return math.isfinite(value) and bool(abs(value) < 2**53 and value == int(value))


_CONVERSIONS: dict[Contents, Callable[[Any, str, int, str | None], Any]] = {
    "ids": _as_string,
    "numbers": _as_number,
    "lists": _as_strings,
    "texts": _as_text,
}


def _stream_csv(
    path: Path, columns: Sequence[str], optional: Sequence[str], batch_rows: int, *, delimiter: str
) -> Iterator[pa.Table]:
    source = str(path)
    compression = "gzip" if path.name.lower().endswith(".gz") else None
    names: list[str] = []
    try:
        with pa.input_stream(source, compression=compression) as stream:
            names, is_empty = _csv_header(stream, delimiter, source)
        wanted = _wanted(names, columns, optional, source)
        if is_empty:
            yield pa.schema([(name, pa.string()) for name in wanted]).empty_table()
            return
        with (
            pa.input_stream(source, compression=compression) as stream,
            pv.open_csv(
                stream,
                # With several threads Arrow's errors do not say the row.
                read_options=pv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
                parse_options=pv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pv.ConvertOptions(
                    include_columns=wanted,
                    column_types=dict.fromkeys(wanted, pa.string()),
                    strings_can_be_null=False,
                ),
            ) as reader,
        ):
            for batch in reader:
                for start in range(0, batch.num_rows, batch_rows):
                    yield pa.Table.from_batches([batch.slice(start, batch_rows)])
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise _csv_error(str(error), source, names) from error


def _csv_header(stream: Any, delimiter: str, source: str) -> tuple[list[str], bool]:
    """The columns' names, and whether no row follows. Arrow stops at a header that no line break ends."""
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    names = next((row for row in csv.reader(lines, delimiter=delimiter) if row), None)
    if names is None:
        raise InputError("the file is empty; its first line must name the columns", source=source)
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            value = name.encode("utf-8", "surrogateescape")
            raise InputError(
                "the header is not UTF-8; convert the file to UTF-8", source=source, value=value
            ) from error
    return names, not any(line.strip("\r\n") for line in lines)


def _csv_error(text: str, source: str, names: Sequence[str]) -> InputError:
    row = re.search(r"Row #(\d+)", text)
    # Arrow counts rows from 1 and the header as one, over the whole file.
    number = int(row.group(1)) - 2 if row else None
    if ragged := re.search(r"Expected (\d+) columns, got (\d+): (.*)", text, re.DOTALL):
        expected, got, value = ragged.groups()
        message = f"the row has {got} values and the header {expected}; mend the row, or quote what holds a delimiter"
        return InputError(message, source=source, row=number, value=value)
    if "UTF8" in text:
        column = re.search(r"CSV column #(\d+)", text)
        field = names[int(column.group(1))] if column else None
        return InputError("not UTF-8; convert the file to UTF-8", source=source, field=field, row=number)
    if "straddling" in text:
        size = f"{_CSV_BLOCK_BYTES >> 20} MiB"
        return InputError(f"a row is longer than {size}, or a quote is never closed; mend the file", source=source)
    return InputError(f"not a readable CSV file ({text}); write or fetch it again", source=source, row=number)


def _stream_parquet(path: Path, columns: Sequence[str], optional: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
    rows_read = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = _wanted(schema.names, columns, optional, str(path))
            for batch in file.iter_batches(batch_rows, columns=wanted):
                yield pa.Table.from_batches([batch]).select(wanted)
                rows_read += batch.num_rows
            if rows_read == 0:
                yield schema.empty_table().select(wanted)
    except (pa.ArrowException, OSError) as error:
        message = f"not readable as Parquet from row {rows_read} on ({error}); write or fetch the file again"
        raise InputError(message, source=str(path)) from error


_Reader = Callable[[Path, Sequence[str], Sequence[str], int], Iterator[pa.Table]]
_read_commas: _Reader = partial(_stream_csv, delimiter=",")
_read_tabs: _Reader = partial(_stream_csv, delimiter="\t")

READERS: dict[str, _Reader] = {
    ".csv": _read_commas,
    ".csv.gz": _read_commas,
    ".tsv": _read_tabs,
    ".tsv.gz": _read_tabs,
    ".parquet": _stream_parquet,
}
"""What a file's name ends in -> what reads such a file."""


def stream_tables(
    path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), batch_rows: int = 8192
) -> Iterator[pa.Table]:
    """The wanted columns of a file's rows, in tables of at most `batch_rows` rows; memory does not grow with the file.

    All values of a CSV file are read as strings: `007` stays as it is, and only what is empty is missing. Empty lines
    are passed over. A file without rows gives one table without rows. In errors, rows are counted from 0, without the
    header and over the whole file.

    Args:
        path: a file whose name ends in one of `READERS`; a CSV file is UTF-8 and its first line names the columns.
        columns: names of the columns that must be there, in the order of the result.
        optional: names of columns that are taken where they are there.
        batch_rows: most rows of a table.

    Raises:
        InputError: there is no such file, it can't be read as what its name says, a column is missing or there twice,
            a row is too short or too long, or bytes are not UTF-8. The first two are raised at once, the others when
            the tables are asked for.
    """
    path = Path(path)
    reader = next((READERS[ending] for ending in READERS if path.name.lower().endswith(ending)), None)
    if reader is None:
        raise InputError(f"can't tell how to read it; a file's name ends in {', '.join(READERS)}", source=str(path))
    if not path.is_file():
        raise InputError("there is no such file", source=str(path))
    return reader(path, columns, optional, batch_rows)


def read_table(path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> pa.Table:
    """The wanted columns of all rows of a file; arguments and errors as in `stream_tables`."""
    return pa.concat_tables(stream_tables(path, columns, optional=optional))


def plain_strings(table: pa.Table) -> pa.Table:
    """A table without dictionaries, which may differ from one part of a file to the next."""
    kinds = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in table.schema]
    return table.cast(pa.schema([f.with_type(kind) for f, kind in zip(table.schema, kinds, strict=True)]))
