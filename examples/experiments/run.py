"""Runs the experiments of tables/ and records them in results/. A recorded run is not run again.

python examples/experiments/run.py                        # all of them: many hours on a CPU
python examples/experiments/run.py 1-main --seeds 0 1     # some
python examples/experiments/run.py 1-main --rows DCNv2 FLIP    # some rows of a table
python examples/experiments/run.py --processes 15         # on a GPU, which one run leaves idle, by NVIDIA's MPS
python examples/experiments/run.py --again 3              # three recorded runs once more, beside what they had
python examples/experiments/run.py 13-months --files-dir ~/ml1m-months   # a table of files, which data.yaml names

A run that was stopped continues where it was. `runs.jsonl` holds a line for each run. `scores/` holds a Parquet file
for each table, with the runs' logits of the test rows; a run that several tables show is in the file of the first one
that recorded it. `comparisons.jsonl` holds a line for each two models of a table that were tested against each other on
one seed's test rows. `report.py` makes docs/results.md of them.
"""

import argparse
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from click_data import LABEL, ClickData
from datasets import DatasetDict
from experiments import RESULTS, PlannedRun, Table, data_of, find_run, key_of, load_tables
from jobs import Job, run_jobs
from measures import RARE
from recorded import add_line, add_scores, load_scores, machine_name, read_lines
from significance import delong, paired_bootstrap

from flip_hf.data.groups import group_ids
from flip_hf.fetch import minilm
from flip_hf.hub.card import public_record
from flip_hf.metrics import compute_metrics
from flip_hf.metrics.logloss import logloss
from flip_hf.runs.curves import PANELS, read_curves
from flip_hf.runs.script import run_script
from flip_hf.scoring import probabilities
from flip_hf.training.evaluation import evidence

RUNS_FILE, COMPARISONS_FILE, AGAIN_FILE = (RESULTS / f"{name}.jsonl" for name in ("runs", "comparisons", "again"))
SCORES = RESULTS / "scores"


@dataclass(frozen=True)
class Places:
    """Where runs write, and where the files lie of data sets that are files."""

    runs: Path
    files: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", help="names of tables; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where the runs' files go")
    parser.add_argument("--files-dir", type=Path, help="the folder of the files of data.yaml; else FLIP_FILES_DIR")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds")
    parser.add_argument("--splits", nargs="*", help="only these splits")
    parser.add_argument("--rows", nargs="*", help="only these rows of the tables")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--again", type=int, metavar="N", help="run N recorded runs again, drawn at random")
    arguments = parser.parse_args()
    # The configurations' text encoder, which needs no Hub then.
    minilm()
    given = arguments.files_dir or os.environ.get("FLIP_FILES_DIR")
    files = Path(given) if given else None
    if arguments.again:
        repeat(arguments.again, Places(arguments.runs / "again", files), arguments.processes)
        return
    places = Places(arguments.runs, files)
    tables = load_tables(arguments.tables)
    if arguments.rows:
        if unknown := [row for row in arguments.rows if not any(row in table.rows for table in tables)]:
            raise ValueError(f"{unknown[0]!r} is no row of {', '.join(table.name for table in tables)}")
        tables = [table.only(arguments.rows) for table in tables]
    if files is None and not arguments.tables:
        left_out = [table for table in tables if data_of(table.data).files]
        tables = [table for table in tables if table not in left_out]
        print("".join(f"{table.name} is left out: --files-dir says where {table.data} lies\n" for table in left_out))
    # The first seed of all tables comes before the second of any.
    for seed in arguments.seeds or range(max((table.seeds for table in tables), default=0)):
        for table in tables:
            for split in table.splits:
                if seed < table.seeds and split in (arguments.splits or table.splits):
                    run_block(table, split, seed, places, arguments.processes)


