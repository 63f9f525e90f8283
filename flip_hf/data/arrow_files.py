"""Stores rows that don't fit in memory as Arrow files in datasets' cache folder."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import Place, content_of, plain_type, shown, stream_tables
from flip_hf.data.schema import InputError
from flip_hf.standard_json import settings_json

logger = logging.getLogger(__name__)

BLOCK_ROWS = 1 << 16
"""Number of rows of a table held in memory at a time."""

_HASHED_BYTES = 1 << 24
# Part of the cache key. Increase it when a change to the reader gives different rows for the same files.
_READER = 1


def plain_strings(table: pa.Table) -> pa.Table:
    """Removes dictionary encoding from a table, since dictionaries may differ between parts of a file."""
    return table.cast(pa.schema([f.with_type(plain_type(f.type)) for f in table.schema]))


def open_files(
    place: Place, columns: Sequence[str], *, optional: Sequence[str] = (), csv: CSVFormat | None = None
) -> Dataset:
    """Opens the wanted columns of CSV or Parquet files as a Dataset on disk. Memory use does not grow with the files.

    The rows are written once, as Arrow, to datasets' cache folder, and reused while the files' contents stay the same.
    To detect changes, each call reads the files once.

    Args:
        place: the files, as in `flip_hf.data.files.stream_tables`.
        columns: names of the required columns.
        optional: names of columns to read if they exist.
        csv: format of the CSV files.

    Raises:
        InputError: a file can't be read or lacks a column, or there are no rows.
    """
    key = ["files", _READER, *content_of(place, csv), list(columns), list(optional)]
    warnings: list[str] = []

    def tables() -> Iterator[pa.Table]:
        return stream_tables(place, columns, optional=optional, batch_rows=BLOCK_ROWS, csv=csv, warn=warnings.append)

    rows = rows_on_disk(key, tables, shown(place), warnings)
    for warning in warnings:
        logger.warning("%s", warning)
    return rows


def rows_on_disk(
    key: Any, tables: Callable[[], Iterable[pa.Table]], source: str, notes: list[str] | None = None
) -> Dataset:
    """Stores the rows of tables as a Dataset on disk. Memory use does not grow with the rows.

    The rows are written once and reused while `key` stays the same.

    Args:
        key: everything that determines the rows, as JSON types.
        tables: creates the tables, all with one schema; not called if the rows are in the cache.
        source: name of the rows, for error messages.
        notes: a list to which creating the tables may append. The notes are stored with the rows, and appended again
            when the rows are opened from the cache.

    Raises:
        InputError: there are no rows.
    """
    name = hashlib.sha256(settings_json(key).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "flip_hf"
    folder.mkdir(parents=True, exist_ok=True)
    cached, kept_notes = folder / f"{name}.arrow", folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):
        if not cached.exists():
            with contextlib.ExitStack() as cleanup:
                aside = folder / f"{name}.new"
                cleanup.callback(aside.unlink, missing_ok=True)
                if _write(tables(), aside) == 0:
                    raise InputError("there are no rows; training and evaluation need at least one", source=source)
                if notes:
                    kept_notes.write_text(settings_json(notes), encoding="utf-8")
                os.replace(aside, cached)
        elif notes is not None and kept_notes.exists():
            notes += json.loads(kept_notes.read_text(encoding="utf-8"))
    # The fingerprint depends on the content only, not on the path.
    content = hashlib.sha256()
    with pa.memory_map(str(cached)) as file:
        for start in range(0, file.size(), _HASHED_BYTES):
            file.seek(start)
            content.update(file.read_buffer(_HASHED_BYTES))
    rows = Dataset.from_file(str(cached))
    rows._fingerprint = content.hexdigest()[:16]
    return rows


def _write(tables: Iterable[pa.Table], path: Path) -> int:
    """Writes tables as one Arrow stream and returns the number of rows."""
    num_rows, writer = 0, None
    with contextlib.ExitStack() as cleanup:
        for table in _in_blocks(map(plain_strings, tables)):
            if writer is None:
                writer = cleanup.enter_context(pa.ipc.new_stream(str(path), table.schema))
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def _in_blocks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Regroups the rows into tables of `BLOCK_ROWS` rows, so that equal rows give equal bytes in the file."""
    held: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        held.append(table)
        num_rows += len(table)
        while num_rows >= BLOCK_ROWS:
            together = pa.concat_tables(held)
            yield _copied(together.slice(0, BLOCK_ROWS))
            held, num_rows = [together.slice(BLOCK_ROWS)], num_rows - BLOCK_ROWS
    if num_rows:
        yield _copied(pa.concat_tables(held))


def _copied(table: pa.Table) -> pa.Table:
    # Arrow writes some bytes beyond the end of a slice. `take` copies the rows, so nothing follows them.
    return table.combine_chunks().take(pa.array(np.arange(len(table))))
