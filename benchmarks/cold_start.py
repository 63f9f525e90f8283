"""Rows never seen: MovieLens-100K split by time, where most users of the test rows are in no training row.

python benchmarks/cold_start.py --output-dir runs/cold_start

Each model with and without the history of what the user rated before: DCNv2 alone, also with users dropped to their
OOV feature in training; FLIP_PLM; FLIP with the paper's learned weight; FLIP with a gate that sees which fields are
OOV. AUC on all test rows, on those of users and of movies that no training row has, and on those of neither. Finished
runs are kept, so the program can be stopped and started again.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from jobs import example, machine

from flip_hf.training.jobs import Job, flags, markdown, run_jobs

HISTORIES = {"with": ["rated_titles"], "without": []}
SLICES = {"all": "all rows", "user_id unseen": "unseen users", "movie_id unseen": "unseen movies", "seen": "seen"}
DROPPED = {"user_id": 0.5, "movie_id": 0.05, "title": 0.05}

ID_ONLY: dict[str, Any] = {
    "mode": "id",
    "training.precision": "fp32",
    "training.batch_size": 256,
    "training.epochs": 2,
    "training.learning_rate": 2e-3,
}
PRETRAINING: dict[str, Any] = {"training.max_steps": 128, "data.max_validation_rows": 1024}
FINETUNING: dict[str, Any] = {
    "training.batch_size": 64,
    "training.epochs": 1,
    "training.learning_rate": 3e-3,
    "training.text_learning_rate": 3e-4,
    "training.evaluations_per_epoch": 2,
}
GATED: dict[str, Any] = {"model.options.fusion": "gated", "training.oov_dropout": DROPPED}

MODELS: dict[str, tuple[bool, dict[str, Any]]] = {
    "DCNv2 alone": (False, ID_ONLY),
    "DCNv2 alone, users dropped": (False, ID_ONLY | {"training.oov_dropout": DROPPED}),
    "FLIP_PLM": (True, FINETUNING | {"mode": "text"}),
    "FLIP, learned weight": (True, FINETUNING),
    "FLIP, gate": (True, FINETUNING | GATED),
}
"""Row of the table -> whether it starts from pretraining, and its settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/cold_start"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    folder, seeds = arguments.output_dir, range(arguments.seeds)

    cells = [(model, history, seed) for seed in seeds for history in HISTORIES for model in MODELS]
    run_jobs((pretraining(history, seed, folder) for seed in seeds for history in HISTORIES), arguments.processes)
    run_jobs((finetuning(*cell, folder) for cell in cells), arguments.processes)
    run_jobs((evaluation(*cell, folder) for cell in cells), arguments.processes)
    rows, counts = [], {}
    for model in MODELS:
        for history in HISTORIES:
            found = [evaluation(model, history, seed, folder).read() for seed in seeds]
            slices = [{"all": {"rows": each["rows"], **each["metrics"]}, **each["slices"]} for each in found]
            counts = {name: slices[0][name]["rows"] for name in SLICES}
            aucs = [statistics.fmean(each[name].get("auc", float("nan")) for each in slices) for name in SLICES]
            rows.append([model, history, *(f"{auc:.4f}" for auc in aucs)])
    header = ["model", "history", *(f"{shown} ({counts[name]:,})" for name, shown in SLICES.items())]
    print(f"\n{markdown(header, rows)}\n\nTest AUC, {arguments.seeds} seed(s). {machine()}.")


def pretraining(history: str, seed: int, folder: Path) -> Job:
    """Aligns the views of the training rows."""
    return example("pretrain", folder / f"pretrained-{history}-{seed}", *flags(PRETRAINING | common(history, seed)))


def finetuning(model: str, history: str, seed: int, folder: Path) -> Job:
    """Trains a model of the table."""
    pretrained, settings = MODELS[model]
    start = {"pretrained": str(pretraining(history, seed, folder).result.parent / "model")} if pretrained else {}
    name = f"{model.replace(', ', '-').replace(' ', '-')}-{history}-{seed}"
    return example("finetune", folder / name, *flags(settings | start | common(history, seed)))


def evaluation(model: str, history: str, seed: int, folder: Path) -> Job:
    """Reads the test rows in slices."""
    run = finetuning(model, history, seed, folder).result.parent
    settings = {"model": str(run / "model"), "output": str(run / "slices.json"), "slices": ["user_id", "movie_id"]}
    script = Path(__file__).resolve().parent.parent / "examples" / "evaluate.py"
    data = {"data.source": "movielens-100k", "data.split": "time", "data.histories": HISTORIES[history]}
    return Job(run / "slices.json", [str(script), *flags(settings | data)])


def common(history: str, seed: int) -> dict[str, Any]:
    """Settings of every run."""
    return {"data.split": "time", "data.histories": HISTORIES[history], "training.seed": seed}


if __name__ == "__main__":
    main()
