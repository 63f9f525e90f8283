"""Progress bars on a terminal, and progress lines at intervals elsewhere."""

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

    A bar with `leave=False`, which tqdm would remove at its end, prints no line if it ends before the first is due.
    """

    leave: bool | None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        # tqdm calls this once before the bar has started.
        started = getattr(self, "start_t", None)
        is_due = started is not None and self._time() - getattr(self, "_shown_at", started) >= SECONDS_BETWEEN_LINES
        if is_due and msg is None:
            _Lines._print_line(self)
        # False tells tqdm that nothing on the screen has to be removed.
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
        # If an error ends the bar, the error message stays the last line.
        if is_due and sys.exc_info()[1] is None:
            _Lines._print_line(self)
        self.leave = False
        standard_tqdm.close(self)


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> Any:
    """Creates a progress bar on standard error, or progress lines if standard error is not a terminal.

    Args:
        iterable: what to iterate over and count; optional.
        settings: as in `tqdm.tqdm`.

    Returns:
        A `tqdm.tqdm`.
    """
    return (tqdm.auto.tqdm if _shows_bars() else _Lines)(iterable, **settings)


def use_lines_without_terminal() -> None:
    """Makes the bars of datasets print lines in this process, if standard error is not a terminal; for scripts.

    It also turns off the bars of transformers, which end in a moment.
    """
    if _shows_bars():
        return
    for name in ("display", "clear", "close"):
        setattr(datasets.utils.tqdm, name, getattr(_Lines, name))
    transformers_logging.disable_progress_bar()


def _shows_bars() -> bool:
    return sys.stderr.isatty() or issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm)
