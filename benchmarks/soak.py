"""Trains and scores on MovieLens-100K for a long time, and reports how much the memory of each process grows.

python benchmarks/soak.py --minutes 30

Two programs run at the same time, one thread each: `finetune.py` with both towers, without end, with checkpoints and
evaluations; and `predict.py` with both towers, on a file that is too long to finish. Memory is the resident memory of
all processes of a program, sampled once a second. Growth is the slope of a straight line fitted to the samples after
the first third, when all one-time allocations have been made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from shared import REPOSITORY, example, flags, machine, markdown

from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings

ENDLESS = {
    "training.num_train_epochs": 100_000,
    "training.patience": 1_000_000,
    "training.save_steps": 200,
    "data.max_train_rows": 4096,
    "data.max_validation_rows": 1024,
}
A_MODEL = {"training.max_steps": 20, "data.max_validation_rows": 512}
COPIES = 40
"""How many times the scored file repeats the training rows of MovieLens-100K."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = [*example("finetune", folder / "endless", *flags(ENDLESS)).command]
        start([*example("finetune", folder / "scored", *flags(A_MODEL)).command], folder / "scored.log").wait()
        rows = load_click_log(DataSettings(source="movielens-100k")).splits["train"].with_format("arrow")[:]
        pq.write_table(pa.concat_tables([rows] * COPIES), folder / "rows.parquet")
        files = {"model": str(folder / "scored" / "model"), "input": str(folder / "rows.parquet")}
        files |= {"output": str(folder / "scores.parquet")}
        scoring = [str(REPOSITORY / "examples" / "predict.py"), *flags(files)]
        watched = {
            what: start(command, folder / f"{what}.log")
            for what, command in (("training", training), ("scoring", scoring))
        }
        sizes = sample(watched, arguments.minutes * 60)
        for what, process in watched.items():
            if process.poll() is not None:
                raise RuntimeError(f"{what} ended early: {(folder / f'{what}.log').read_text()[-2000:]}")
            process.kill()
            process.wait()
    rows_of_table = []
    for what, values in sizes.items():
        late = values[len(values) // 3 :]
        per_hour = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 3600
        rows_of_table.append([what, f"{values[-1, 0] / 60:.0f}", f"{values[:, 1].max():,.0f}", f"{per_hour:+,.1f}"])
    header = ["what", "minutes", "most memory, MiB", "growth, MiB an hour"]
    print(f"\n{markdown(header, rows_of_table)}\n\n{machine()}.")


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a program on one thread, with its output in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        # Runs scripts of this repository only.
        command = [sys.executable, *command]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)  # nosec B603


def sample(watched: dict[str, subprocess.Popen[bytes]], seconds: float) -> dict[str, np.ndarray]:
    """Samples seconds since the start and MiB of resident memory of each program, float64 (samples, 2)."""
    began = time.monotonic()
    found: dict[str, list[tuple[float, float]]] = {what: [] for what in watched}
    while (now := time.monotonic() - began) < seconds and all(p.poll() is None for p in watched.values()):
        for what, process in watched.items():
            root = psutil.Process(process.pid)
            total = sum(each.memory_info().rss for each in (root, *root.children(recursive=True)))
            found[what].append((now, total / 2**20))
        time.sleep(1)
    return {what: np.array(values) for what, values in found.items()}


if __name__ == "__main__":
    main()
