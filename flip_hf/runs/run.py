"""A run of pretraining or finetuning: its folder, record, checkpoints and model."""

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
"""Measurements in the log that differ even between runs with bit-identical results."""

logger = logging.getLogger(__name__)


class Run:
    """Writes everything that a run produces to its folder, to trackers and to the Hub.

    During the run, it writes `log.jsonl`, `model/` (the best model so far) and `checkpoints/`; with a teacher also
    `teacher_logits.parquet`. At the end, it writes `run.json` (the record), `curves.png`, and with test rows
    `test_scores.parquet` and `calibration.png`. Trackers receive the values of the log. With `push_to_hub`, the run
    also pushes the model.

    The run locks its folder until it ends, until the `Run` is garbage-collected, or until the process ends.

    Args:
        settings: settings of the run. Without `resume`, the run replaces the log, the record and TensorBoard's files of
            an earlier run in the folder, once it has read its data.

    Raises:
        FolderInUseError: another process is running in the folder.
        FileExistsError: the folder holds checkpoints of an unfinished run, and `resume` is not set.
        ValueError: `resume` is set, but the finished run in the folder had other settings, or parameters are sharded;
            or a tracker is unknown or not installed; or `private` is set, but the repository is public.
        OSError: the repository is not writable.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.folder = settings.output_dir
        # Lock before reading files that another run may be changing.
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
        """Whether the run to resume has already written its record, so that nothing is left to train."""
        self._check_resume(settings, last)
        self._publisher = Publisher(settings, self._files) if self.is_main else None
        # Wait until every process has read the folder, before the main process changes it.
        self.accelerator.wait_for_everyone()
        self._replaced: list[Path] = []
        if self.is_main:
            self._prepare_folder()
        if not self.has_ended:
            self.accelerator.init_trackers(PROJECT)
        # Seed last, because a tracker may have drawn random numbers.
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
            logger.info("%s: this run has finished already, so there is nothing to resume", self.folder)
        elif last is not None and not settings.resume and not self._files.record.exists():
            raise FileExistsError(
                f"{self.folder} holds an unfinished run with the last checkpoint {last.name}. Continue it with "
                f"--resume true, choose another output_dir, or delete {self._files.checkpoints} to start again"
            )

    def _prepare_folder(self) -> None:
        recover_folder(self._files.model)
        if self.has_ended:
            self._checkpoints.clear()
        elif self._checkpoint is None:
            # List the files now, before trackers add new ones to the folder.
            self._replaced = self._files.of_one_run

    def _replace_earlier_run(self) -> None:
        """Removes the files of an earlier run, just before this run writes its own."""
        if self._replaced:
            for path in self._replaced:
                path.unlink(missing_ok=True)
            self._replaced = []
            self._checkpoints.clear()
            self._files.log.touch()

    @property
    def model_folder(self) -> Path:
        """The folder of the best model so far, with its processor; `from_pretrained` loads it."""
        return self._files.model

    def describe(self, data: Mapping[str, Any], processor: Any, model: Any) -> None:
        """Records the data and the model, and checks that they match the checkpoint to resume from.

        Args:
            data: `ClickLog.description`.
            processor: the fitted processor.
            model: the model to train.

        Raises:
            ValueError: the data, the vocabulary, a setting that affects the weights, or the number of processes differs
                from that of the checkpoint; names the difference.
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
                # The size of the memory does not affect results.
                if name != "memory_gib" and (now := self.record[kind].get(name)) != before:
                    logger.warning(
                        "%s was %s when the checkpoint was saved and is %s now: results may differ in the last digits "
                        "from those of an uninterrupted run",
                        name,
                        before,
                        now,
                    )

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log with the event, the seconds since the start, and the values; trackers get the numbers.

        Args:
            event: kind of the line, such as "train".
            values: values of the line, by name; `step` is the number of optimiser steps taken.
        """
        self._replace_earlier_run()
        if self.is_main:
            seconds = round(time.monotonic() - self._started, 2)
            self._files.add_to_log({"event": event, "seconds": seconds, **values})
        self._step = values.get("step", self._step)
        self.accelerator.log(trackable(event, values), step=self._step)

    def save_model(self, model: PreparedModel, processor: SavedProcessor, result: Mapping[str, Any]) -> None:
        """Replaces the saved best model with this one; every process must call this.

        Args:
            model: the model, prepared by accelerate or not.
            processor: the model's processor.
            result: the results that the training loop would return if it ended now.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        # Under FSDP, each process holds only a part of the model.
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
        """Saves a checkpoint with everything that resuming needs; every process must call this.

        Args:
            step: number of optimiser steps taken so far.
            state: the state of the training.
            progress: the progress for `resume` to return, of JSON types.
            processor: the model's processor.

        Raises:
            OSError: the checkpoint could not be written. Earlier checkpoints are intact.
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
        """Restores the state and the log from the last checkpoint; every process must call this.

        Args:
            state: the state of the training, restored in place.

        Returns:
            The progress that was saved with the checkpoint, or None without a checkpoint.

        Raises:
            FileNotFoundError: the log or the best model of the checkpoint is missing.
        """
        if self._checkpoint is None:
            return None
        saved = read_metadata(self._checkpoint)
        log, log_bytes = self._files.log, saved["log_bytes"]
        if not log.exists() or log.stat().st_size < log_bytes:
            raise FileNotFoundError(
                f"{log} is shorter than when {self._checkpoint} was saved; restore the file, or start a new run in "
                "another output_dir"
            )
        if saved["progress"]["best"] and not self._files.model.exists():
            raise FileNotFoundError(
                f"{self._files.model}, the best model so far, is missing; restore the folder, or start a new run in "
                "another output_dir"
            )
        state.load(self._checkpoint)
        self._started = time.monotonic() - saved["seconds"]
        self.record["started"] = saved["started"]
        self.record["resumed_at"] = [*saved["resumed_at"], saved["step"]]
        # Wait until every process has checked the log.
        self.accelerator.wait_for_everyone()
        if self.is_main:
            # The resumed run repeats the steps after the checkpoint and logs them again.
            os.truncate(log, log_bytes)
        logger.info("resumed from %s", self._checkpoint)
        progress: dict[str, Any] = saved["progress"]
        return progress

    def teacher_logits(self, score: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the teacher's click logits of the rows that the run learns from; every process must call this.

        A run that resumes from a checkpoint reads the saved logits, which are bit-identical. Call this after
        `describe`.

        Args:
            score: computes the logits, float32 (rows,).

        Raises:
            FileNotFoundError: the saved logits of the run to resume are missing.
        """
        if self._checkpoint is not None:
            return self._files.read_teacher_logits()
        logits = score()
        if self.is_main:
            self._files.save_teacher_logits(logits)
        self.accelerator.wait_for_everyone()
        return logits

    def save_scores(self, scores: Mapping[str, np.ndarray]) -> None:
        """Writes `test_scores.parquet`, so that models can be compared row by row.

        Args:
            scores: the arrays from `click_logits` for the test rows, in the order of the rows.
        """
        if self.is_main:
            self._files.save_scores(scores)

    def finish(self, **results: Any) -> None:
        """Writes the record with results, wall time and peak memory, removes the checkpoints, and pushes the model.

        Args:
            results: sections to add to the record, such as `result`.

        Raises:
            OSError: the push failed. The model is still in the run's folder.
        """
        if self.is_main:
            self.record = with_measures({**self.record, **results}, self._started)
            text = measures_json(self.record, indent=2, ensure_ascii=False, default=str)
            replace_file(self._files.record, text + "\n")
            self._checkpoints.clear()
            if not self._files.draw(results.get("result", {})):
                logger.info("drew no pictures, because matplotlib is not installed: pip install 'flip_hf[train]'")
        self.accelerator.wait_for_everyone()
        self.close_trackers()
        self.publish()

    def publish(self) -> None:
        """Pushes the model of a finished run if `push_to_hub` is set, and unlocks the folder.

        Raises:
            OSError: the push failed. The model is still in the run's folder.
        """
        if self._publisher is not None:
            self._publisher.push_at_end()
        self._unlock()

    def close_trackers(self) -> None:
        """Finishes all trackers, so that they store the values they received."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _say_what_matters(is_main: bool) -> None:
    """Shows the package's log and hides transformers' reports of loading, among which it would get lost."""
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
