"""The example scripts in the tests' own process, and what they log."""

import importlib.util
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[1] / "examples"
# Where Python looks when it runs a script. At the end, because `evaluate` is also the name of a library.
sys.path.append(str(EXAMPLES))


def script(name):
    """A script's main. Each is a process of its own; here they share one, in which accelerate keeps its state."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(arguments):
        # Other tests may have left a state, too.
        forget_accelerate()
        try:
            module.main(arguments)
        finally:
            forget_accelerate()

    return main


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def lines(folder, event):
    log = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, log) if line["event"] == event]
