"""The files in results/: JSON lines of records, and Parquet files of the runs' test scores."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flip_hf.standard_json import measures_json

CPU = "CPU"
_SCORES = pa.schema([("key", pa.string()), ("logits", pa.list_(pa.float16()))])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if there is no file."""
    if not path.exists():
        return []
    # If a program was killed while it wrote, the last line has no end.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def add_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        # Removes the part of a line that a killed program has written.
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{measures_json(record)}\n".encode())


def add_scores(path: Path, key: str, logits: np.ndarray) -> None:
    """Adds a run's logits to a Parquet file, in place of those that the run has there.

    The file is replaced at once: if this program is killed, the file is the old one or the new one.

    Args:
        path: the file; it need not exist.
        key: the run's.
        logits: float (rows,); float16 is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = pa.table({"key": [key], "logits": [logits.astype(np.float16)]}, schema=_SCORES)
    kept = pq.read_table(path).filter(pc.field("key") != key) if path.exists() else _SCORES.empty_table()
    write_scores(path, pa.concat_tables([kept, added]))


def write_scores(path: Path, scores: pa.Table) -> None:
    """Writes a Parquet file with the columns `key` (string) and `logits` (list of float16), and replaces it at once."""
    aside = path.with_name(f"{path.name}.new")
    # Signs and exponents compress, and the last bits of the numbers do not: bytes of one place are stored together.
    encodings = {"logits.list.element": "BYTE_STREAM_SPLIT"}
    pq.write_table(scores, aside, compression="zstd", use_dictionary=False, column_encoding=encodings)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def load_scores(folder: Path, key: str) -> np.ndarray:
    """A run's logits, float16 (rows,), from the Parquet file of the folder that has them.

    Raises:
        ValueError: no file has them.
    """
    for path in sorted(folder.glob("*.parquet")):
        found = pq.read_table(path, filters=pc.field("key") == key)["logits"]
        if len(found):
            logits: np.ndarray = found[0].values.to_numpy()
            return logits
    raise ValueError(f"{folder} has no scores of the run {key}")


def device_name(device: Mapping[str, Any]) -> str:
    """The device that a run computed on, from the part of its record that describes it."""
    if device["kind"] == "cpu":
        return CPU
    return ", ".join(dict.fromkeys(device.get("accelerators", [device["kind"]])))


def machine_name(run: Mapping[str, Any]) -> str:
    """The hardware, precision and library versions of a run, from its record."""
    device, versions = run["device"], run["versions"]
    name = device_name(device)
    where = f"{device.get('processor', CPU)}, {device['threads']} threads a run" if name == CPU else name
    # "no" is accelerate's word for it.
    precision = "fp32" if device["precision"] == "no" else device["precision"]
    return f"{where}, {precision}; torch {versions['torch']}, transformers {versions['transformers']}"
