"""Trains on feature tables of many millions of rows: dense updates compared with updates of only the rows read.

python benchmarks/memory.py --features 1 5 50

Each row of the table is measured in its own process. The process builds a model of five fields, takes optimiser steps
with the package's training loop, and reports its peak memory. Features are drawn with the skew of click logs (Zipf).
The two sides differ only in the table's updates.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from ceilings import CPU, measure_ceilings
from shared import machine, markdown

from flip_hf import FieldConfig, FlipConfig, FlipForCTR
from flip_hf.fields import NUM_RESERVED_FEATURES, PADDING_ID
from flip_hf.standard_json import measures_json
from flip_hf.training import loop
from flip_hf.training.optimization import build_optimizer
from flip_hf.training.settings import TrainingSettings

# Each field's share of all features: two large fields, such as users and items, and small ones.
SHARES = (0.6, 0.3, 0.07, 0.02, 0.01)
DIM = 16
SKEW = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=float, nargs="*", default=[1, 5, 50], help="millions of features")
    parser.add_argument("--updates", nargs="*", choices=("dense", "rows"), default=["dense", "rows"])
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--measure", help="internal: take the steps in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measures_json(measure(arguments.batch_size, arguments.steps, **json.loads(arguments.measure))))
        return
    rows = []
    for millions in arguments.features:
        for updates in arguments.updates:
            wanted = measures_json({"features": round(millions * 1e6), "updates": updates})
            sizes = ["--batch_size", str(arguments.batch_size), "--steps", str(arguments.steps)]
            # Runs this program again.
            done = subprocess.run(  # nosec B603
                [sys.executable, __file__, "--measure", wanted, *sizes], stdout=subprocess.PIPE, text=True, check=False
            )
            name = [f"{millions:g} million", updates]
            if done.returncode:
                rows.append([*name, "did not fit" if done.returncode < 0 else "failed", "", ""])
                continue
            facts = json.loads(done.stdout.splitlines()[-1])
            print(measures_json({"benchmark": "memory", "updates": updates, **facts}))
            rows.append(
                [*name, f"{facts['peak_gib']:.2f}", f"{facts['step_ms']:.0f}", f"{facts['rows_per_second']:,.0f}"]
            )
    header = ["features", "feature_updates", "peak memory, GiB", "ms/step", "rows/s"]
    print(f"\n{markdown(header, rows)}\n\n{DIM} dimensions, batches of {arguments.batch_size} rows, FLIP_ID (DCNv2).\n")
    print(f"{measure_ceilings(CPU)}\n\n{machine()}")


def measure(batch_size: int, steps: int, features: int, updates: Any) -> dict[str, float]:
    """Takes optimiser steps on a table with this many features, and returns their cost."""
    torch.manual_seed(0)
    sizes = [round(share * features) for share in SHARES]
    fields = [FieldConfig(f"field_{i}", num_features=size) for i, size in enumerate(sizes)]
    model: Any = FlipForCTR(FlipConfig(fields=fields, mode="id", embedding_dim=DIM, backbone="dcnv2"))
    training = TrainingSettings(feature_updates=updates, per_device_train_batch_size=batch_size)
    # The peak memory of this process is the result.
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, training))
    run: Any = SimpleNamespace(accelerator=accelerator, folder=Path())
    random = np.random.default_rng(0)
    firsts = [ranges[0][0] for ranges in model.config.feature_ranges]
    times = []
    for step in range(steps):
        columns = []
        for first, size in zip(firsts, sizes, strict=True):
            # Hashing spreads frequent ids over the table, as in logs whose ids are hashes.
            ranks = random.zipf(SKEW, batch_size).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            columns.append(first + NUM_RESERVED_FEATURES + (ranks % np.uint64(size - 2)).astype(np.int64))
        ids = torch.from_numpy(np.stack(columns, axis=1))
        assert (ids != PADDING_ID).all()
        batch = {"feature_ids": ids, "labels": torch.from_numpy(random.integers(0, 2, batch_size).astype(np.float32))}
        started = time.perf_counter()
        prepared.train()
        loop._step(prepared, optimizer, [(torch.arange(batch_size), batch)], training, run, step)
        times.append(time.perf_counter() - started)
    step_seconds = statistics.median(times[2:])
    return {
        "features": features,
        # Linux counts in KiB.
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "step_ms": 1000 * step_seconds,
        "rows_per_second": batch_size / step_seconds,
    }


if __name__ == "__main__":
    main()
