"""A run: its folder, its record, its checkpoints and its model."""

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import DistributedType
from transformers.utils import logging as transformers_logging

from flip_hf.runs.device import join_process_group, make_accelerator
from flip_hf.runs.folder import RunFiles
from flip_hf.runs.locks import FolderLock, lock_in_main_process
from flip_hf.runs.publishing import Publisher
from flip_hf.runs.record import deciding, describe_model, new_record, refuse_differences, with_measures
from flip_hf.runs.settings import RunSettings, as_plain
from flip_hf.runs.tracking import PROJECT, make_trackers, trackable
from flip_hf.standard_json import measures_json
from flip_hf.training.checkpoints import Checkpoints, read_metadata, recover_folder, replace_file, replace_folder
from flip_hf.training.protocols import PreparedModel, SavedProcessor
from flip_hf.training.state import TrainingState, seed_everything

MEASURED = frozenset({"seconds", "rows_per_second", "test_rows_per_second", "memory_gib", "device_peak_memory_gib"})
"""What a line of the log says of the machine: it differs between runs that are the same to the bit."""

logger = logging.getLogger(__name__)


class Run:
    """Where a run writes: `log.jsonl` as it goes, and the same to trackers; `model/` the best model so far;
    `checkpoints/` where to go on after an interruption; at its end `test_scores.parquet`, the test rows' labels and
    logits, `run.json`, the record, `curves.png`, the log as a picture, and `calibration.png`; with a teacher
    `teacher_logits.parquet`, its logits of the training rows; and with `push_to_hub`
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
        self._started, self._step = time.monotonic(), 0
        self._settings_kind = type(settings)
        self._files = RunFiles(self.folder)
        self._checkpoints = Checkpoints(self._files.checkpoints, training.save_total_limit)
        last = self._checkpoints.last()
        self._checkpoint = last if settings.resume else None
        first_step = None if self._checkpoint is None else read_metadata(self._checkpoint)["step"] + 1
        trackers = make_trackers(training.report_to, self.folder, as_plain(settings), first_step)
        self.accelerator = make_accelerator(training.precision, trackers)
        self.is_main = self.accelerator.is_main_process
        _say_what_matters(self.is_main)
        self.record = new_record(settings, self.accelerator)
        self._identity: dict[str, Any] = {}
        self.has_ended = settings.resume and self._files.record.exists()
        """Whether there is nothing left to do: the run to resume has written its record."""
        self._check_resume(settings, last)
        self._publisher = Publisher(settings, self._files) if self.is_main else None
        # Every process must have looked before one changes anything.
        self.accelerator.wait_for_everyone()
        self._replaced: list[Path] = []
        if self.is_main:
            self._prepare_folder()
        if not self.has_ended:
            self.accelerator.init_trackers(PROJECT)
        # Last: a tracker may have drawn random numbers.
        seed_everything(training.seed, self.accelerator.device)

    def _check_resume(self, settings: RunSettings, last: Path | None) -> None:
        is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        if settings.resume and (settings.training.shard_features or is_fsdp):
            raise ValueError(
                f"{self.folder}: a run whose parameters are sharded over processes saves no checkpoints and can't be "
                "resumed; leave out --resume, or train without training.shard_features and FSDP"
            )
        if self.has_ended:
            ended = json.loads(self._files.record.read_text(encoding="utf-8"))["settings"]
            before, now = (deciding(values, self._settings_kind) for values in (ended, self.record["settings"]))
            refuse_differences(self._files.record, before, now)
            logger.info("%s: this run has ended; there is nothing to resume", self.folder)
        elif last is not None and not settings.resume and not self._files.record.exists():
            raise FileExistsError(
                f"{self.folder} holds a run that has not ended; its last checkpoint is {last.name}. Go on with "
                f"--resume true, choose another output_dir, or delete {self._files.checkpoints} to start afresh"
            )

    def _prepare_folder(self) -> None:
        recover_folder(self._files.model)
        if self.has_ended:
            self._checkpoints.clear()
        elif self._checkpoint is None:
            # Now, as trackers are about to write there, too.
            self._replaced = self._files.of_one_run

    def _replace_earlier_run(self) -> None:
        """Removes the files of an earlier run, as this one is about to write its own."""
        if self._replaced:
            for path in self._replaced:
                path.unlink(missing_ok=True)
            self._replaced = []
            self._checkpoints.clear()
            self._files.log.touch()

    @property
    def model_folder(self) -> Path:
        """The best model so far, with its processor: what `from_pretrained` loads."""
        return self._files.model

    def describe(self, data: Mapping[str, Any], processor: Any, model: Any) -> None:
        """Records what the run works on, and makes sure that a checkpoint to resume from worked on the same.

        Args:
            data: `ClickLog.description`.
            processor: the fitted processor.
            model: what is trained.

        Raises:
            ValueError: the data, the vocabulary, a setting that changes a weight, or the number of processes is not
                what the checkpoint had; says which.
        """
        self.record["data"] = data
        self.record["model"] = describe_model(model, processor)
        device = self.record["device"]
        values = {
            **self.record["settings"],
            "device": {name: device[name] for name in ("kind", "processes", "precision")},
            "fingerprints": data["fingerprints"],
            "processor": processor.content_hash(),
            "model config": model.config.to_dict(),
        }
        self._identity = deciding(values, self._settings_kind)
        if self._checkpoint is not None:
            saved = read_metadata(self._checkpoint)
            refuse_differences(self._checkpoint, saved["identity"], self._identity)
            self._warn_of_changes(saved)
        self._replace_earlier_run()

    def _warn_of_changes(self, saved: Mapping[str, Any]) -> None:
        for kind in ("versions", "device"):
            for name, before in saved[kind].items():
                # How much memory there is changes no figure.
                if name != "memory_gib" and (now := self.record[kind].get(name)) != before:
                    logger.warning(
                        "%s was %s when the checkpoint was saved and is %s now: results may differ in their last "
                        "digits from those of a run that was never stopped",
                        name,
                        before,
                        now,
                    )

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log: the event, seconds since the start, and the values. Trackers get the numbers."""
        self._replace_earlier_run()
        if self.is_main:
            seconds = round(time.monotonic() - self._started, 2)
            self._files.add_to_log({"event": event, "seconds": seconds, **values})
        self._step = values.get("step", self._step)
        self.accelerator.log(trackable(event, values), step=self._step)

    def save_model(self, model: PreparedModel, processor: SavedProcessor, result: Mapping[str, Any]) -> None:
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
                self._files.model,
                lambda folder: (
                    unwrapped.save_pretrained(folder, state_dict=weights),
                    processor.save_pretrained(folder),
                ),
            )
        elif unwrapped.sharded_parameters:
            unwrapped.save_pretrained(self._files.model)
        self.accelerator.wait_for_everyone()
        if self._publisher is not None:
            record = with_measures({**self.record, "result": result}, self._started)
            self._publisher.push_best(result["best_step"], record)

    def save_checkpoint(
        self, step: int, state: TrainingState, progress: Mapping[str, Any], processor: SavedProcessor
    ) -> None:
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
            metadata = {
                "step": step,
                "progress": progress,
                "identity": self._identity,
                "seconds": time.monotonic() - self._started,
                "log_bytes": self._files.log.stat().st_size,
                **{name: self.record[name] for name in ("started", "resumed_at", "versions", "device")},
            }
            self._checkpoints.save(step, lambda folder: state.save(folder, random_states), metadata)

        def save(folder: Path) -> None:
            self.accelerator.unwrap_model(state.model).save_pretrained(folder)
            processor.save_pretrained(folder)

        if self._publisher is not None:
            self._publisher.push_checkpoint(step, save)
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
        saved = read_metadata(self._checkpoint)
        log, log_bytes = self._files.log, saved["log_bytes"]
        if not log.exists() or log.stat().st_size < log_bytes:
            raise FileNotFoundError(f"{log} has lost lines that {self._checkpoint} had written; restore it")
        if saved["progress"]["best"] and not self._files.model.exists():
            raise FileNotFoundError(f"{self._files.model}, the best model so far, is gone; restore it")
        state.load(self._checkpoint)
        self._started = time.monotonic() - saved["seconds"]
        self.record["started"] = saved["started"]
        self.record["resumed_at"] = [*saved["resumed_at"], saved["step"]]
        # Every process has looked at the log by now.
        self.accelerator.wait_for_everyone()
        if self.is_main:
            # What was logged after the checkpoint will be logged again.
            os.truncate(log, log_bytes)
        logger.info("resumed from %s", self._checkpoint)
        progress: dict[str, Any] = saved["progress"]
        return progress

    def teacher_logits(self, score: Callable[[], np.ndarray]) -> np.ndarray:
        """The teacher's click logits of the rows that the run learns from; every process must call this.

        A run that resumes from a checkpoint has the logits that it began with, to the bit. Call this after `describe`.

        Args:
            score: computes them, float32 (rows,).

        Raises:
            FileNotFoundError: those of the run to resume are gone.
        """
        if self._checkpoint is not None:
            return self._files.read_teacher_logits()
        logits = score()
        if self.is_main:
            self._files.save_teacher_logits(logits)
        self.accelerator.wait_for_everyone()
        return logits

    def save_scores(self, scores: Mapping[str, np.ndarray]) -> None:
        """Writes `test_scores.parquet`, for what compares models row by row.

        Args:
            scores: what `click_logits` returned for the test rows; one row each, in their order.
        """
        if self.is_main:
            self._files.save_scores(scores)

    def finish(self, **results: Any) -> None:
        """Writes the record, with results, wall time and peak memory, and removes the checkpoints; then pushes.

        Raises:
            OSError: the model could not be pushed; it is whole in the run's folder.
        """
        if self.is_main:
            self.record = with_measures({**self.record, **results}, self._started)
            text = measures_json(self.record, indent=2, ensure_ascii=False, default=str)
            replace_file(self._files.record, text + "\n")
            self._checkpoints.clear()
            if not self._files.draw(results.get("result", {})):
                logger.info("no pictures: matplotlib is not installed (pip install 'flip_hf[train]')")
        self.accelerator.wait_for_everyone()
        self.close_trackers()
        self.publish()

    def publish(self) -> None:
        """Pushes the model of a run that has ended, where its settings ask for that.

        Raises:
            OSError: it could not be pushed; it is whole in the run's folder.
        """
        if self._publisher is not None:
            self._publisher.push_at_end()
        self._unlock()

    def close_trackers(self) -> None:
        """Ends what the trackers have begun; what they were told is with them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _say_what_matters(is_main: bool) -> None:
    """Shows the package's log, and not transformers' report of each load, which would bury it."""
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
