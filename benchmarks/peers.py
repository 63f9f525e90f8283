"""Compares ID-based models of deepctr-torch with ours, on the split, rows and search budget of `backbones.py`.

python benchmarks/backbones.py --output-dir runs/backbones
python benchmarks/peers.py --output-dir runs/peers --ours runs/backbones

Both sides get six settings at seed 0, chosen by validation AUC, then five seeds. Training takes at most six epochs in
batches of 256; the epoch with the best validation AUC counts, and two epochs without a better one end the run.
Embeddings have 32 dimensions, hidden layers 256 and 128 units, dropout is 0.1. Ours searches the learning rate and
`feature_l2`, deepctr-torch's the learning rate and `l2_reg_embedding`. Each keeps its own initialisation and optimiser
(ours AdamW with a cosine schedule, theirs Adam).
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from backbones import FIXED, best_settings
from backbones import job as our_job
from shared import Job, machine, markdown, mean_and_deviation, run_jobs
from transformers import set_seed

from flip_hf.fetch import minilm
from flip_hf.metrics import compute_metrics
from flip_hf.runs.build import fit_processor
from flip_hf.runs.data import load_click_log
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.standard_json import measures_json, settings_json
from flip_hf.training.checkpoints import replace_file

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dcnv2": ("DCNMix", {"cross_num": 3, "low_rank": 32, "num_experts": 4}),
    "dcnv2, matrix": ("DCN", {"cross_num": 3, "cross_parameterization": "matrix"}),
    "xdeepfm": ("xDeepFM", {}),
    "wide_deep": ("WDL", {}),
    "deepfm": ("DeepFM", {}),
}
"""Row of the table, as in `backbones.VARIANTS` -> deepctr-torch's class and options."""

SEARCH: dict[str, list[Any]] = {"learning_rate": [1e-3, 2e-3, 5e-3], "l2_reg_embedding": [0.0, 1e-5]}
DIM, HIDDEN, DROPOUT = 32, (256, 128), 0.1
PATIENCE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/peers"))
    parser.add_argument("--ours", type=Path, default=Path("runs/backbones"), help="folder of backbones.py")
    parser.add_argument("--models", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--train", type=json.loads, help="internal: train one model in this process")
    arguments = parser.parse_args()
    if arguments.train:
        train(**arguments.train)
        return

    folder, seeds = arguments.output_dir, range(arguments.seeds)
    grid = [dict(zip(SEARCH, values, strict=True)) for values in itertools.product(*SEARCH.values())]
    run_jobs((job(name, each, 0, folder) for name in arguments.models for each in grid), arguments.processes)
    best = {
        name: max(grid, key=lambda each: job(name, each, 0, folder).load_result()["validation"]["auc"])
        for name in arguments.models
    }
    run_jobs((job(name, best[name], seed, folder) for name in best for seed in seeds), arguments.processes)
    our_best = best_settings(arguments.models, arguments.ours)
    rows = []
    for name, settings in best.items():
        theirs = [job(name, settings, seed, folder).load_result()["test"] for seed in seeds]
        ours = [our_job(name, our_best[name], seed, arguments.ours).load_result()["result"]["test"] for seed in seeds]
        difference = statistics.fmean(o["auc"] - t["auc"] for o, t in zip(ours, theirs, strict=True))
        cells = [
            mean_and_deviation([r[metric] for r in side]) for metric in ("auc", "logloss") for side in (ours, theirs)
        ]
        chosen = ["; ".join(f"{value:g}" for value in each.values()) for each in (our_best[name], settings)]
        rows.append([name, *cells, f"{difference:+.4f}", *chosen])
    header = ["model", "AUC", "AUC, deepctr-torch", "LogLoss", "LogLoss, deepctr-torch", "difference of AUC"]
    print(
        f"\n{markdown([*header, 'rate; L2', 'rate; L2, deepctr-torch'], rows)}\n\n{arguments.seeds} seeds. {machine()}."
    )


def job(name: str, settings: dict[str, Any], seed: int, folder: Path) -> Job:
    """Job that trains a model of deepctr-torch."""
    label = "-".join([name.replace(", ", "-"), *(f"{value:g}" for value in settings.values()), str(seed)])
    result = folder / label / "result.json"
    wanted = {"name": name, "seed": seed, "result": str(result), **settings}
    return Job(result, [__file__, "--train", settings_json(wanted)])


def train(name: str, seed: int, result: str, learning_rate: float, l2_reg_embedding: float) -> None:
    """Trains one model, and writes the validation and test metrics of the epoch with the best validation AUC."""
    # On import, deepctr-torch starts a thread that asks a package index for its newest version.
    with mock.patch("threading.Thread.start"):
        from deepctr_torch import models
        from deepctr_torch.inputs import SparseFeat

    log = load_click_log(DataSettings(source="movielens-100k"))
    minilm()
    processor = fit_processor(log, ModelSettings())
    ranges = [owned[0] for owned in processor.vocabulary.ranges]
    columns = [
        SparseFeat(f.name, end - first, embedding_dim=DIM)
        for f, (first, end) in zip(processor.fields, ranges, strict=True)
    ]
    inputs, labels = {}, {}
    for split in log.splits:
        table = log.encode(processor, split).with_format("arrow")[:]
        ids = table["feature_ids"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        inputs[split] = {f.name: ids[:, i] - ranges[i][0] for i, f in enumerate(processor.fields)}
        labels[split] = table["label"].to_numpy()

    set_seed(seed)
    kind, options = PEERS[name]
    common = {"dnn_hidden_units": HIDDEN, "dnn_dropout": DROPOUT, "l2_reg_embedding": l2_reg_embedding, "seed": seed}
    model = getattr(models, kind)(columns, columns, **common, **options)
    model.compile(torch.optim.Adam(model.parameters(), lr=learning_rate), "binary_crossentropy")
    best: dict[str, Any] = {}
    without_better, started = 0, time.monotonic()
    for epoch in range(FIXED["training.num_train_epochs"]):
        model.fit(inputs["train"], labels["train"], FIXED["training.per_device_train_batch_size"], epochs=1, verbose=0)
        found = compute_metrics(labels["validation"], np.ravel(model.predict(inputs["validation"], 4096)))
        if not best or found["auc"] > best["validation"]["auc"]:
            best = {"validation": found, "epoch": epoch}
            best["test"] = np.ravel(model.predict(inputs["test"], 4096))
            without_better = 0
        else:
            without_better += 1
        if without_better == PATIENCE:
            break
    best["test"] = compute_metrics(labels["test"], best["test"])
    best["seconds"] = time.monotonic() - started
    replace_file(Path(result), measures_json(best, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
