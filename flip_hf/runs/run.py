"""A run's folder: its log, its record, its model and its checkpoints."""

import json
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import DistributedType
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from flip_hf import __version__
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import without_credentials
from flip_hf.hub.card import flat
from flip_hf.hub.push import HubRepo, stage
from flip_hf.runs.curves import draw_calibration, draw_curves, read_curves
from flip_hf.runs.device import describe_hardware, join_process_group, make_accelerator
from flip_hf.runs.locks import FolderLock, lock_in_main_process
from flip_hf.runs.settings import LABEL, MODEL_FOLDER, FinetuneSettings, PretrainSettings, RunSettings, as_plain
from flip_hf.runs.tracking import PROJECT, TENSORBOARD_FOLDER, make_trackers, trackable
from flip_hf.standard_json import measures_json
from flip_hf.training.checkpoints import Checkpoints, read_facts, recover_folder, replace_file, replace_folder
from flip_hf.training.state import TrainingState, seed_everything

MEASURED = frozenset({"seconds", "rows_per_second", "memory_gib", "device_peak_memory_gib"})
"""What a line of the log says of the machine: it differs between runs that are the same to the bit."""
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# What a resumed run may set otherwise: none of it changes a weight. Files are compared by what they hold, and the
# precision by what it came to.
_FREE_SETTINGS = {
    "output_dir",
    "resume",
    "push_to_hub",
    "private",
    "revision",
    "push_when",
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    *(f"data.csv.{setting.name}" for setting in fields(CSVFormat)),
    "training.precision",
    "training.logging_steps",
    "training.report_to",
    "training.dataloader_num_workers",
    "training.save_steps",
    "training.save_total_limit",
}

_RECORD = "run.json"
_SCORES = "test_scores.parquet"
_CURVES, _CALIBRATION = "curves.png", "calibration.png"
_STAGE = ".push-"

logger = logging.getLogger(__name__)


