"""Times scoring: ID-based models beside deepctr-torch's, a single row, both towers beside a plain loop, the cascade.

python benchmarks/score.py --model runs/demo/flip/model

The rows are the test rows of MovieLens-100K, random split, repeated if there are too few. `--model` is a joint model
that was trained on that split, such as the one of `make demo`.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from ceilings import CPU, measure_ceilings
from peers import DIM, DROPOUT, HIDDEN, PEERS
from shared import machine, markdown

from flip_hf import CTRPredictionPipeline, FlipConfig, FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data.sampling import text_lengths
from flip_hf.export import OnnxScorer, export_onnx
from flip_hf.metrics import compute_metrics
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings

BATCH = 4096
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def make_pipeline(path: Path, mode: str = "joint", batch_size: int | None = None) -> CTRPredictionPipeline:
    """A pipeline that builds only what the mode reads."""
    model: Any = FlipForCTR.from_pretrained(path, mode=mode)
    return CTRPredictionPipeline(model, FlipProcessor.from_pretrained(path), batch_size=batch_size)


def rate(rows: int, call: Callable[[], object], repeats: int = 5) -> float:
    """Rows per second: the median of several calls after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return rows / float(np.median(times))


@torch.no_grad()
def id_models(processor: FlipProcessor, encoded: pa.Table) -> list[list[str]]:
    """Rows per second of DCNv2 of the same size, ours and deepctr-torch's, from feature ids."""
    # On import, deepctr-torch starts a thread that asks a package index for its newest version.
    with mock.patch("threading.Thread.start"):
        from deepctr_torch import models
        from deepctr_torch.inputs import SparseFeat
    ids = torch.from_numpy(np.stack(encoded["feature_ids"].to_numpy())[:BATCH])
    ranges = [owned[0] for owned in processor.vocabulary.ranges]
    named = list(zip(processor.fields, ranges, strict=True))
    columns = [SparseFeat(f.name, end - first, embedding_dim=DIM) for f, (first, end) in named]
    local = (ids - torch.tensor([first for first, _ in ranges])).float()
    table = []
    for name, options in (("dcnv2", {}), ("dcnv2, matrix", {"cross": "matrix"})):
        sizes = {"hidden_sizes": list(HIDDEN), "dropout": DROPOUT, **options}
        config = FlipConfig(fields=processor.fields, mode="id", embedding_dim=DIM, backbone_options=sizes)
        ours: Any = FlipForCTR(config).eval()
        kind, extra = PEERS[name]
        theirs: Any = getattr(models, kind)(columns, columns, dnn_hidden_units=HIDDEN, dnn_dropout=DROPOUT, **extra)
        theirs.eval()
        own = rate(len(ids), functools.partial(ours, feature_ids=ids), 20)
        peer = rate(len(ids), functools.partial(theirs, local), 20)
        table.append([name, f"{own:,.0f}", f"{peer:,.0f}", f"{own / peer:.2f}"])
    return table


def one_row(path: Path, row: dict[str, Any], folder: str) -> list[list[str]]:
    """Milliseconds from a dict to its probability."""
    table = []
    for mode in ("id", "joint"):
        clicks, scorer = make_pipeline(path, mode), onnx_scorer(path, folder, mode)
        processor, collator = clicks.processor, FlipCTRCollator(clicks.processor, mode)

        def by_onnx(
            row: Any, processor: Any = processor, collator: Any = collator, scorer: Any = scorer, mode: str = mode
        ) -> Any:
            return scorer(collator(processor.encode([row], with_text=mode != "id")))

        for name, call in (("pipeline", clicks), ("ONNX Runtime", by_onnx)):
            times = []
            for _ in range(1100):
                started = time.perf_counter()
                call(row)
                times.append(1000 * (time.perf_counter() - started))
            times = times[100:]
            table.append([mode, name, f"{np.median(times):.2f}", f"{np.percentile(times, 99):.2f}"])
    return table


