"""Loads folders that nobody vouches for, each in a process of its own with little memory, and says what that did.

The program imports the package once and forks for each folder. `test_hostile.py` uses it.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPARE_BYTES = 1 << 29
"""Address space that a load may take beyond what the imports have taken."""
SECONDS = 600

# What no load has business with: programs, the network, classes that a pickle names, libraries.
_FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "pickle.", "ctypes.dlopen")


class Loads:
    """The program, kept running over many loads."""

    def __init__(self):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, loader, folder):
        """What became of `flip_hf.<loader>.from_pretrained(folder)`, or of one of `CONTROLS`."""
        print(json.dumps([loader, str(folder)]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def read_pickle(folder):
    import torch

    torch.load(Path(folder) / "pytorch_model.bin", weights_only=False)


def take_memory(_folder):
    bytearray(2 * SPARE_BYTES)


def ask_network(_folder):
    socket.create_connection(("127.0.0.1", 9), timeout=1)


def open_neighbour(folder):
    (Path(folder).parent / "neighbour").open().close()


CONTROLS = {f.__name__: f for f in (read_pickle, take_memory, ask_network, open_neighbour)}
"""What a load must not do, to see that it would be seen."""


def load(loader, folder):
    """The error's type and message, or none; the seconds that it computed; what it printed; the most memory the process
    had; the files that Python opened; and what was done that no load has business with."""
    import flip_hf

    act = CONTROLS.get(loader) or getattr(flip_hf, loader).from_pretrained
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, taken + SPARE_BYTES))
    signal.alarm(SECONDS)
    opened, forbidden = [], []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.path.realpath(arguments[0]))
        elif event.startswith(_FORBIDDEN):
            forbidden.append(f"{event} {arguments!r:.200}")

    printed = tempfile.TemporaryFile()  # noqa: SIM115, the process ends with it
    for stream in (1, 2):
        os.dup2(printed.fileno(), stream)
    sys.addaudithook(watch)
    started, error = time.process_time(), None
    try:
        act(folder)
    except BaseException as raised:
        error = raised
    printed.seek(0)
    return {
        "error": None if error is None else type(error).__name__,
        "message": "" if error is None else str(error),
        "seconds": time.process_time() - started,
        "printed": printed.read().decode(errors="backslashreplace"),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "opened": opened,
        "forbidden": forbidden,
    }


def main():
    import torch

    import flip_hf

    torch.set_num_threads(1)
    for name in flip_hf.__all__:
        getattr(flip_hf, name)
    answers = os.fdopen(os.dup(1), "w")
    # What a load would ask, nobody answers with the next request.
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writer, "w") as pipe:
                json.dump(load(*json.loads(line)), pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        died = {"error": "died", "message": f"exit status {os.waitstatus_to_exitcode(status)}", "seconds": SECONDS}
        died |= {"printed": "", "peak_bytes": 0, "opened": [], "forbidden": []}
        print(text or json.dumps(died), file=answers, flush=True)


if __name__ == "__main__":
    main()
