"""Times scoring by a model with text towers: without a cache of the towers' vectors, with an empty and with a full one.

python benchmarks/cached_towers.py

The rows are the test rows of MovieLens-100K, random split. The model is DCNv2 with one layer of MiniLM and a text tower
each for users and items. It is untrained, which does not affect its speed.
"""

import argparse
import itertools
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from ceilings import CPU, measure_ceilings
from shared import machine, markdown

from flip_hf import CTRPredictionPipeline, FlipForCTR
from flip_hf.click_training import logit_biases
from flip_hf.fetch import minilm
from flip_hf.fields import FieldConfig
from flip_hf.runs.build import fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings, ModelSettings

MODES, CACHES = ("joint", "text"), ("none", "empty", "full")
ITEM = ("movie_id", "title", "genre")


def make_model(settings: ModelSettings, processor: Any) -> FlipForCTR:
    """An untrained joint model whose biases are set, so that it counts as trained."""
    torch.manual_seed(0)
    model = new_model(FlipForCTR, settings, processor)
    with torch.no_grad():
        for bias in logit_biases(model).values():
            bias.fill_(0.01)
    return model.eval()


def two_towers(fields: list[FieldConfig]) -> dict[str, list[str]]:
    """The fields of the user's and of the item's tower, by the tower's name."""
    names = [field.name for field in fields]
    return {"user": [name for name in names if name not in ITEM], "item": [name for name in names if name in ITEM]}


def timed(pipe: CTRPredictionPipeline, rows: Any) -> tuple[float, Any]:
    """Seconds that scoring takes, and its result."""
    started = time.perf_counter()
    results = pipe(rows)
    return time.perf_counter() - started, results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--text_layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    minilm()
    log = load_click_log(DataSettings(source="movielens-100k"))
    settings = ModelSettings(text_layers=arguments.text_layers)
    processor = fit_processor(log, settings)
    rows = log.splits["test"].with_format("arrow")[: arguments.rows]
    settings.options["text_towers"] = towers = two_towers(processor.fields)
    joint = make_model(settings, processor)
    texts = sum(len(rows.select(names).to_pandas().astype(str).drop_duplicates()) for names in towers.values())
    one: Any = rows.slice(0, 1).select([field.name for field in processor.fields]).to_pylist()[0]
    ceilings = measure_ceilings(CPU)

    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[tuple[str, str], np.ndarray] = {}
    pipes: dict[tuple[str, str], CTRPredictionPipeline] = {}
    # The sides take turns, so that other work on the machine slows all of them down equally.
    for _ in range(arguments.repeats):
        for mode in MODES:
            pipes[mode, "none"] = CTRPredictionPipeline(joint, processor, mode=mode, tower_cache=0)
            pipes[mode, "empty"] = pipes[mode, "full"] = CTRPredictionPipeline(joint, processor, mode=mode)
        for side in itertools.product(MODES, CACHES):
            taken, results = timed(pipes[side], rows)
            times[side].append(taken)
            found[side] = np.array([result["probability"] for result in results])
    rates = {side: len(rows) / float(np.median(taken)) for side, taken in times.items()}
    table = [[*side, f"{rate:,.0f}", f"{rate / rates[side[0], 'none']:.1f}"] for side, rate in rates.items()]
    difference = max(np.abs(found[mode, "none"] - found[mode, "full"]).max() for mode in MODES)
    latencies = []
    for side in itertools.product(MODES, ("none", "full")):
        ms = [1000 * timed(pipes[side], one)[0] for _ in range(300)][50:]
        latencies.append([*side, f"{np.median(ms):.2f}", f"{np.percentile(ms, 99):.2f}"])

    print(f"{markdown(['mode', 'cache', 'rows/s', 'speed-up over no cache'], table)}\n")
    print(f"{len(rows):,} rows with {texts:,} distinct texts of users and items.")
    print(f"Probabilities with and without the cache differ by {difference:.1e} at most.\n")
    print(f"{markdown(['one row, mode', 'cache', 'median ms', '99th percentile ms'], latencies)}\n")
    print(f"{measure_ceilings(CPU, ceilings)}\n\n{machine()}")


if __name__ == "__main__":
    main()
