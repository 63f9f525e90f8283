"""How the scripts in `examples/` end."""

import dis
import sys
from collections.abc import Callable

from flip_hf.configuration_flip import printable
from flip_hf.data.schema import InputError

# The package raises these for what its user can mend: a setting, a missing library, a loss that is not finite. Python
# and other libraries raise them for faults in code, too.
_RAISED_FOR_USERS = (ValueError, ImportError, FloatingPointError)


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; an error that its user can mend ends the program with one line and exit code 1.

    The line goes to standard error and begins with `error: `. Any other error is a fault in the code and keeps its
    traceback. A `main` that is called from Python, without this function, raises all of them.

    Args:
        main: the script's function; it reads the command line.

    Raises:
        SystemExit: `main` raised an error that its user can mend.
    """
    try:
        main()
    except Exception as error:
        if not is_for_users(error):
            raise
        # Messages of other libraries have several lines.
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        sys.exit(1)


def is_for_users(error: Exception) -> bool:
    """Whether a user can mend the cause of an error.

    True for errors of files and of the network, for `InputError`, and for what a `raise` statement of this package or
    of the script itself raised. A `ValueError` out of NumPy is a fault in the code.
    """
    if isinstance(error, OSError | InputError):
        return True
    place = error.__traceback__
    if not isinstance(error, _RAISED_FOR_USERS) or place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    package = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
    instruction = dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]]
    return package in ("flip_hf", "__main__") and instruction == "RAISE_VARARGS"
