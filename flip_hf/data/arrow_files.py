"""Rows that are too many for memory, as Arrow files in the folder where datasets keeps what it makes of files."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from flip_hf.data.schema import InputError
from flip_hf.data.tables import plain_strings
from flip_hf.standard_json import settings_json

BLOCK_ROWS = 1 << 16
"""Rows of a table that are held in memory at a time."""

_HASHED_BYTES = 1 << 24


def file_state(path: Path) -> list[Any]:
    """What changes when the file does, without reading it: a part of the key of what is made of the file."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def rows_on_disk(key: Any, tables: Callable[[], Iterable[pa.Table]], source: str) -> Dataset:
    """The rows of some tables as a Dataset on disk: memory does not grow with them.

    Written once, and opened again as long as `key` is the same.

    Args:
        key: all that the rows depend on, as JSON types.
        tables: makes the tables, all of one schema; not called where the rows are there.
        source: where the rows come from, for errors.

    Raises:
        InputError: there are no rows.
    """
    name = hashlib.sha256(settings_json(key).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "flip_hf"
    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / f"{name}.arrow"
    with FileLock(folder / f"{name}.lock"):
        if not cached.exists():
            with contextlib.ExitStack() as cleanup:
                aside = folder / f"{name}.new"
                cleanup.callback(aside.unlink, missing_ok=True)
                if _write(tables(), aside) == 0:
                    raise InputError("there are no rows; training and evaluation need some", source=source)
                os.replace(aside, cached)
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
        for table in map(plain_strings, tables):
            if writer is None:
                writer = cleanup.enter_context(pa.ipc.new_stream(str(path), table.schema))
            writer.write_table(table)
            num_rows += len(table)
    return num_rows
