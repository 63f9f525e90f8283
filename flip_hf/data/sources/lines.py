"""Lines of raw files that are not what they should be: counted, and said in the log."""

import logging
from collections import Counter
from pathlib import Path
from zipfile import Path as ZipPath

logger = logging.getLogger(__name__)


class OddLines:
    """Counts a file's lines that are not read as they stand, by what became of them.

    Args:
        path: the file.
    """

    def __init__(self, path: Path | ZipPath) -> None:
        self._path = path
        self._counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, outcome: str, line: int) -> None:
        """Counts a line, by its number from 1. `outcome` says what became of it: "left out: no rating"."""
        self._counts[outcome] += 1
        self._first.setdefault(outcome, line)

    def report(self) -> None:
        """One warning for each outcome, with its count and the number of its first line."""
        for outcome, count in self._counts.items():
            lines = "1 line is" if count == 1 else f"{count} lines are"
            logger.warning("%s: %s %s; the first is line %d", self._path, lines, outcome, self._first[outcome])