class Run:
    """Where a run writes: `log.jsonl` as it goes, and the same to trackers; `model/` the best model so far;
    `checkpoints/` where to go on after an interruption; at its end `test_scores.parquet`, the test rows' labels and
    logits, `run.json`, the record, `curves.png`, the log as a picture, and `calibration.png`; and with `push_to_hub`
    the repository on the Hub.

    Until it ends the run locks its folder. A run that is no longer used unlocks it, and so does the end of the process.

    Args:
        settings: of the run. Without `resume` it replaces the log, the record and TensorBoard's files of an earlier run
            in its folder, once it has read its data.

    Raises:
        FolderInUseError: another process runs in the folder.
        FileExistsError: the folder holds checkpoints of a run that did not end, and `resume` is not set.
        ValueError: `resume` is set, and the run that ended there had other settings, or parameters are spread over
            processes; or a tracker can't be had; or the repository is not as private as asked for.
        OSError: the repository can't be written to.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.folder = settings.output_dir
        # Before anything is read that another run may be about to change.
        lock = FolderLock(self.folder)
        lock_in_main_process(lock, join_process_group())
        self._unlock = weakref.finalize(self, lock.release)
        try:
            self._open(settings)
        except BaseException:
            self._unlock()
            raise

    def _open(self, settings: RunSettings) -> None:
        training = settings.training
        self._checkpoints = Checkpoints(self.folder / "checkpoints", training.save_total_limit)
        last = self._checkpoints.last()
        self._checkpoint = last if settings.resume else None
        first_step = None if self._checkpoint is None else read_facts(self._checkpoint)["step"] + 1
        trackers = make_trackers(training.report_to, self.folder, as_plain(settings), first_step)
        self.accelerator = make_accelerator(training.precision, trackers)
        self.is_main = self.accelerator.is_main_process
        logging.basicConfig(level=logging.INFO if self.is_main else logging.ERROR, format="%(message)s")
        # The scripts say what matters; transformers' report of each load would bury it.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._push_when = settings.push_when
        self._repo = None
        if settings.push_to_hub is not None:
            self._repo = HubRepo(settings.push_to_hub, settings.private, settings.revision or "main")
        self._started = time.monotonic()
        self.record: dict[str, Any] = {
            "task": "pretraining" if isinstance(settings, PretrainSettings) else "finetuning",
            "settings": as_plain(settings),
            "command": [Path(sys.argv[0]).name, *map(without_credentials, sys.argv[1:])],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_at": [],
            "versions": {
                "python": platform.python_version(),
                "flip_hf": __version__,
                **{name: version(name) for name in _PACKAGES},
            },
            "device": {
                "kind": self.accelerator.device.type,
                "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "precision": self.accelerator.mixed_precision,
                **describe_hardware(),
            },
        }
        pretrained = settings.pretrained if isinstance(settings, FinetuneSettings) else None
        if pretrained is not None and (found := _record_of(pretrained)) is not None:
            self.record["pretraining"] = json.loads(found.read_text(encoding="utf-8"))
        self._identity: dict[str, Any] = {}
        if settings.resume and (training.shard_features or self.accelerator.distributed_type == DistributedType.FSDP):
            raise ValueError(
                f"{self.folder}: a run whose parameters are spread over processes saves no checkpoints and can't be "
                "resumed; leave out --resume, or train without training.shard_features and FSDP"
            )
        self.has_ended = settings.resume and self._record_file.exists()
        """Whether there is nothing left to do: the run to resume has written its record."""
        if self.has_ended:
            ended = json.loads(self._record_file.read_text(encoding="utf-8"))["settings"]
            self._refuse_differences(self._record_file, _compared(ended), _compared(self.record["settings"]))
            logger.info("%s: this run has ended; there is nothing to resume", self.folder)
        elif last is not None and not settings.resume and not self._record_file.exists():
            raise FileExistsError(
                f"{self.folder} holds a run that has not ended; its last checkpoint is {last.name}. Go on with "
                f"--resume true, choose another output_dir, or delete {self._checkpoints.folder} to start afresh"
            )
        self._replaced: list[Path] = []
        if self._repo is not None and self.is_main:
            # Before anything is trained: a token that may not write is known now.
            self._repo.prepare()
        # Every process must have looked before one changes anything.
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self._prepare_folder()
        self._step = 0
        if not self.has_ended:
            self.accelerator.init_trackers(PROJECT)
        # Last: a tracker may have drawn random numbers.
        seed_everything(training.seed, self.accelerator.device)

    def _prepare_folder(self) -> None:
        recover_folder(self.model_folder)
        if self.has_ended:
            self._checkpoints.clear()
        elif self._checkpoint is None:
            # Trackers are about to write there, too.
            left = [path for path in (self.folder / TENSORBOARD_FOLDER).rglob("*") if path.is_file()]
            self._replaced = [*left, self._record_file, self.folder / _SCORES, self._log_file]

    def _replace_earlier_run(self) -> None:
        """Removes the files of an earlier run, as this one is about to write its own."""
        if self._replaced:
            for path in self._replaced:
                path.unlink(missing_ok=True)
            self._replaced = []
            self._checkpoints.clear()
            self._log_file.touch()

    @property
    def model_folder(self) -> Path:
        """The best model so far, with its processor: what `from_pretrained` loads."""
        return self.folder / MODEL_FOLDER

    @property
    def _log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def _record_file(self) -> Path:
        return self.folder / _RECORD

    def describe(self, data: Mapping[str, Any], processor: Any, model: Any) -> None:
        """Records what the run works on, and makes sure that a checkpoint to resume from worked on the same.

        Args:
            data: `ClickLog.facts`.
            processor: the fitted processor.
            model: what is trained.

        Raises:
            ValueError: the data, the vocabulary, a setting that changes a weight, or the number of processes is not
                what the checkpoint had; says which.
        """
        self.record["data"] = data
        self.record["model"] = _model_facts(model)
        device = self.record["device"]
        self._identity = _compared(
            {
                **self.record["settings"],
                "device": {name: device[name] for name in ("kind", "processes", "precision")},
                "fingerprints": data["fingerprints"],
                "processor": processor.content_hash(),
                "model config": model.config.to_dict(),
            }
        )
        if self._checkpoint is not None:
            facts = read_facts(self._checkpoint)
            self._refuse_differences(self._checkpoint, facts["identity"], self._identity)
            for kind in ("versions", "device"):
                for name, before in facts[kind].items():
                    # How much memory there is changes no figure.
                    if name != "memory_gib" and (now := self.record[kind].get(name)) != before:
                        logger.warning(
                            "%s was %s when the checkpoint was saved and is %s now: results may differ in their last "
                            "digits from those of a run that was never stopped",
                            name,
                            before,
                            now,
                        )
        self._replace_earlier_run()

    def _refuse_differences(self, source: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        names = [*now, *(name for name in before if name not in now)]
        differing = [name for name in names if before.get(name) != now.get(name)]
        if differing:
            shown = [f"{name} was {before.get(name)!r:.80} and is {now.get(name)!r:.80}" for name in differing[:3]]
            more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
            raise ValueError(
                f"{source} can't be resumed, as not all is as it was: {'; '.join(shown)}{more}. Resume with what it "
                "had, or start another run in another output_dir"
            )

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log: the event, seconds since the start, and the values. Trackers get the numbers."""
        self._replace_earlier_run()
        if self.is_main:
            line = {"event": event, "seconds": round(time.monotonic() - self._started, 2), **values}
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(measures_json(line) + "\n")
        self._step = values.get("step", self._step)
        self.accelerator.log(trackable(event, values), step=self._step)

    def save_model(self, model: Any, processor: Any, result: Mapping[str, Any]) -> None:
        """Replaces the best model so far by this one.

        Args:
            model: prepared or not.
            processor: the model's.
            result: what the training loop would return if it ended now.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        # Of a model that is spread over processes, each of them holds a part.
        weights = self.accelerator.get_state_dict(model)
        if self.is_main:
            replace_folder(
                self.model_folder,
                lambda folder: (
                    unwrapped.save_pretrained(folder, state_dict=weights),
                    processor.save_pretrained(folder),
                ),
            )
        elif unwrapped.sharded_parameters:
            unwrapped.save_pretrained(self.model_folder)
        self.accelerator.wait_for_everyone()
        if self._push_when != "end":
            record = self._with_measures({**self.record, "result": result})
            self._push_in_passing(f"Best model so far, after step {result['best_step']}", self._copy_model, record)

    def save_checkpoint(self, step: int, state: TrainingState, progress: Mapping[str, Any], processor: Any) -> None:
        """Saves all that a run needs to go on from here; every process must call this.

        Args:
            step: the optimiser steps taken.
            state: the model and what trains it.
            progress: what `resume` shall return, in JSON's types.
            processor: the model's.

        Raises:
            OSError: it could not be written; earlier ones are whole.
        """
        random_states = state.gather_random_states()
        if self.is_main:
            facts = {
                "step": step,
                "progress": progress,
                "identity": self._identity,
                "seconds": time.monotonic() - self._started,
                "log_bytes": self._log_file.stat().st_size,
                **{name: self.record[name] for name in ("started", "resumed_at", "versions", "device")},
            }
            self._checkpoints.save(step, lambda folder: state.write(folder, random_states), facts)
        if self._push_when == "checkpoint":

            def save(folder: Path) -> None:
                self.accelerator.unwrap_model(state.model).save_pretrained(folder)
                processor.save_pretrained(folder)

            self._push_in_passing(f"Checkpoint after step {step}", save, None)
        self.accelerator.wait_for_everyone()

    def resume(self, state: TrainingState) -> dict[str, Any] | None:
        """Puts the state and the log back to where the last checkpoint was saved; every process must call this.

        Returns:
            The progress that it was saved with, or None where there is nothing to resume.

        Raises:
            FileNotFoundError: the log or the best model that belongs to the checkpoint is not there.
        """
        if self._checkpoint is None:
            return None
        facts = read_facts(self._checkpoint)
        log_bytes: int = facts["log_bytes"]
        if not self._log_file.exists() or self._log_file.stat().st_size < log_bytes:
            raise FileNotFoundError(f"{self._log_file} has lost lines that {self._checkpoint} had written; restore it")
        if facts["progress"]["best"] and not self.model_folder.exists():
            raise FileNotFoundError(f"{self.model_folder}, the best model so far, is gone; restore it")
        state.read(self._checkpoint)
        self._started = time.monotonic() - facts["seconds"]
        self.record["started"] = facts["started"]
        self.record["resumed_at"] = [*facts["resumed_at"], facts["step"]]
        # Every process has looked at the log by now.
        self.accelerator.wait_for_everyone()
        if self.is_main:
            # What was logged after the checkpoint will be logged again.
            os.truncate(self._log_file, log_bytes)
        logger.info("resumed from %s", self._checkpoint)
        progress: dict[str, Any] = facts["progress"]
        return progress

    def save_scores(self, scores: Mapping[str, np.ndarray]) -> None:
        """Writes `test_scores.parquet`, for what compares models row by row.

        Args:
            scores: what `click_logits` returned for the test rows; one row each, in their order.
        """
        if self.is_main:
            pq.write_table(pa.table(dict(scores)), self.folder / _SCORES)

    def finish(self, **results: Any) -> None:
        """Writes the record, with results, wall time and peak memory, and removes the checkpoints; then pushes.

        Raises:
            OSError: the model could not be pushed; it is whole in the run's folder.
        """
        if self.is_main:
            self.record = self._with_measures({**self.record, **results})
            text = measures_json(self.record, indent=2, ensure_ascii=False, default=str)
            replace_file(self._record_file, text + "\n")
            self._checkpoints.clear()
            drawn = draw_curves(read_curves(self._log_file), self.folder.name, self.folder / _CURVES)
            if bins := results.get("result", {}).get("test_calibration"):
                draw_calibration({"model": bins}, self.folder / _CALIBRATION)
            if not drawn:
                logger.info("no pictures: matplotlib is not installed (pip install 'flip_hf[train]')")
        self.accelerator.wait_for_everyone()
        self.close_trackers()
        self.publish()

    def publish(self) -> None:
        """Pushes the model of a run that has ended, where its settings ask for that.

        Raises:
            OSError: it could not be pushed; it is whole in the run's folder.
        """
        if self._repo is not None and self.is_main:
            self._push_at_end(self._repo)
        self._unlock()

    def _push_at_end(self, repo: HubRepo) -> None:
        record = json.loads(self._record_file.read_text(encoding="utf-8"))
        try:
            commit = self._push(f"Model of the run begun {record['started']}", self._copy_model, record)
        except OSError as error:
            raise OSError(
                f"{repo.repo_id} was not pushed ({error}). Nothing is lost: the model lies in "
                f"{self.model_folder}. Run the same command with --resume true to push it again"
            ) from error
        logger.info("%s is at %s, commit %s", repo.repo_id, repo.revision, commit)

    def _push_in_passing(self, message: str, save: Callable[[Path], object], record: Mapping[str, Any] | None) -> None:
        if self._repo is None or not self.is_main:
            return
        try:
            self._push(message, save, record)
        except OSError as error:
            logger.warning("%s was not pushed, and training goes on: %s", self._repo.repo_id, error)

    def _push(self, message: str, save: Callable[[Path], object], record: Mapping[str, Any] | None) -> str:
        assert self._repo is not None
        for left in self.folder.glob(f"{_STAGE}*"):
            # By a push that was killed.
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=_STAGE) as name:
            stage(Path(name), save, self._repo.repo_id, record, pictures(self.folder))
            return self._repo.push(Path(name), message)

    def _copy_model(self, folder: Path) -> None:
        shutil.copytree(self.model_folder, folder, dirs_exist_ok=True)

    def _with_measures(self, record: dict[str, Any]) -> dict[str, Any]:
        record["wall_seconds"] = round(time.monotonic() - self._started, 1)
        # Linux counts in KiB.
        record["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        return record

    def close_trackers(self) -> None:
        """Ends what the trackers have begun; what they were told is with them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def pictures(folder: Path) -> dict[Path, str]:
    """The pictures that a run draws in its folder when it ends, with their captions; not all runs have all of them."""
    return {
        folder / _CURVES: "Losses and metrics over the run",
        folder / _CALIBRATION: "Click rates on the test rows against the probabilities predicted for them",
    }


