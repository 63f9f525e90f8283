"""The scripts import this module first: a signal then ends them with one line while they import the package.

Importing the package takes seconds. `run_script` replaces these handlers afterwards.
"""

import os
import signal
import sys


def _end(number: int, frame: object) -> None:
    # One of the processes that train together speaks for all. Importing leaves nothing to clean up.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# A program that has imported the package already, such as a test, keeps its own handlers.
if "flip_hf" not in sys.modules:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
