"""Rows that are too many for memory, as Arrow files in the folder where datasets keeps what it makes of files."""

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
"""Rows of a table that are held in memory at a time."""

_HASHED_BYTES = 1 << 24
# Part of the key of what is kept of files: to be raised when the same files are read otherwise than before.
_READER = 1


def plain_strings(table: pa.Table) -> pa.Table:
    """A table without dictionaries, which may differ from one part of a file to the next."""
    return table.cast(pa.schema([f.with_type(plain_type(f.type)) for f in table.schema]))


def open_files(
    place: Place, columns: Sequence[str], *, optional: Sequence[str] = (), csv: CSVFormat | None = None
) -> Dataset:
    """The wanted columns of CSV or Parquet files as a Dataset on disk: memory does not grow with the files.

    Written once, as Arrow, into the folder where datasets keeps what it makes of files, and opened again as long as the
    files hold the same bytes. To know that, each call reads the files once.

    Args:
        place: the files, as `flip_hf.data.files.stream_tables` takes them.
        columns: names of the columns that must be there.
        optional: names of columns that are taken where they are there.
        csv: how CSV files are written.

    Raises:
        InputError: a file can't be read, lacks a column, or there are no rows.
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
    """The rows of some tables as a Dataset on disk: memory does not grow with them.

    Written once, and opened again as long as `key` is the same.

    Args:
        key: all that the rows depend on, as JSON types.
        tables: makes the tables, all of one schema; not called where the rows are there.
        source: where the rows come from, for errors.
        notes: what making the tables adds to this list is kept with the rows, and added again when they are opened.

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
                    raise InputError("there are no rows; training and evaluation need some", source=source)
                if notes:
                    kept_notes.write_text(settings_json(notes), encoding="utf-8")
                os.replace(aside, cached)
        elif notes is not None and kept_notes.exists():
            notes += json.loads(kept_notes.read_text(encoding="utf-8"))
    # Files are compared by what they hold, wherever they lie.
    content = hashlib.sha256()
    with pa.memory_map(str(cached)) as file:
        for start in range(0, file.size(), _HASHED_BYTES):
            file.seek(start)
            content.update(file.read_buffer(_HASHED_BYTES))
    rows = Dataset.from_file(str(cached))
    rows._fingerprint = content.hexdigest()[:16]
    return rows


def _write(tables: Iterable[pa.Table], path: Path) -> int:
    """Writes tables as one Arrow stream; how many rows there were."""
    num_rows, writer = 0, None
    with contextlib.ExitStack() as cleanup:
        for table in _in_blocks(map(plain_strings, tables)):
            if writer is None:
                writer = cleanup.enter_context(pa.ipc.new_stream(str(path), table.schema))
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def _in_blocks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of `BLOCK_ROWS` rows: equal rows make equal bytes, however they came."""
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
    # Arrow writes a slice with some bytes of what follows it; what `take` makes has nothing behind it.
    return table.combine_chunks().take(pa.array(np.arange(len(table))))
