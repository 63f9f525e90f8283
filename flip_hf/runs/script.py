"""Runs `flip-hf` and the scripts in `examples/`: errors as one line, signals and exit codes."""

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
# This environment variable holds the process id of the launcher. When the launcher dies, the script must end too.
_LAUNCHER = "FLIP_HF_LAUNCHER"

# The package raises these for causes that users can fix: a setting, a missing library, a loss that is not finite.
# Python and other libraries also raise them for bugs.
_RAISED_FOR_USERS = (ValueError, ImportError, FloatingPointError)


class Interrupted(KeyboardInterrupt):
    """A signal interrupted the program.

    Attributes:
        exit_code: 128 + the number of the signal, as in shells.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class _Interrupts:
    """Signal handler that raises `Interrupted` at the first signal, so that the program cleans up before it ends.

    On Ctrl-C, a process gets the signal from the terminal and again from its launcher. A second signal is therefore
    ignored for a short time. After that, or once cleaning up is over, a signal ends the program at once.
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
    """Runs a script's `main`; an error that the user can fix ends the program with one line and exit code 1.

    The line goes to standard error and begins with `error: `. All other errors are bugs and keep their traceback. If
    Python code calls `main` directly, all errors are raised as usual.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP also end the program with one line, and with the exit code 128 + the number of
    the signal. The training loop handles SIGINT and SIGTERM itself. Signals that the program was started to ignore stay
    ignored. Without a terminal, progress is printed as lines.

    Args:
        main: the script's main function, which reads the command line.

    Raises:
        SystemExit: `main` raised an error that the user can fix, or a signal came.
    """
    use_lines_without_terminal()
    interrupts = _Interrupts()
    set_handlers(_SIGNALS, interrupts)
    try:
        _run(main, interrupts)
    finally:
        interrupts.is_over = True


def environment_of_child() -> dict[str, str]:
    """Returns the environment for a script that this process starts and that must end when this process dies.

    `run_script` in the script watches this process, and sends SIGTERM to the script once this process has died.
    """
    return {**os.environ, _LAUNCHER: str(os.getpid())}


def _end_with_launcher() -> None:
    """Sends SIGTERM to this process once its launcher has died.

    The launcher is `accelerate launch`, or a process that used `environment_of_child`.
    """
    # Remove the variable, because programs that this process starts have another parent.
    launcher = int(os.environ.pop(_LAUNCHER, 0)) or _accelerate_launcher()
    if launcher is None:
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def watch() -> None:
        # A zombie still counts as a process, but no longer as this process's parent.
        while os.getppid() == launcher:
            sleep(1.0)
        signal.pthread_kill(main_thread, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _accelerate_launcher() -> int | None:
    """Returns the process id of the `accelerate launch` that started this process, or None.

    `accelerate launch` does not forward signals if it started only one process.
    """
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
            # Other code may have replaced the `Interrupted` with its own error on the way up.
            _say(str(first))
            raise SystemExit(first.exit_code) from None
        if not isinstance(error, Exception) or not is_for_users(error):
            raise
        # Join the lines, because messages of other libraries may have several.
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        sys.exit(1)


def run_program(command: Sequence[str]) -> None:
    """Runs another program of this package and waits for it; ends this program if the other one fails.

    The child process gets no signals from the terminal. If this process is interrupted, it sends SIGTERM to the child
    and waits, so that a training run can save a checkpoint.

    Args:
        command: the program and its arguments.

    Raises:
        SystemExit: the child failed and has printed its own message.
        Interrupted: this process was interrupted, and the child has printed no message about it.
    """
    process = None
    try:
        # A signal while the child starts would leave it running.
        with _held_back() as signals:
            # Safe, because the caller names one of our own programs.
            process = subprocess.Popen(command, start_new_session=True)  # nosec B603
        for number in signals:
            signal.raise_signal(number)
        code = process.wait()
    except Interrupted as interrupted:
        if process is None:
            raise
        process.terminate()
        # A child that a signal killed, or that had already finished, has printed no message. The terminal's own signal
        # can kill it, too, before it has its own session.
        if process.wait() <= 0:
            raise
        raise SystemExit(interrupted.exit_code) from None
    if code != 0:
        raise SystemExit(code if code > 0 else 128 - code)


@contextmanager
def _held_back() -> Iterator[list[int]]:
    """Context manager that collects signals, so that the caller can raise them afterwards."""
    noted: list[int] = []
    handlers = set_handlers(_SIGNALS, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    # In a distributed run, only the first process prints the message.
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def is_for_users(error: Exception) -> bool:
    """Returns whether a user can fix the cause of an error.

    True for file and network errors, for `InputError`, for invalid settings of `FlipConfig`, and for errors that a
    `raise` statement in this package or in the script raised. A `ValueError` from NumPy, for example, is a bug.
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
