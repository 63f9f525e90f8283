"""Progress: a bar on a terminal, and a line every so often anywhere else."""

import sys
from collections.abc import Iterable
from typing import Any

import datasets
import tqdm.auto
import tqdm.notebook
from tqdm.std import tqdm as standard_tqdm
from transformers.utils import logging as transformers_logging

SECONDS_BETWEEN_LINES = 30.0


class _Lines(standard_tqdm):
    """A tqdm bar that prints whole lines: one every `SECONDS_BETWEEN_LINES`, and one at the end.

    A bar that tqdm would remove at its end (`leave=False`) prints none if it ends before its first line is due.
    """

    leave: bool | None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        # tqdm calls this once before the bar has started.
        started = getattr(self, "start_t", None)
        is_due = started is not None and self._time() - getattr(self, "_shown_at", started) >= SECONDS_BETWEEN_LINES
        if is_due and msg is None:
            _Lines._print_line(self)
        # Nothing on the screen has to be removed.
        return False

    def _print_line(self) -> None:
        self._shown_at = self._time()
        print(self.format_meter(**{**self.format_dict, "ncols": 0}), file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        pass

    def close(self) -> None:
        if getattr(self, "disable", True):
            return
        is_due = self.leave or self._time() - self.start_t >= SECONDS_BETWEEN_LINES
        # After an error, the error is the last line.
        if is_due and sys.exc_info()[1] is None:
            _Lines._print_line(self)
        self.leave = False
        standard_tqdm.close(self)


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> Any:
    """A progress bar on standard error; lines instead if that is no terminal.

    Args:
        iterable: what to count, or nothing.
        settings: as of `tqdm.tqdm`.

    Returns:
        A `tqdm.tqdm`.
    """
    return (tqdm.auto.tqdm if _shows_bars() else _Lines)(iterable, **settings)


def use_lines_without_terminal() -> None:
    """Has the bars of datasets in this process print lines, too, if standard error is no terminal; for scripts.

    The bars of transformers, which are over in a moment, are then off.
    """
    if _shows_bars():
        return
    for name in ("display", "clear", "close"):
        setattr(datasets.utils.tqdm, name, getattr(_Lines, name))
    transformers_logging.disable_progress_bar()


def _shows_bars() -> bool:
    return sys.stderr.isatty() or issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm)