def run_block(table: Table, split: str, seed: int, places: Places, processes: int) -> None:
    """Runs and records the runs and comparisons of a table for one split and seed."""
    parts = {row: table.runs(row, split, seed) for row in table.rows}
    recorded = {line["key"] for line in read_lines(RUNS_FILE)}
    compared = {(line["first"], line["second"]) for line in read_lines(COMPARISONS_FILE)}
    pairs = [(first, second) for first, others in table.compare.items() for second in others]
    open_pairs = [pair for pair in pairs if tuple(key_of(parts[row]) for row in pair) not in compared]
    open_rows = [row for row, runs in parts.items() if key_of(runs) not in recorded]
    runs = {run.key: run for row in open_rows for run in parts[row] if run.key not in recorded}
    wanted = {stage.key: stage for run in runs.values() for stage in run.stages}

    def record_once(job: Job) -> None:
        key = job.result.parent.name
        if key not in recorded:
            run = wanted[key]
            # The line comes last: a run that has one is not recorded again.
            if run.script == "finetune":
                add_scores(SCORES / f"{table.name}.parquet", key, read_scores(run, places.runs)["logits"])
            add_line(RUNS_FILE, record(run, places))
            recorded.add(key)

    run_stages(runs.values(), places, processes, record_once)
    for row in open_rows:
        if len(parts[row]) > 1:
            shown = {"key": key_of(parts[row]), "model": table.models(row), "split": split, "seed": seed}
            add_line(RUNS_FILE, {**shown, "result": measure(kept_scores(parts[row], places), parts[row][0], places)})
    for first, second in open_pairs:
        one, other = (kept_scores(parts[row], places) for row in (first, second))
        labels, clicks, others = one["labels"], probabilities(one["logits"]), probabilities(other["logits"])
        add_line(
            COMPARISONS_FILE,
            {
                "first": key_of(parts[first]),
                "second": key_of(parts[second]),
                "split": split,
                "seed": seed,
                "auc": asdict(delong(labels, clicks, others)),
                "logloss": asdict(paired_bootstrap(labels, clicks, others, logloss)),
            },
        )


def run_stages(
    runs: Iterable[PlannedRun], places: Places, processes: int, when_done: Callable[[Job], object] = lambda job: None
) -> None:
    """Runs the stages that have not run yet, each after those that it needs."""
    wanted = list(runs)
    for depth in range(max((len(run.stages) for run in wanted), default=0)):
        stages = {run.stages[depth].key: run.stages[depth] for run in wanted if len(run.stages) > depth}
        run_jobs([stage.job(places.runs, places.files) for stage in stages.values()], processes, when_done)


def record(run: PlannedRun, places: Places) -> dict[str, Any]:
    """The line of `runs.jsonl` for a run that has ended: its own record, its learning curves, its test metrics."""
    found = public_record(load_record(run, places))
    result = found.pop("result")
    # The runs that it needs have lines of their own in results/, which another machine may have run.
    found.pop("pretraining", None)
    found.get("teacher", {}).pop("record", None)
    if run.script == "finetune":
        result |= measure(read_scores(run, places.runs), run, places)
    return {
        "key": run.key,
        "model": run.model,
        "split": run.split,
        "seed": run.seed,
        "revision": revision(),
        "stages": [stage.key for stage in run.stages],
        "run": found,
        "seconds": round(sum(load_record(stage, places)["wall_seconds"] for stage in run.stages), 1),
        "result": result,
        "curves": curves_of(run.folder(places.runs) / "log.jsonl"),
    }


def load_record(run: PlannedRun, places: Places) -> dict[str, Any]:
    """What a run that has ended wrote of itself."""
    return run.job(places.runs, places.files).load_result()


def curves_of(log: Path) -> dict[str, dict[str, Any]]:
    """The losses and metrics in a run's log: event -> name -> [steps, values]."""
    pattern = "|".join(PANELS[panel] for panel in ("loss", "accuracy", "AUC", "LogLoss"))
    return {
        event: {
            name: [steps, [round(value, 4) for value in values]]
            for name, (steps, values) in lines.items()
            if re.fullmatch(pattern, name)
        }
        for event, lines in read_curves(log).items()
    }