@torch.no_grad()
def plain_scores(path: Path, processor: FlipProcessor, rows: pa.Table) -> np.ndarray:
    """What a plain loop computes: rows in their order, padded to the longest text that the model takes, fp32."""
    model: Any = FlipForCTR.from_pretrained(path).eval()
    found = []
    for start in range(0, len(rows), 256):
        inputs = processor(rows.slice(start, 256), return_tensors="pt", pad_to_multiple_of=processor.max_length)
        found.append(model(**inputs).logits.sigmoid().numpy())
    return np.concatenate(found)


def onnx_scorer(path: Path, folder: str, mode: str = "joint", int8: bool = False) -> OnnxScorer:
    """Exports the model to ONNX and loads it."""
    model: Any = FlipForCTR.from_pretrained(path, mode=mode)
    return OnnxScorer(export_onnx(model, Path(folder) / f"{mode}-{int8}.onnx", int8))


def onnx_scores(scorer: OnnxScorer, processor: FlipProcessor, rows: pa.Table, batch_size: int = 256) -> np.ndarray:
    """Computes the pipeline's result with ONNX Runtime: rows of similar length share a batch."""
    encoded, collator = processor.encode(rows), FlipCTRCollator(processor)
    order, found = np.argsort(text_lengths(encoded), kind="stable"), np.empty(len(rows), np.float32)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found[places] = scorer(collator(encoded.take(places)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a joint model")
    parser.add_argument("--rows", type=int, default=4096, help="rows to score with both towers")
    arguments = parser.parse_args()
    processor = FlipProcessor.from_pretrained(arguments.model)
    split = load_click_log(DataSettings(source="movielens-100k")).splits["test"].with_format("arrow")[:]
    rows = split.slice(0, arguments.rows)
    labels = rows["label"].to_numpy()
    ceilings = measure_ceilings(CPU)

    table = id_models(processor, processor.encode(split, with_text=False))
    header = ["ID-based model", "rows/s", "rows/s, deepctr-torch", "speed-up"]
    print(f"{markdown(header, table)}\n\nBatches of {BATCH} rows, feature ids to logits.\n")

    ids = make_pipeline(arguments.model, "id", BATCH)
    print(f"FLIP_ID from Arrow rows to probabilities: {rate(len(split), lambda: ids(split), 3):,.0f} rows/s.\n")

    first = rows.slice(0, 1).select([f.name for f in processor.fields]).to_pylist()[0]
    with tempfile.TemporaryDirectory() as folder:
        table = one_row(arguments.model, first, folder)
        print(f"{markdown(['one row, mode', 'by', 'median ms', '99th percentile ms'], table)}\n")
        scorers = {
            "ONNX Runtime": onnx_scorer(arguments.model, folder),
            "ONNX Runtime, int8": onnx_scorer(arguments.model, folder, int8=True),
        }
    clicks = make_pipeline(arguments.model)
    budgets = {f"text_budget={share:g}": functools.partial(clicks, text_budget=share) for share in reversed(SHARES)}
    table, whole = [], 0.0
    calls: dict[str, Callable[[Any], Any]] = {
        "pipeline": clicks,
        "plain loop": functools.partial(plain_scores, arguments.model, processor),
        **{name: functools.partial(onnx_scores, scorer, processor) for name, scorer in scorers.items()},
        **budgets,
    }
    for name, call in calls.items():
        started = time.perf_counter()
        results: Any = call(rows)
        speed = len(rows) / (time.perf_counter() - started)
        whole = whole or speed
        found = np.array([r["probability"] for r in results]) if isinstance(results, list) else results
        table.append([name, f"{speed:,.0f}", f"{speed / whole:.2f}", *_quality(labels, found)])
    header = ["both towers", "rows/s", "speed-up over the pipeline", "AUC", "LogLoss"]
    print(f"{markdown(header, table)}\n\n{len(rows)} test rows.\n\n{measure_ceilings(CPU, ceilings)}\n\n{machine()}")


def _quality(labels: np.ndarray, found: np.ndarray) -> list[str]:
    metrics = compute_metrics(labels, found)
    return [f"{metrics['auc']:.4f}", f"{metrics['logloss']:.4f}"]


if __name__ == "__main__":
    main()
