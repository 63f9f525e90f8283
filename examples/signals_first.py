"""Handles signals while a script imports the package: a signal then ends the script with one line.

Importing the package takes seconds, so the scripts import this module first. `run_script` later replaces the handlers.
"""

import os
import signal
import sys


def _end(number: int, frame: object) -> None:
    # In a distributed run, only the first process prints the message. Importing leaves nothing to clean up.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# A program that has already imported the package, such as a test, keeps its own handlers.
if "flip_hf" not in sys.modules:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