def read_scores(run: PlannedRun, folder: Path) -> dict[str, np.ndarray]:
    """Labels and logits of a finished run's test rows, also the logits of each tower, float32 (rows,) each."""
    table = pq.read_table(run.folder(folder) / "test_scores.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


def kept_scores(runs: Sequence[PlannedRun], places: Places) -> dict[str, np.ndarray]:
    """Labels and logits of a recorded run's test rows, float (rows,) each.

    The logits of several runs are those of their mean probability.
    """
    labels = rows_of(runs[0], places)["test"].with_format("numpy")[LABEL][:]
    logits = [load_scores(SCORES, run.key).astype(np.float32) for run in runs]
    if len(logits) == 1:
        return {"labels": labels, "logits": logits[0]}
    mean = np.mean([probabilities(values) for values in logits], axis=0)
    return {"labels": labels, "logits": np.log(mean) - np.log1p(-mean)}


def measure(scores: Mapping[str, np.ndarray], run: PlannedRun, places: Places) -> dict[str, Any]:
    """Metrics of the test rows with intervals, calibration, GAUC, UAUC and slices."""
    rows, user = rows_of(run, places), run.data.user
    labels, clicks = scores["labels"], probabilities(scores["logits"])
    users = rows["test"].with_format("arrow").select_columns([user])[:][user]
    groups = group_ids(users, user)
    found = evidence({**scores, "groups": groups})
    found["slices"] = {
        name: {
            "rows": int(mask.sum()),
            **(compute_metrics(labels[mask], clicks[mask], groups[mask]) if mask.any() else {}),
        }
        for name, mask in slices(rows, run.data, run.settings.get("data.max_train_rows")).items()
    }
    return found


def slices(rows: DatasetDict, data: ClickData, max_train_rows: int | None) -> dict[str, np.ndarray]:
    """Slices of the test rows by how many training rows have their user and item: name -> bool (rows,)."""
    masks: dict[str, np.ndarray] = {}
    for field, word in ((data.user, "user"), (data.item, "item")):
        known, counts = np.unique(rows["train"].with_format("numpy")[field][:max_train_rows], return_counts=True)
        values = rows["test"].with_format("numpy")[field][:]
        places = np.minimum(np.searchsorted(known, values), len(known) - 1)
        number = np.where(known[places] == values, counts[places], 0)
        masks |= {f"unseen {word}": number == 0, f"rare {word}": (number > 0) & (number <= RARE)}
    frequent = ~np.any(list(masks.values()), axis=0)
    seen = ~(masks["unseen user"] | masks["unseen item"])
    return {**masks, "frequent": frequent, "seen": seen}


def rows_of(run: PlannedRun, places: Places) -> DatasetDict:
    """The rows of a run."""
    return _rows(run.data.name, run.split, run.seed, places.files)


@cache
def _rows(data: str, split: str, seed: int, files: Path | None) -> DatasetDict:
    return data_of(data).rows(split, seed, files)


def repeat(number: int, places: Places, processes: int) -> None:
    """Runs recorded runs again, and records both AUCs. Chooses among the runs that were not repeated before."""
    repeated = {line["key"] for line in read_lines(AGAIN_FILE)}
    known = [line for line in read_lines(RUNS_FILE) if "test" in line["result"] and "stages" in line]
    current = [line for line in known if line["key"] not in repeated and is_current(line)]
    chosen = random.Random(len(current)).sample(current, min(number, len(current)))
    runs = [run_of(line) for line in chosen]
    run_stages(runs, places, processes)
    for line, run in zip(chosen, runs, strict=True):
        again = evidence(read_scores(run, places.runs))["test"]
        low, high = line["result"]["test_intervals"]["auc"]
        before = line["result"]["test"]["auc"]
        machine = machine_name(load_record(run, places))
        found = {"key": run.key, "auc": before, "again": again["auc"], "interval": [low, high], "machine": machine}
        add_line(AGAIN_FILE, found)
        print(f"{run.key}: AUC {before:.4f}, again {again['auc']:.4f}, interval {low:.4f} to {high:.4f}")


def is_current(line: Mapping[str, Any]) -> bool:
    """Whether models.yaml still has the model of a recorded run with the same settings."""
    try:
        return run_of(line).key == line["key"]
    except ValueError:
        return False


def run_of(line: Mapping[str, Any]) -> PlannedRun:
    """The run of a line of `runs.jsonl`, by what models.yaml says of its model now."""
    data = line["run"]["data"]
    return find_run(line["model"], data.get("source") or data["name"], line["split"], line["seed"])


def revision() -> str:
    """The revision of the code when a run is recorded, with a `+` if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        # Git, on this very repository.
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # nosec B603 B607

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "flip_hf", "examples") else "")


if __name__ == "__main__":
    run_script(main)
