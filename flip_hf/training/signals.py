"""Stopping a run from outside without losing a step."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop and can be resumed (EX_TEMPFAIL of sysexits.h: try again later)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on the Ctrl-C that its processes got from the terminal as well.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(SystemExit):
    """The run was told to stop and has saved a checkpoint; ends the program with `EXIT_STOPPED` unless it is caught."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def set_handlers(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> dict[Any, Any]:
    """Sets a handler, in the main thread alone, for the signals that the program was not started to ignore.

    Returns:
        The handlers before, by signal; of those that were set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once, as usual.

    Only the main thread can; in another one the signals do what they did. Signals that the program was started to
    ignore (`nohup`, a shell's background jobs) stay ignored.

    Args:
        are_noted: whether to note them at all, the same in all processes; else the signals do what they did.
    """

    def __init__(self, are_noted: bool = True) -> None:
        self._are_noted = are_noted
        self._noted: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self._are_noted:
            self._previous = set_handlers(_SIGNALS, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted = monotonic()
        elif number == signal.SIGINT and monotonic() - self._noted > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def any(self, accelerator: Accelerator) -> bool:
        """Whether any process noted one: the same answer in all of them, which must all ask."""
        noted = self._noted is not None
        if accelerator.num_processes == 1 or not self._are_noted:
            return noted
        return bool(accelerator.reduce(torch.tensor(float(noted), device=accelerator.device), "sum").item())


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Delays SIGTERM and SIGINT until the block ends, and until `leave_signals_to_parent` in the workers it starts.

    Without the delay, a signal to all processes would end a worker that has started but does not ignore signals yet.
    """
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def leave_signals_to_parent(worker: int) -> None:
    """For a DataLoader's worker: a signal to all processes must not end it before its parent has saved a checkpoint."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
