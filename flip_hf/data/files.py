"""Reads files of rows, local or remote, as a stream of Arrow tables with the wanted columns."""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from glob import has_magic
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as arrow_fs

from flip_hf.data.csv_files import CSVFormat, stream_csv
from flip_hf.data.parquet_groups import groups_of_rows
from flip_hf.data.schema import InputError
from flip_hf.data.tables import wanted_columns

logger = logging.getLogger(__name__)

Place = Sequence[str | Path] | str | Path
"""A file, a folder of files, a pattern such as `logs/*.csv`, an fsspec URL of any of these, or a list of them.

The order of the types matters: the command line tries them in this order.
"""

# The folder name that Hive, Spark and pandas use for a missing value.
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_HASHED_BYTES = 1 << 22
_LOCATED_ROWS = 1 << 16

# User and password may hold commas and brackets, which otherwise end a URL in a list.
_URL = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)([^\s'\"/]*@)?(?P<place>[^\s'\",\]?]*)(?P<query>\?[^\s'\"]*)?"
)


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        filesystem: the file system that holds it.
        path: its path there.
        name: its display name, without credentials.
        partitions: columns from folder names of the form `day=2024-01-01`, as strings.
    """

    filesystem: arrow_fs.FileSystem
    path: str
    name: str
    partitions: dict[str, str | None] = field(default_factory=dict)

    @property
    def ending(self) -> str | None:
        """The key of `READERS` that the file name ends in, or None."""
        # A URL's query is not part of the name.
        name = (self.path.split("?")[0] if "://" in self.path else self.path).lower()
        return next((ending for ending in READERS if name.endswith(ending)), None)


def is_place(rows: Any) -> bool:
    """Whether rows are given as file names: a string, a Path, or a list of these."""
    if isinstance(rows, list | tuple):
        return bool(rows) and all(isinstance(row, str | Path) for row in rows)
    return isinstance(rows, str | Path)


def _entries(place: Place) -> list[str | Path]:
    return [place] if isinstance(place, str | Path) else list(place)


def shown(place: Place) -> str:
    """Returns a place's display name, without the credentials that a URL may hold."""
    return ", ".join(without_credentials(str(entry)) for entry in _entries(place))


def names_of(place: Place) -> list[str]:
    """Returns the last part of each file name, for a record that other people may read."""
    return [PurePath(shown(entry)).name for entry in _entries(place)]


def without_credentials(text: str) -> str:
    """Removes users, passwords and queries from the URLs in a text."""
    return _URL.sub(lambda url: url["scheme"] + url["place"] + _pattern(url["scheme"], url["query"] or ""), text)


def _pattern(scheme: str, query: str) -> str:
    """Returns `query` if its question mark is a wildcard, or "" if it starts the query of a URL."""
    return "" if scheme.startswith("http") or "=" in query.partition("/")[0] else query


def find_files(place: Place) -> list[DataFile]:
    """Finds the files of a place, in the order in which their rows are read: entry by entry, each sorted by path.

    In folders and patterns, skips files and folders whose names start with `.` or `_`, such as Spark's `_SUCCESS`.

    Raises:
        InputError: there is no file, a file name has an unknown ending, or a file is named twice.
    """
    entries = _entries(place)
    if not entries:
        raise InputError("the list of files is empty; name at least one file")
    files = [file for entry in entries for file in _files_of(str(entry))]
    for file in files:
        if file.ending is None:
            message = f"unknown file type; a file's name must end in one of {', '.join(READERS)}"
            raise InputError(message, source=file.name)
    counts = Counter((file.filesystem.type_name, file.path) for file in files)
    for file in files:
        if counts[file.filesystem.type_name, file.path] > 1:
            raise InputError("the file is named twice, so its rows would count twice; name it once", source=file.name)
    return files


def _files_of(entry: str) -> list[DataFile]:
    name = shown(entry)
    if not entry:
        raise InputError("a file name is empty; name a file or a folder")
    try:
        filesystem, path = fsspec.core.url_to_fs(entry) if _is_url(entry) else (LocalFileSystem(), entry)
    # The protocol is unknown, or its package is not installed.
    except (ValueError, ImportError) as error:
        raise InputError(f"can't be opened: {without_credentials(str(error))}", source=name) from error
    path = filesystem._strip_protocol(path)
    is_local = isinstance(filesystem, LocalFileSystem)
    opener = arrow_fs.LocalFileSystem() if is_local else arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(filesystem))
    with _errors_of(filesystem, name):
        kind, reason = _kind(filesystem, path)
        if kind == "file":
            return [DataFile(opener, path, name)]
        if kind == "directory":
            base, found = path.rstrip("/"), filesystem.find(path)
        elif has_magic(path.split("?")[0] if path.startswith("http") else path):
            # The part before the first pattern.
            base = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
            found = [inner for match in filesystem.glob(path) for inner in filesystem.find(match)]
        else:
            message = (
                f"can't be opened ({without_credentials(reason)})"
                if reason
                else "there is no such file; check the path"
            )
            raise InputError(message, source=name)
    files = []
    for inner in sorted(set(found)):
        parts = inner.removeprefix(base).strip("/").split("/")
        if any(_is_hidden(part) for part in parts):
            continue
        shown_name = (
            f"{name.rstrip('/')}/{'/'.join(parts)}" if kind == "directory" else _name_of(filesystem, inner, entry)
        )
        files.append(DataFile(opener, inner, shown_name, _partitions(parts[:-1])))
    if not files:
        message = "the folder holds no files" if kind == "directory" else "no file matches the pattern"
        raise InputError(f"{message}; names that start with '.' or '_' are skipped", source=name)
    return files


