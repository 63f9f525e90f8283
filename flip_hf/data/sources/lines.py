"""Reads the lines of raw files, and counts malformed lines for the log."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from zipfile import Path as ZipPath

logger = logging.getLogger(__name__)


def read_columns(
    path: Path | ZipPath, n_columns: int, split: Callable[[str], list[str]], encoding: str = "latin-1"
) -> list[list[str]]:
    """Reads a file line by line, splits each line with `split`, and returns the columns.

    Raises:
        ValueError: a line has the wrong number of columns; the message names the file and the line.
    """
    # Not splitlines, which also splits at characters that Latin-1 text may hold, such as U+0085.
    lines = path.read_bytes().decode(encoding).removesuffix("\n").split("\n")
    rows = [split(line.removesuffix("\r")) for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != n_columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {n_columns}")
    return [list(column) for column in zip(*rows, strict=True)]


class OddLines:
    """Counts the lines of a file that are dropped or changed, by outcome.

    Args:
        path: the file.
    """

    def __init__(self, path: Path | ZipPath) -> None:
        self._path = path
        self._counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, outcome: str, line: int) -> None:
        """Counts a line (numbered from 1). `outcome` says what was done with it, such as "left out: no rating"."""
        self._counts[outcome] += 1
        self._first.setdefault(outcome, line)

    def report(self) -> None:
        """Logs one warning per outcome, with its count and the number of its first line."""
        for outcome, count in self._counts.items():
            lines = "1 line is" if count == 1 else f"{count} lines are"
            logger.warning("%s: %s %s; the first is line %d", self._path, lines, outcome, self._first[outcome])
