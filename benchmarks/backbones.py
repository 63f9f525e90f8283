"""Compares the ID-based models on MovieLens-100K and prints the table of docs/how_to/backbones.md.

python benchmarks/backbones.py --output-dir runs/backbones

All models get the same search on a random split: learning rate and L2 penalty by validation AUC at seed 0. The best
setting is then trained with every seed. Test rows are read once per seed. Finished runs are kept, so the program can be
stopped and restarted. Speed is measured at the end, when no other runs are active, as medians of repeats: rows per
second of whole training steps on prepared batches, and of scoring encoded test rows.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from ceilings import wait_for_device
from shared import example, flags, machine, markdown, mean_and_deviation, run_jobs

from flip_hf import FlipCTRCollator, FlipForCTR
from flip_hf.backbones import BACKBONES
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.fetch import minilm
from flip_hf.runs.build import fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.device import make_accelerator
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.scoring import click_logits
from flip_hf.training.optimization import build_optimizer
from flip_hf.training.settings import TrainingSettings

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BACKBONES},
    "dcnv2, matrix": ("dcnv2", {"cross": "matrix"}),
    "autoint, attention alone": ("autoint", {"hidden_sizes": []}),
}
"""Row of the table -> backbone and options."""

SEARCH: dict[str, list[Any]] = {
    "training.learning_rate": [1e-3, 2e-3, 5e-3],
    "training.feature_l2": [0.0, 0.03],
}
GRID = [dict(zip(SEARCH, values, strict=True)) for values in itertools.product(*SEARCH.values())]
FIXED: dict[str, Any] = {
    "mode": "id",
    "training.per_device_train_batch_size": 256,
    "training.num_train_epochs": 6,
    "training.precision": "fp32",
}
REPEATS, TRAIN_BATCH, SCORE_BATCH, STEPS = 5, 256, 4096, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/backbones"))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="parallel runs, except when speed is measured")
    arguments = parser.parse_args()

    best = search(arguments.variants, arguments.output_dir, arguments.processes)
    trained = {
        name: [job(name, best[name], seed, arguments.output_dir) for seed in range(arguments.seeds)] for name in best
    }
    run_jobs(itertools.chain.from_iterable(trained.values()), arguments.processes)
    speeds = measure(arguments.variants)
    rows = []
    for name, jobs in trained.items():
        results = [each.load_result()["result"]["test"] for each in jobs]
        parameters, training, scoring = speeds[name]
        rows.append(
            [
                name,
                f"{parameters:,}",
                *(mean_and_deviation([result[metric] for result in results]) for metric in ("auc", "logloss")),
                f"{training:,.0f}",
                f"{scoring:,.0f}",
                ", ".join(f"{value:g}" for value in best[name].values()),
            ]
        )
    header = ["model", "parameters", "test AUC", "test LogLoss", "rows/s training", "rows/s scoring", "rate, L2"]
    print(f"\n{markdown(header, rows)}\n\n{arguments.seeds} seeds. {machine()}.")


def job(variant: str, settings: dict[str, Any], seed: int, folder: Path) -> Any:
    """Job that finetunes an ID-based model from scratch."""
    backbone, options = VARIANTS[variant]
    name = "-".join([variant.replace(", ", "-"), *(f"{value:g}" for value in settings.values()), str(seed)])
    model = {"model.options.backbone": backbone, "model.options.backbone_options": options}
    return example("finetune", folder / name, *flags(FIXED | model | settings | {"training.seed": seed}))


def search(variants: list[str], folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Returns the settings of each variant with the best validation AUC at seed 0."""
    run_jobs((job(name, settings, 0, folder) for name in variants for settings in GRID), processes)
    return best_settings(variants, folder)


def best_settings(variants: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the result of `search` from its finished runs."""

    def validation_auc(name: str, settings: dict[str, Any]) -> float:
        auc: float = job(name, settings, 0, folder).load_result()["result"]["validation"]["auc"]
        return auc

    return {name: max(GRID, key=lambda settings: validation_auc(name, settings)) for name in variants}


def measure(variants: list[str]) -> dict[str, tuple[int, float, float]]:
    """Measures each variant: parameters, and rows per second in training and in scoring."""
    log = load_click_log(DataSettings(source="movielens-100k"))
    minilm()
    processor = fit_processor(log, ModelSettings())
    test = log.encode(processor, "test")
    collator = FlipCTRCollator(processor, "id")
    rows = EncodedRows(test, collator.columns)
    numbers = np.arange(4 * TRAIN_BATCH).reshape(4, TRAIN_BATCH)
    accelerator = make_accelerator(FIXED["training.precision"])
    batches = [
        send_to_device(collator(rows.__getitems__(of_batch)), accelerator.device) for of_batch in numbers.tolist()
    ]

    found = {}
    for name in variants:
        backbone, options = VARIANTS[name]
        settings = ModelSettings(options={"backbone": backbone, "backbone_options": options})
        model: Any = new_model(FlipForCTR, settings, processor, "id")
        prepared, optimizer = accelerator.prepare(model, build_optimizer(model, TrainingSettings()))
        training, scoring = [], []
        for _ in range(REPEATS + 1):
            prepared.train()
            started = time.perf_counter()
            for step in range(STEPS):
                accelerator.backward(prepared(**batches[step % len(batches)]).loss)
                optimizer.step()
                optimizer.zero_grad()
            wait_for_device()
            training.append(STEPS * TRAIN_BATCH / (time.perf_counter() - started))
            started = time.perf_counter()
            click_logits(prepared, test, collator, SCORE_BATCH, accelerator, name)
            scoring.append(len(test) / (time.perf_counter() - started))
        parameters = sum(p.numel() for p in model.parameters())
        # The first repeat is a warm-up.
        found[name] = (parameters, statistics.median(training[1:]), statistics.median(scoring[1:]))
        print(f"{name}: {found[name]} on {torch.get_num_threads()} threads", flush=True)
    return found


if __name__ == "__main__":
    main()
