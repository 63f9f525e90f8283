"""Fits and encodes generated click logs of the size of the paper's GoodReads, out of core.

python benchmarks/prepare.py --millions 1 5 20

The log is a Parquet file with fifteen fields. Users, items and titles are large and skewed (Zipf, exponent 1). Each
size is prepared in its own process, whose peak memory is reported. Fitting reads the file as a stream, and encoding
writes an Arrow cache on disk. Generating the log is not timed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ceilings import CPU, measure_ceilings
from shared import PeakMemory, machine, markdown

from flip_hf import FieldConfig, FlipProcessor
from flip_hf.fetch import minilm
from flip_hf.runs.data import open_click_log_file
from flip_hf.standard_json import measures_json

# Name -> distinct values at 20 million rows, 4.5 million in all. They grow with the log, as in real logs.
FIELDS = {
    "user_id": 870_000,
    "book_id": 1_520_000,
    "title": 1_210_000,
    "author": 710_000,
    "publisher": 150_000,
    "series": 30_000,
    "country": 200,
    "language": 90,
    "format": 60,
    "year": 130,
    "pages": 1_500,
    "shelf": 1_000,
    "is_ebook": 2,
    "rating_band": 10,
    "weekday": 7,
}
MOST_ROWS = 20_000_000
BLOCK = 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="*", default=[1, 5, 20], help="millions of rows")
    parser.add_argument("--folder", type=Path, help="folder of the log and the cache; a temporary one by default")
    parser.add_argument("--measure", type=Path, help="internal: prepare this file in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measures_json(measure(arguments.measure)))
        return
    rows = []
    for millions in arguments.millions:
        folder = Path(tempfile.mkdtemp(prefix="flip-prepare-", dir=arguments.folder))
        try:
            path = folder / "log.parquet"
            generate(path, round(millions * 1e6))
            command = [sys.executable, __file__, "--measure", str(path)]
            environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"}
            # Runs this program again.
            done = subprocess.run(  # nosec B603
                command, stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            facts = json.loads(done.stdout.splitlines()[-1])
        finally:
            shutil.rmtree(folder)
        print(measures_json({"benchmark": "prepare", **facts}), flush=True)
        rows.append(
            [
                f"{millions:g}",
                f"{facts['features'] / 1e6:.2f}",
                f"{facts['fit_seconds']:.1f}",
                f"{facts['open_seconds']:.1f}",
                f"{facts['encode_seconds']:.1f}",
                f"{facts['rows_per_second']:,.0f}",
                f"{facts['peak_gib']:.2f}",
            ]
        )
    header = ["million rows", "million features", "fit, s", "open, s", "encode, s", "rows/s, all", "peak memory, GiB"]
    print(f"\n{markdown(header, rows)}\n\n{len(FIELDS)} fields. {measure_ceilings(CPU)}\n\n{machine()}")


def generate(path: Path, num_rows: int) -> None:
    """Writes a log with this many rows."""
    random = np.random.default_rng(0)
    share = num_rows / MOST_ROWS
    pools = {name: _values(name, max(2, round(size * (share if size > 5000 else 1)))) for name, size in FIELDS.items()}
    schema = pa.schema([*((name, pa.string()) for name in FIELDS), ("label", pa.int8())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, BLOCK):
            size = min(BLOCK, num_rows - start)
            columns = []
            for values in pools.values():
                # The value of rank r has a frequency proportional to 1 / r.
                ranks = (len(values) ** random.random(size)).astype(np.int64) - 1
                columns.append(values.take(pa.array(ranks)))
            columns.append(pa.array(random.integers(0, 2, size), pa.int8()))
            writer.write_table(pa.table(columns, schema=schema))


def _values(name: str, number: int) -> pa.Array:
    words = ["river", "night", "garden", "stone", "winter", "city", "letter", "shadow", "ocean", "memory", "silver"]
    if name in ("title", "author", "publisher", "series"):
        return pa.array(
            [f"{words[i % 11]} {words[i // 11 % 11]} {words[i // 121 % 11]} {i // 1331}" for i in range(number)]
        )
    return pa.array([f"{i:x}" for i in range(number)])


def measure(path: Path) -> dict[str, float]:
    """Prepares a log, and returns the times and the peak memory."""
    peak = PeakMemory()
    fields = [FieldConfig(name) for name in FIELDS]
    encoder = minilm()
    started = time.perf_counter()
    processor = FlipProcessor.fit(path, fields, encoder, label="label")
    fitted = time.perf_counter()
    rows = open_click_log_file(path, fields, "label")
    opened = time.perf_counter()
    encoded = processor.encode_dataset(rows, source=str(path))
    ended = time.perf_counter()
    assert isinstance(encoded, datasets.Dataset)
    assert len(encoded) == len(rows)
    return {
        "rows": len(rows),
        "features": len(processor.vocabulary),
        "fit_seconds": fitted - started,
        "open_seconds": opened - fitted,
        "encode_seconds": ended - opened,
        "rows_per_second": len(rows) / (ended - started),
        "peak_gib": peak.stop() / 2**20,
    }


if __name__ == "__main__":
    main()
