"""How programs of this package end: `flip-hf` and the scripts in `examples/`."""

import dis
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from types import FrameType

import psutil
from huggingface_hub.errors import StrictDataclassError

from flip_hf.data.schema import InputError
from flip_hf.fields import printable
from flip_hf.progress import use_lines_without_terminal
from flip_hf.training.signals import SAME_SIGNAL_SECONDS, set_handlers

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The environment variable that holds the process id of the program that a script shall end with.
_LAUNCHER = "FLIP_HF_LAUNCHER"

# The package raises these for what its user can mend: a setting, a missing library, a loss that is not finite. Python
# and other libraries raise them for faults in code, too.
_RAISED_FOR_USERS = (ValueError, ImportError, FloatingPointError)


class Interrupted(KeyboardInterrupt):
    """A signal told the program to end.

    Attributes:
        exit_code: 128 and the number of the signal, as shells have it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class _Interrupts:
    """Handler that turns the first signal into an `Interrupted`, so that the program cleans up before it ends.

    A launcher passes on the Ctrl-C that its processes got from the terminal as well, so another signal does nothing at
    first. Later, or when nothing is left to clean up, a signal ends the program at once.
    """

    def __init__(self) -> None:
        self.first: Interrupted | None = None
        self.is_over = False
        self._noted = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._noted = Interrupted(number), monotonic()
            if not self.is_over:
                raise self.first
            _say(str(self.first))
        elif not self.is_over and monotonic() - self._noted < SAME_SIGNAL_SECONDS:
            return
        os._exit(self.first.exit_code)


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; an error that its user can mend ends the program with one line and exit code 1.

    The line goes to standard error and begins with `error: `. Any other error is a fault in the code and keeps its
    traceback. A `main` that is called from Python, without this function, raises all of them.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the program with one line, too, and the exit code 128 + the signal's number;
    the training loop handles the first two itself. Signals that the program was started to ignore stay ignored. Without
    a terminal, progress is printed in lines.

    Args:
        main: the script's function; it reads the command line.

    Raises:
        SystemExit: `main` raised an error that its user can mend, or a signal came.
    """
    use_lines_without_terminal()
    interrupts = _Interrupts()
    set_handlers(_SIGNALS, interrupts)
    try:
        _run(main, interrupts)
    finally:
        interrupts.is_over = True


def environment_of_child() -> dict[str, str]:
    """The environment variables for a script that this process starts directly, and that must end when this one dies.

    `run_script` in the script then sends SIGTERM to the script's process.
    """
    return {**os.environ, _LAUNCHER: str(os.getpid())}


def _end_with_launcher() -> None:
    """Sends this process SIGTERM when `accelerate launch`, or a process that used `environment_of_child`, has died."""
    # Programs that this one starts have another parent.
    launcher = int(os.environ.pop(_LAUNCHER, 0)) or _accelerate_launcher()
    if launcher is None:
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def watch() -> None:
        # A launcher that nobody has asked for its exit code still counts as a process, but no longer as a parent.
        while os.getppid() == launcher:
            sleep(1.0)
        signal.pthread_kill(main_thread, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _accelerate_launcher() -> int | None:
    """The process id of the `accelerate launch` that started this process; it passes no signal on to a single one."""
    try:
        parent = psutil.Process(os.getppid())
        if any(Path(part).name.startswith("accelerate") for part in parent.cmdline()[:3]):
            return int(parent.pid)
    except psutil.Error:
        pass
    return None


def _run(main: Callable[[], object], interrupts: _Interrupts) -> None:
    try:
        _end_with_launcher()
        main()
    except SystemExit:
        raise
    except BaseException as error:
        if (first := interrupts.first) is not None:
            # Whatever it raised on its way up.
            _say(str(first))
            raise SystemExit(first.exit_code) from None
        if not isinstance(error, Exception) or not is_for_users(error):
            raise
        # Messages of other libraries have several lines.
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        sys.exit(1)


def run_program(command: Sequence[str]) -> None:
    """Runs a program of this package's scripts, and ends this one where that one fails.

    The program gets no signal from the terminal. If this one is interrupted, it passes that on as SIGTERM and waits, so
    that a training run can save a checkpoint.

    Raises:
        SystemExit: the program failed, with a message of its own.
        Interrupted: this program was interrupted before that one could say so.
    """
    # A signal in the middle of starting the program would leave it behind.
    with _held_back() as signals:
        # The caller names a program of its own.
        process = subprocess.Popen(command, start_new_session=True)  # nosec B603
    try:
        for number in signals:
            signal.raise_signal(number)
        code = process.wait()
    except Interrupted as interrupted:
        process.terminate()
        # It has said nothing if it died at once, or had come to its end.
        if process.wait() in (0, -signal.SIGTERM):
            raise
        raise SystemExit(interrupted.exit_code) from None
    if code != 0:
        raise SystemExit(code if code > 0 else 128 - code)


@contextmanager
def _held_back() -> Iterator[list[int]]:
    """Notes the signals that come in this context, for the caller to raise afterwards."""
    noted: list[int] = []
    handlers = set_handlers(_SIGNALS, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    # One of the processes that train together speaks for all.
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def is_for_users(error: Exception) -> bool:
    """Whether a user can mend the cause of an error.

    True for errors of files and of the network, for `InputError`, for errors of `FlipConfig` in its settings, and for
    what a `raise` statement of this package or of the script itself raised. A `ValueError` out of NumPy is a fault in
    the code.
    """
    if isinstance(error, OSError | InputError | StrictDataclassError):
        return True
    place = error.__traceback__
    if not isinstance(error, _RAISED_FOR_USERS) or place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    package = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
    instruction = dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]]
    return package in ("flip_hf", "__main__") and instruction == "RAISE_VARARGS"
