"""Writers of tables as Parquet, CSV or JSON Lines; the file's name selects the format."""

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
    """Writes tables of the same schema one after another. It is a context manager that completes the file."""

    def __init__(self, sink: Any, schema: pa.Schema) -> None: ...

    def write_table(self, table: pa.Table) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class JsonLinesWriter:
    """Writes one JSON object per row.

    Numbers have their shortest decimal spelling, and NaN becomes null. JSON has no type for decimals and times, so they
    become strings such as `"5.00"` and `"2024-01-31 10:00:00"`. JSON has no infinity either; `check_values` refuses it.

    Args:
        sink: a binary file.
        schema: schema of the tables.
    """

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        self._sink = sink
        self._as_text = [i for i, kind in enumerate(schema.types) if _is_text_in_json(kind)]
        self._as_double = [i for i, kind in enumerate(schema.types) if kind in (pa.float16(), pa.float32())]

    def write_table(self, table: pa.Table) -> None:
        for i in self._as_text:
            table = table.set_column(i, table.column_names[i], table.column(i).cast(pa.string()))
        for i in self._as_double:
            # Convert through text. A direct cast would turn 0.1 in single precision into 0.10000000149011612.
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
"""Writers by the ending of the file's name."""


def ending_of(path: Path) -> str:
    """Returns the ending of a file's name that is a key of `WRITERS`.

    Raises:
        ValueError: the name has none of these endings.
    """
    for ending in WRITERS:
        if path.name.lower().endswith(ending):
            return ending
    raise ValueError(f"output={path}: the name must select a format; end it in one of {', '.join(WRITERS)}")


def open_writer(sink: Any, ending: str, schema: pa.Schema) -> TableWriter:
    """Creates a writer of tables to an open file.

    Args:
        sink: a binary file.
        ending: ending of the file's name, a key of `WRITERS`.
        schema: schema of the tables.

    Raises:
        InputError: the format can't store the type of a column.
    """
    for column in schema:
        if not _can_hold(ending, column):
            message = f"a {ending} file can't store values of the type {column.type}; write .parquet instead"
            raise InputError(message, field=column.name)
    return WRITERS[ending](sink, schema)


def check_values(ending: str, table: pa.Table, first_row: int, source: str) -> None:
    """Checks that a format can store the values of a table.

    Args:
        ending: ending of the file's name, a key of `WRITERS`.
        table: the rows.
        first_row: number of the first row, for the error.
        source: origin of the rows, for the error.

    Raises:
        InputError: a number is infinite, and JSON has no infinity.
    """
    if WRITERS[ending] is not JsonLinesWriter:
        return
    for column in table.schema:
        if "float" in str(column.type) or "double" in str(column.type):
            for row, value in enumerate(table[column.name].to_pylist(), first_row):
                if _has_infinity(value):
                    message = "JSON can't store infinity; write .parquet or .csv instead, or do not keep this column"
                    raise InputError(message, source=source, field=column.name, row=row, value=value)


def check_output_folder(folder: Path, setting: str) -> None:
    """Raises ValueError if a folder can't be created because it, or a folder above it, is a file.

    Args:
        folder: folder to write to.
        setting: name of its setting, for the error.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{setting}={folder}: {place} is a file; choose another folder")
            return


def check_output(output: Path, inputs: Iterable[Place | None]) -> None:
    """Checks that writing a file does not overwrite an input.

    Args:
        output: file to write.
        inputs: files, folders or patterns that are read, or lists of these; URLs and None are skipped.

    Raises:
        ValueError: the output is an input, possibly under another name, or is inside an input folder; or it is a
            folder, or a folder above it is a file.
    """
    if output.is_dir():
        raise ValueError(f"output={output} is a folder; set it to a file")
    check_output_folder(output.parent, "the folder of output")
    parts = [part for place in inputs if place for part in ([place] if isinstance(place, str | Path) else place)]
    for source in [Path(found) for part in parts for found in (part, *glob.glob(str(part), recursive=True))]:
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"output={output} is inside the input folder {source}; choose another folder")
        if output.exists() and source.exists() and os.path.samefile(output, source):
            raise ValueError(f"output={output} would overwrite the input {source}; choose another file")


def _can_hold(ending: str, column: pa.Field) -> bool:
    writer = WRITERS[ending]
    try:
        with writer(pa.BufferOutputStream(), pa.schema([column])):
            # Binary values need not be valid text, so only Parquet can store them.
            return writer is pq.ParquetWriter or "binary" not in str(column.type)
    except pa.ArrowException:
        return False


def _has_infinity(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_has_infinity, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isinf(value)


def _is_text_in_json(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or pa.types.is_decimal(kind)
