"""Files of rows, in the format that their name says."""

import glob
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from flip_hf.data.files import Place
from flip_hf.data.schema import InputError
from flip_hf.standard_json import measures_json


class TableWriter(Protocol):
    """Writes tables of one schema, one after the other, and is a context manager that completes the file."""

    def __init__(self, sink: Any, schema: pa.Schema) -> None: ...

    def write_table(self, table: pa.Table) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class JsonLinesWriter:
    """Writes a JSON object a row.

    Numbers have their shortest decimal spelling; NaN is null. JSON has neither decimals nor times, so they become
    strings, such as `"5.00"` and `"2024-01-31 10:00:00"`. JSON has no infinity: `check_values` refuses it.

    Args:
        sink: a binary file.
        schema: the tables'.
    """

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        self._sink = sink
        self._as_text = [i for i, kind in enumerate(schema.types) if _is_text_in_json(kind)]
        self._as_double = [i for i, kind in enumerate(schema.types) if kind in (pa.float16(), pa.float32())]

    def write_table(self, table: pa.Table) -> None:
        for i in self._as_text:
            table = table.set_column(i, table.column_names[i], table.column(i).cast(pa.string()))
        for i in self._as_double:
            # Through its text: 0.1 in single precision would become 0.10000000149011612.
            text = table.column(i).cast(pa.float32()).cast(pa.string())
            table = table.set_column(i, table.column_names[i], text.cast(pa.float64()))
        for row in table.to_pylist():
            self._sink.write(f"{measures_json(row, ensure_ascii=False, default=str)}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


WRITERS: Mapping[str, type[TableWriter]] = {
    ".parquet": pq.ParquetWriter,
    ".csv": pv.CSVWriter,
    ".csv.gz": pv.CSVWriter,
    ".jsonl": JsonLinesWriter,
    ".jsonl.gz": JsonLinesWriter,
    ".json": JsonLinesWriter,
    ".json.gz": JsonLinesWriter,
}
"""Writers of files, by the ending of the file's name."""


def ending_of(path: Path) -> str:
    """The ending of a file's name, a key of `WRITERS`.

    Raises:
        ValueError: the name has no such ending.
    """
    for ending in WRITERS:
        if path.name.lower().endswith(ending):
            return ending
    raise ValueError(f"output={path}: can't tell what to write; end the name in one of {', '.join(WRITERS)}")


def open_writer(sink: Any, ending: str, schema: pa.Schema) -> TableWriter:
    """A writer of tables into an open file.

    Args:
        sink: a binary file.
        ending: of the file's name, a key of `WRITERS`.
        schema: the tables'.

    Raises:
        InputError: the format can't hold a column of that type.
    """
    for column in schema:
        if not _can_hold(ending, column):
            message = f"a {ending} file can't hold values of the type {column.type}; write .parquet instead"
            raise InputError(message, field=column.name)
    return WRITERS[ending](sink, schema)


def check_values(ending: str, table: pa.Table, first_row: int, source: str) -> None:
    """Checks that a format can hold the values to write.

    Args:
        ending: of the file's name, a key of `WRITERS`.
        table: the rows.
        first_row: number of the first row, for the error.
        source: where the rows come from, for the error.

    Raises:
        InputError: a number is infinite, and JSON has no infinity.
    """
    if WRITERS[ending] is not JsonLinesWriter:
        return
    for column in table.schema:
        if "float" in str(column.type) or "double" in str(column.type):
            for row, value in enumerate(table[column.name].to_pylist(), first_row):
                if _has_infinity(value):
                    message = "JSON has no infinity; write .parquet or .csv instead, or do not keep this column"
                    raise InputError(message, source=source, field=column.name, row=row, value=value)


def check_output_folder(folder: Path, setting: str) -> None:
    """Raises a ValueError if a folder can't be made, because it or a folder above it is a file.

    Args:
        folder: the folder to write to.
        setting: the name of its setting, for the error.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{setting}={folder}: {place} is a file; name another folder")
            return


def check_output(output: Path, inputs: Iterable[Place | None]) -> None:
    """Checks that a file to write overwrites no file that is read.

    Args:
        output: the file to write.
        inputs: files, folders or patterns that are read, or lists of these; URLs and None are passed over.

    Raises:
        ValueError: the output is one of the inputs, under whatever name, or lies in a folder among them; or it is a
            folder, or a folder above it is a file.
    """
    if output.is_dir():
        raise ValueError(f"output={output} is a folder; name a file")
    check_output_folder(output.parent, "the folder of output")
    parts = [part for place in inputs if place for part in ([place] if isinstance(place, str | Path) else place)]
    for source in [Path(found) for part in parts for found in (part, *glob.glob(str(part), recursive=True))]:
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"output={output} lies in the input folder {source}; write it to another one")
        if output.exists() and source.exists() and os.path.samefile(output, source):
            raise ValueError(f"output={output} is the input {source}, which would be overwritten; name another file")


def _can_hold(ending: str, column: pa.Field) -> bool:
    writer = WRITERS[ending]
    try:
        with writer(pa.BufferOutputStream(), pa.schema([column])):
            # Bytes need not be text.
            return writer is pq.ParquetWriter or "binary" not in str(column.type)
    except pa.ArrowException:
        return False


def _has_infinity(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_has_infinity, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isinf(value)


def _is_text_in_json(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or pa.types.is_decimal(kind)
