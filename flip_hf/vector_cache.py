"""A cache of text vectors on disk: an SQLite file that several processes can read and write at once."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from filelock import FileLock

# SQLite before 3.32 allows 999 parameters in a statement.
_KEYS_IN_A_QUERY = 900
# Maximum number of seconds to wait for another process, which locks the file for one transaction at a time.
_LOCKED_S = 120.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class VectorCache:
    """Float16 vectors by 64-bit keys, in one SQLite file. Use it as a context manager.

    Each `add` is one transaction; a crash loses at most the current one. The file must be on a local file system,
    because it is in SQLite's WAL mode.

    Args:
        path: the file. It is created, with its folder, if it is missing.
        size: numbers in a vector.

    Raises:
        OSError: the file is damaged, or can't be opened.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        path.parent.mkdir(parents=True, exist_ok=True)
        with _errors_of(path):
            if not path.exists():
                _create(path)
            self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_LOCKED_S)
            # With this setting a power failure may lose transactions, but never damages the file.
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    def read(self, keys: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Copies the cached vectors of some rows into an array.

        Args:
            keys: int64 (texts,), the key of each text.
            vectors: float16 (texts, size), the array to write to.
            rows: int64 (rows,), indices of the wanted texts.

        Returns:
            Those of `rows` that are not in the cache, in the same order.

        Raises:
            OSError: the file is damaged, or can't be read.
        """
        missing = [rows[:0]]
        for start in range(0, len(rows), _KEYS_IN_A_QUERY):
            part = rows[start : start + _KEYS_IN_A_QUERY]
            row_of = dict(zip(keys[part].tolist(), part.tolist(), strict=True))
            marks = ",".join("?" * len(row_of))
            # Only question marks are inserted into the statement.
            query = f"SELECT key, vector, checksum FROM vectors WHERE key IN ({marks})"  # nosec B608
            with _errors_of(self._path):
                found = self._connection.execute(query, list(row_of)).fetchall()
            if any(len(v) != 2 * self._size or _checksum(k, v) != check for k, v, check in found):
                raise OSError(_damaged(self._path, "the checksum of a vector is wrong"))
            if found:
                read = [row_of.pop(key) for key, _, _ in found]
                vectors[read] = np.frombuffer(b"".join(v for _, v, _ in found), np.float16).reshape(-1, self._size)
            missing.append(np.fromiter(row_of.values(), np.int64, len(row_of)))
        return np.concatenate(missing)

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Adds vectors in one transaction. A key that is there already keeps its vector.

        Args:
            keys: int64 (texts,).
            vectors: float16 (texts, size).

        Raises:
            OSError: the file is damaged, or can't be written.
        """
        contents = zip(keys.tolist(), (vector.tobytes() for vector in vectors), strict=True)
        rows = ((key, vector, _checksum(key, vector)) for key, vector in contents)
        with _errors_of(self._path), self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", rows)


def _create(path: Path) -> None:
    with FileLock(path.with_suffix(".lock")):
        # Another process may have created it meanwhile.
        if path.exists():
            return
        # Created under another name and renamed, because a file without its table would count as damaged.
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(partial)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(
                "CREATE TABLE vectors (key INTEGER PRIMARY KEY, vector BLOB NOT NULL, checksum INT NOT NULL)"
            )
        partial.replace(path)


def _checksum(key: int, vector: bytes) -> int:
    return xxhash.xxh32_intdigest(vector, key & 0xFFFFFFFF)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Context manager that adds the file's name to SQLite's errors."""
    try:
        yield
    except sqlite3.Error as error:
        # The lowest byte is the kind of error.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise OSError(_damaged(path, str(error))) from error
        raise OSError(
            f"{path}: the cache of text vectors can't be used ({error}); set FLIP_HF_CACHE to a writable "
            "folder of this machine"
        ) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path}: the cache of text vectors is damaged ({reason}); delete the file, and the vectors will be computed "
        "again"
    )
