"""Stopping a run by a signal without losing a step."""

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
"""Exit code of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h: try again later)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# On Ctrl-C, a process gets SIGINT from the terminal and a second one from its launcher. Within this time, both count as
# one.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(SystemExit):
    """A signal stopped the run after it saved a checkpoint. Uncaught, it ends the program with `EXIT_STOPPED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def set_handlers(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> dict[Any, Any]:
    """Sets a handler for signals, except for those that the program was started to ignore.

    Outside the main thread it does nothing, because Python allows only the main thread to set handlers.

    Returns:
        The previous handlers by signal, only for signals whose handler was replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class StopSignals:
    """Context manager that records SIGTERM and SIGINT; a second SIGINT raises KeyboardInterrupt at once.

    It works only in the main thread; in other threads the signals keep their handlers. Signals that the program was
    started to ignore (`nohup`, a shell's background jobs) stay ignored.

    Args:
        are_noted: False leaves the handlers unchanged and records nothing. All processes must pass the same value.
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
        """Returns whether any process recorded a signal. All processes must call this; all get the same answer."""
        noted = self._noted is not None
        if accelerator.num_processes == 1 or not self._are_noted:
            return noted
        return bool(accelerator.reduce(torch.tensor(float(noted), device=accelerator.device), "sum").item())


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Context manager that delays SIGTERM and SIGINT until it ends.

    Workers that start inside the context keep the delay until they call `leave_signals_to_parent`. Without the delay, a
    signal to all processes would end a worker that does not ignore signals yet.
    """
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def leave_signals_to_parent(worker: int) -> None:
    """Makes a DataLoader worker ignore SIGTERM and SIGINT, so that its parent can save a checkpoint first."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