def _record_of(pretrained: str) -> Path | None:
    """The record of the run that pretrained a model: in its run's folder, or beside it on the Hub; None without one."""
    if Path(pretrained).exists():
        record = Path(pretrained).parent / _RECORD
        return record if record.is_file() else None
    found = cached_file(pretrained, _RECORD, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _model_facts(model: Any) -> dict[str, Any]:
    """What a model card says of a model."""
    config = model.config
    text: Any = config.text_config
    towers = {name: part for name, part in model.base_model.named_children() if any(True for _ in part.parameters())}
    return {
        "class": type(model).__name__,
        **{name: getattr(config, name) for name in ("mode", "backbone", "backbone_options", "embedding_dim", "fusion")},
        **{name: getattr(config, name) for name in ("objectives", "text_base_model", "text_pooling", "text_towers")},
        "text_layers": text.num_hidden_layers,
        "text_size": text.hidden_size,
        "features": config.num_features,
        "parameters": {
            "all": model.num_parameters(),
            **{name.replace("_", " "): sum(p.numel() for p in part.parameters()) for name, part in towers.items()},
        },
        "fields": [
            {"name": f.name, "kind": f.kind, "features": (f.num_features or 0) + sum(f.added_features)}
            for f in config.fields
        ],
    }


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's weights, as JSON has it, by dotted names."""
    found = flat(json.loads(measures_json(values, default=str)))
    if "data.label" in found:
        # The default was once spelt out.
        found["data.label"] = found["data.label"] or LABEL
    # Where a model's configuration comes from and which library wrote it.
    origins = ("_name_or_path", "transformers_version")
    return {name: value for name, value in found.items() if name not in _FREE_SETTINGS and not name.endswith(origins)}
