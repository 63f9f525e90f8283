"""Times preparation and training on a log with a vector field.

python benchmarks/vectors.py --millions 0.5 5 --size 512

Each log is written as Parquet (not timed), then fitted, encoded and trained on in its own process, whose peak memory is
reported. Each size is also measured without the vectors, in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ceilings import CPU, measure_ceilings
from shared import PeakMemory, machine, markdown
from transformers import BertConfig

from flip_hf import FieldConfig, FlipConfig, FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.fetch import minilm
from flip_hf.standard_json import measures_json

ROWS_AT_ONCE = 1 << 15
BATCH_ROWS, STEPS = 4096, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[0.5], help="sizes of the log, in million rows")
    parser.add_argument("--size", type=int, default=512, help="numbers of a vector")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, size = arguments.measure
        print(measures_json(measure(Path(path), int(size))))
        return
    ceilings = measure_ceilings(CPU)
    rows: list[list[str]] = []
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory(prefix="vectors-") as folder:
            path = Path(folder, "log.parquet")
            make_log(path, round(millions * 1e6), arguments.size)
            found = [run_apart(path, Path(folder, f"cache-{size}"), size) for size in (arguments.size, 0)]
        for name, of_log in zip(("with", "without"), found, strict=True):
            rates = [f"{of_log[part]:,.0f}" for part in ("fit", "encode", "bytes", "collate", "train")]
            rows.append([f"{millions:g}", name, *rates, f"{of_log['memory']:.2f}"])
    rates = ["fit, rows/s", "encode, rows/s", "encoded, bytes/row", "collate, rows/s", "train, rows/s"]
    print(f"{markdown(['million rows', 'vectors', *rates, 'peak memory, GiB'], rows)}\n")
    print(f"Vectors of {arguments.size} numbers.\n\n{measure_ceilings(CPU, ceilings)}\n\n{machine()}")


def make_log(path: Path, num_rows: int, size: int) -> None:
    """Writes users, items, a label and float32 vectors, as a stream."""
    random = np.random.default_rng(0)
    columns = [("user", pa.int64()), ("item", pa.int64()), ("label", pa.int8())]
    schema = pa.schema([*columns, ("vector", pa.list_(pa.float32(), size))])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            number = min(ROWS_AT_ONCE, num_rows - start)
            values = random.standard_normal(number * size, np.float32)
            arrays = [random.integers(0, top, number) for top in (100_000, 50_000, 2)]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), size)
            writer.write_table(
                pa.Table.from_arrays(
                    [*map(pa.array, arrays[:2]), pa.array(arrays[2], pa.int8()), vectors], schema=schema
                )
            )


def run_apart(path: Path, cache: Path, size: int) -> dict[str, float]:
    """Runs `measure` in its own process."""
    command = [sys.executable, __file__, "--measure", str(path), str(size)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(path: Path, size: int) -> dict[str, float]:
    """Measures rows/s of each part, bytes of an encoded row, and the peak memory in GiB.

    Args:
        path: the log.
        size: numbers of a vector; 0 leaves the vectors out.
    """
    fields = [FieldConfig("user"), FieldConfig("item")]
    if size:
        fields.append(FieldConfig("vector", kind="vector", size=size))
    memory = PeakMemory()
    num_rows = pq.ParquetFile(path).metadata.num_rows
    started = time.monotonic()
    processor = FlipProcessor.fit(str(path), fields, str(minilm()), label="label")
    fitted = time.monotonic()
    encoded = processor.encode_dataset(str(path))
    ended = time.monotonic()
    num_bytes = sum(Path(file["filename"]).stat().st_size for file in encoded.cache_files)
    model = FlipForCTR(FlipConfig(text_config=BertConfig(), fields=processor.fields, mode="id"))
    collator = FlipCTRCollator.from_model(processor, model)
    rows = EncodedRows(encoded, collator.columns)
    order = np.random.default_rng(0).permutation(num_rows)[: STEPS * BATCH_ROWS]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    collating = 0.0
    training = time.monotonic()
    for start in range(0, len(order), BATCH_ROWS):
        began = time.monotonic()
        batch = collator(rows.__getitems__(order[start : start + BATCH_ROWS].tolist()))
        collating += time.monotonic() - began
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "fit": num_rows / (fitted - started),
        "encode": num_rows / (ended - fitted),
        "bytes": num_bytes / num_rows,
        "collate": len(order) / collating,
        "train": len(order) / (time.monotonic() - training),
        "memory": memory.stop() / 2**20,
    }


if __name__ == "__main__":
    main()