def _is_url(entry: str) -> bool:
    return "://" in entry or "::" in entry


def _kind(filesystem: Any, path: str) -> tuple[str | None, str]:
    """Returns "file" or "directory" for a path; if it is neither, None and the server's message."""
    try:
        return filesystem.info(path)["type"], ""
    except FileNotFoundError as error:
        cause = error.__cause__
        return None, f"{type(cause).__name__}: {cause}" if cause else ""


def _name_of(filesystem: Any, path: str, entry: str) -> str:
    if isinstance(filesystem, LocalFileSystem):
        return path if os.path.isabs(entry) else os.path.relpath(path)
    return shown(filesystem.unstrip_protocol(path))


def _is_hidden(part: str) -> bool:
    # Same rule as Spark: the name of a partition column may start with an underscore.
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _partitions(folders: Sequence[str]) -> dict[str, str | None]:
    pairs = [folder.partition("=") for folder in folders if "=" in folder]
    return {unquote(key): None if value == _NO_PARTITION else unquote(value) for key, _, value in pairs}


@contextlib.contextmanager
def _errors_of(filesystem: Any, name: str) -> Iterator[None]:
    """Context manager that adds the file name to errors of its file system."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError("there is no such file; check the path", source=name) from error
    except Exception as error:
        # Each remote file system raises its own error types.
        is_local = isinstance(filesystem, LocalFileSystem | arrow_fs.LocalFileSystem)
        if is_local and not isinstance(error, OSError | ValueError):
            raise
        message = without_credentials(f"{type(error).__name__}: {error}")
        raise InputError(f"can't be read ({message}); check the address and your access", source=name) from error


_Choose = Callable[[Sequence[str]], Sequence[str]]
_Warn = Callable[[str], object]
_Reader = Callable[[DataFile, CSVFormat, _Choose, int, _Warn], Iterator[pa.Table]]


def _stream_csv(
    file: DataFile,
    form: CSVFormat,
    choose: _Choose,
    batch_rows: int,
    warn: _Warn,
    *,
    delimiter: str,
    compression: str | None,
) -> Iterator[pa.Table]:
    with file.filesystem.open_input_stream(file.path, compression=compression) as stream:
        yield from stream_csv(stream, file.name, form, delimiter, choose, batch_rows, warn)


def _stream_parquet(
    file: DataFile, form: CSVFormat, choose: _Choose, batch_rows: int, warn: _Warn
) -> Iterator[pa.Table]:
    rows_read = 0
    try:
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as opened:
            schema = opened.schema_arrow
            wanted = choose(schema.names)
            # Arrow prefetches all row groups that it is asked for, even if nothing consumes the batches.
            for groups in groups_of_rows(opened.metadata, batch_rows):
                for batch in opened.iter_batches(batch_rows, groups, columns=wanted):
                    yield pa.Table.from_batches([batch]).select(wanted)
                    rows_read += batch.num_rows
            if rows_read == 0:
                yield schema.empty_table().select(wanted)
    except (pa.ArrowException, OSError) as error:
        message = f"not readable as Parquet from row {rows_read} on ({error}); write or download the file again"
        raise InputError(message, source=file.name) from error


_COMPRESSIONS = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

READERS: dict[str, _Reader] = {
    ".parquet": _stream_parquet,
    **{
        f"{ending}{suffix}": partial(_stream_csv, delimiter=delimiter, compression=compression)
        for ending, delimiter in ((".csv", ","), (".tsv", "\t"))
        for suffix, compression in _COMPRESSIONS.items()
    },
}
"""Maps the ending of a file name to the reader of such files."""


def stream_tables(
    place: Place,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    batch_rows: int = 8192,
    csv: CSVFormat | None = None,
    warn: Callable[[str], object] = logger.warning,
) -> Iterator[pa.Table]:
    """Streams the wanted columns of all rows of a place, in tables of at most `batch_rows` rows. Memory is bounded.

    CSV values are read as strings, so `007` stays `007`. Empty lines are skipped. Folder names such as `day=2024-01-01`
    (Hive partitions) below a folder or pattern give each file a column of strings, here `day`. A place without rows
    gives one empty table. Errors count rows from 0 within their file, without the header.

    Args:
        place: a file whose name ends in one of `READERS`, a folder of such files, a pattern, a URL, or a list. A CSV
            file must be UTF-8, and its first line must name the columns.
        columns: names of the required columns, in the order of the result.
        optional: names of columns to read if they exist.
        batch_rows: maximum number of rows of a table.
        csv: format of the CSV files; by default `CSVFormat()`.
        warn: called with each warning about a file, once the file is read.

    Raises:
        InputError: there is no such file; the file does not have the format that its name says; a column is missing or
            repeated; files have different columns; a row is too short or too long; a quote is ambiguous; or bytes are
            not UTF-8. A place without files raises at once, the other errors when the tables are iterated over.
    """
    found = _stream(find_files(place), columns, optional, batch_rows, csv or CSVFormat(), warn)
    return (table for _, _, table in found)


def _stream(
    files: Sequence[DataFile],
    columns: Sequence[str],
    optional: Sequence[str],
    batch_rows: int,
    form: CSVFormat,
    warn: _Warn,
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yields each table with its file's name and the number of its first row in that file."""
    same = _SameColumns(files, columns, optional)
    without_rows: tuple[str, int, pa.Table] | None = None
    has_rows = False
    for file in files:
        reader = READERS[str(file.ending)]
        first_row = 0
        with _errors_of(file.filesystem, file.name):
            for table in reader(file, form, partial(same.choose, file), batch_rows, warn):
                found = file.name, first_row, same.completed(file, table)
                if len(table):
                    has_rows = True
                    yield found
                elif without_rows is None:
                    without_rows = found
                first_row += len(table)
    if not has_rows and without_rows is not None:
        yield without_rows


