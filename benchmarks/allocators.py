"""Times finetuning on a CPU with several memory allocators; the training results must not change.

python benchmarks/allocators.py

Allocators that are not installed (`apt-get install libtcmalloc-minimal4 libjemalloc2`) are skipped.
"""

import argparse
import ctypes.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import example, machine, markdown

from flip_hf.runs.curves import read_curves
from flip_hf.standard_json import measures_json

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps per allocator; the first log line is skipped")
    parser.add_argument("--mode", choices=["joint", "id", "text"], default="text")
    arguments = parser.parse_args()
    sides = {"default": {}, "huge pages": HUGE_PAGES}
    for name in ("tcmalloc_minimal", "jemalloc"):
        if (library := ctypes.util.find_library(name)) is not None:
            sides[name] = {"LD_PRELOAD": library}
            sides[f"{name}, huge pages"] = {"LD_PRELOAD": library, **HUGE_PAGES}
    rows = []
    for side, environment in sides.items():
        rates, losses = run(environment, arguments.mode, arguments.steps)
        rows.append([side, f"{statistics.fmean(rates):.0f}", f"{losses[-1]:.6f}"])
    print(markdown(["allocator", "rows/s", "last loss"], rows))
    print(f"\n{machine()}, one thread. Finetuning in mode {arguments.mode!r}, batches of 32, one layer of MiniLM.")
    print(measures_json({row[0]: float(row[1]) for row in rows}))


def run(environment: dict[str, str], mode: str, steps: int) -> list[list[float]]:
    """Rows per second and losses from the log lines of a run, without the first line."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--mode", mode, "--training.max_steps", str(steps)]
        flags += ["--training.logging_steps", str(max(1, steps // 10)), "--data.max_validation_rows", "256"]
        inherited = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", *HUGE_PAGES)}
        whole = {**inherited, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment}
        command = [sys.executable, *example("finetune", Path(folder), *flags).command]
        subprocess.run(command, env=whole, check=True, stdout=sys.stderr)
        train = read_curves(Path(folder) / "log.jsonl")["train"]
    return [list(train[name][1][1:]) for name in ("rows_per_second", "loss")]


if __name__ == "__main__":
    main()
