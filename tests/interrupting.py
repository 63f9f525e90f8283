"""Programs that are interrupted at a moment of their own choice."""

import os
import subprocess
import sys
from pathlib import Path

from example_runs import EXAMPLES

# Runs a script that says where it is, once, and waits there.
PROGRAM = """
import importlib, runpy, sys, threading

place, script, *arguments = sys.argv[1:]
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original, told = getattr(owner, name), threading.Lock()

def stop_here(*given, **named):
    if told.acquire(blocking=False):
        print("here", flush=True)
        # A thread must end before its program can.
        threading.Event().wait(600 if threading.current_thread() is threading.main_thread() else 3)
    return original(*given, **named)

setattr(owner, name, stop_here)
sys.argv = [script, *arguments]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""


def interrupted(place, script, arguments, number, cache):
    """The exit code and the standard error of a script that got a signal when it called a function.

    Args:
        place: the function, as in `package.module:Class.method`.
        script: the script's path below `examples/`.
        arguments: its arguments.
        number: the signal.
        cache: a new folder for what datasets keeps, so that the script does all of its work.
    """
    command = [sys.executable, "-c", PROGRAM, place, str(EXAMPLES / script), *map(str, arguments)]
    paths = [str(EXAMPLES.parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(cache)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert any(line == "here\n" for line in process.stdout), process.stderr.read()
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    return process.returncode, error