class _SameColumns:
    """Selects the wanted columns of each file, and checks that all files have the same columns."""

    def __init__(self, files: Sequence[DataFile], columns: Sequence[str], optional: Sequence[str]) -> None:
        self._files = files
        self._columns, self._optional = columns, optional
        self._names: set[str] = set()
        self._wanted: list[str] = []
        self._types: dict[str, pa.DataType] = {}

    def choose(self, file: DataFile, names: Sequence[str]) -> list[str]:
        """Returns the columns to read from a file, given the names of all its columns."""
        if both := sorted({*names} & {*file.partitions}):
            message = "the column is both in the file and in its folder's name; drop one of them"
            raise InputError(message, source=file.name, field=both[0])
        all_names = [*names, *file.partitions]
        first = self._files[0]
        if file is not first and (different := sorted({*all_names} ^ self._names)):
            has, lacks = ("this file", first.name) if different[0] in all_names else (first.name, "this file")
            message = f"{has} has this column and {lacks} lacks it; give all files the same columns"
            raise InputError(message, source=file.name, field=different[0])
        self._names = {*all_names}
        self._wanted = wanted_columns(all_names, self._columns, self._optional, file.name)
        # At least one column is read, to count the rows, even if only partition columns are wanted.
        return [name for name in self._wanted if name not in file.partitions] or list(names[:1])

    def completed(self, file: DataFile, table: pa.Table) -> pa.Table:
        """Adds the partition columns, puts all columns in the wanted order, and casts null columns to their type."""
        for name, value in file.partitions.items():
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
        table = table.select(self._wanted)
        for i, column in enumerate(table.schema):
            kind = self._types.setdefault(column.name, column.type)
            if pa.types.is_null(kind):
                # A column of missing values only has no type; look in the other files.
                kind = self._types[column.name] = self._type_elsewhere(column.name)
            if pa.types.is_null(column.type):
                table = table.set_column(i, column.name, table.column(i).cast(kind))
            elif plain_type(kind) != plain_type(column.type):
                message = (
                    f"the column is of type {column.type} here and of type {kind} in {self._files[0].name}; write all "
                    "files with the same types"
                )
                raise InputError(message, source=file.name, field=column.name)
        return table

    def _type_elsewhere(self, name: str) -> pa.DataType:
        schemas = (
            pq.read_schema(file.path, filesystem=file.filesystem) for file in self._files if file.ending == ".parquet"
        )
        kinds = (schema.field(name).type for schema in schemas if name in schema.names)
        return next((plain_type(kind) for kind in kinds if not pa.types.is_null(kind)), pa.null())


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a column's values; for a dictionary, the type of its entries."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def read_table(
    place: Place, columns: Sequence[str], *, optional: Sequence[str] = (), csv: CSVFormat | None = None
) -> pa.Table:
    """Reads the wanted columns of all rows of a place into one table. Arguments and errors as in `stream_tables`."""
    return pa.concat_tables(stream_tables(place, columns, optional=optional, csv=csv))


