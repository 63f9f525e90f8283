"""Files of rows -> Arrow tables with the wanted columns, in a stream."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from flip_hf.data.schema import InputError
from flip_hf.data.tables import _wanted

# How much of a CSV file is parsed at a time; a row must fit into it, and Arrow reads some 32 of these ahead.
_CSV_BLOCK_BYTES = 1 << 22


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