@contextlib.contextmanager
def rows_located(
    place: Any, columns: Sequence[str], *, optional: Sequence[str] = (), csv: CSVFormat | None = None
) -> Iterator[None]:
    """Context manager that adds the file name, and the row in that file, to errors about rows of several files.

    Args:
        place: the `place` given to `stream_tables`; errors about other rows are unchanged.
        columns: as given to `stream_tables`.
        optional: as given to `stream_tables`.
        csv: as given to `stream_tables`.
    """
    try:
        yield
    except InputError as error:
        if error.row is None or not is_place(place) or error.source != shown(place):
            raise
        rows_before = 0
        files = find_files(place)
        # The first reading has already issued the warnings.
        found = _stream(files, columns, optional, _LOCATED_ROWS, csv or CSVFormat(), warn=lambda message: None)
        for name, first_row, table in found:
            if error.row < rows_before + len(table):
                row = first_row + error.row - rows_before
                raise InputError(error.message, source=name, field=error.field, row=row, value=error.value) from error
            rows_before += len(table)
        raise


def content_of(place: Place, csv: CSVFormat | None = None) -> list[Any]:
    """Returns all that determines a place's rows, as JSON types: file contents (hashes), CSV format and folder names.

    Reads each file completely, because a file may change without a new size or time.
    """
    return [asdict(csv or CSVFormat()), *([_hash(file), file.ending, file.partitions] for file in find_files(place))]


def content_hash(path: Path) -> str:
    """Returns the hash of a local file's content, to detect changes."""
    return _hash(DataFile(arrow_fs.LocalFileSystem(), str(path), str(path)))


def _hash(file: DataFile) -> str:
    content = xxhash.xxh3_128()
    with (
        _errors_of(file.filesystem, file.name),
        file.filesystem.open_input_stream(file.path, compression=None) as stream,
    ):
        while chunk := stream.read(_HASHED_BYTES):
            content.update(chunk)
    return content.hexdigest()
