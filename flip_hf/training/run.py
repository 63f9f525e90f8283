"""A run's folder: its log, its record, its model and its checkpoints."""

import atexit
import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType
from transformers.utils import logging as transformers_logging

from flip_hf import __version__
from flip_hf.training.checkpoints import Checkpoints, read_facts, recover_folder, replace_file, replace_folder
from flip_hf.training.curves import draw_curves
from flip_hf.training.run_config import FinetuneRun, PretrainRun, as_plain
from flip_hf.training.state import TrainingState, seed_everything
from flip_hf.training.tracking import PROJECT, TENSORBOARD_FOLDER, make_trackers, trackable

MEASURED = frozenset({"seconds", "rows_per_second", "memory_gib", "device_peak_memory_gib"})
"""What a line of the log says of the machine: it differs between runs that are the same to the bit."""
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# What a resumed run may set otherwise: none of it changes a weight. Files are compared by what they hold, and the
# precision by what it came to.
_FREE_SETTINGS = {
    "output_dir",
    "resume",
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "training.precision",
    "training.log_steps",
    "training.trackers",
    "training.workers",
    "training.checkpoint_steps",
    "training.checkpoints_kept",
}

logger = logging.getLogger(__name__)


def make_accelerator(precision: str, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """An Accelerator for the devices there are.

    Args:
        precision: "bf16", "fp32", or "auto": bf16 where the device computes in it.
        trackers: what `init_trackers` starts.
    """
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=on_cpu, log_with=trackers or None
    )
    atexit.register(leave_process_group)
    return accelerator


def leave_process_group() -> None:
    """Ends what `torch.distributed` began, when the program ends."""
    # Only when the program ends, not by `end_training`: where a distributed model is the last to let go of the group,
    # torch can wait for a thread that waits for the interpreter.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def computes_bf16() -> bool:
    """Whether the device multiplies matrices in bfloat16; emulation would be slower than single precision."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch can't say.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


class Run:
    """Where a run writes: `log.jsonl` as it goes, and the same to trackers; `model/` the best model so far;
    `checkpoints/` where to go on after an interruption; at its end `run.json`, the record, and `curves.png`, the log as
    a picture.

    Args:
        settings: of the run. Without `resume` a log and a record that lie in its folder are replaced, TensorBoard's
            files too.

    Raises:
        FileExistsError: the folder holds checkpoints of a run that did not end, and `resume` is not set.
        ValueError: `resume` is set, and the run that ended there had other settings, or parameters are spread over
            processes; or a tracker can't be had.
    """

    def __init__(self, settings: PretrainRun | FinetuneRun) -> None:
        training = settings.training
        self.folder = settings.output_dir
        self._checkpoints = Checkpoints(self.folder / "checkpoints", training.checkpoints_kept)
        last = self._checkpoints.last()
        self._checkpoint = last if settings.resume else None
        first_step = None if self._checkpoint is None else read_facts(self._checkpoint)["step"] + 1
        trackers = make_trackers(training.trackers, self.folder, as_plain(settings), first_step)
        self.accelerator = make_accelerator(training.precision, trackers)
        self.is_main = self.accelerator.is_main_process
        logging.basicConfig(level=logging.INFO if self.is_main else logging.ERROR, format="%(message)s")
        # The scripts say what matters; transformers' report of each load would bury it.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._started = time.monotonic()
        self.record: dict[str, Any] = {
            "settings": as_plain(settings),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
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
            },
        }
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
        if self._checkpoint is not None and not self.has_ended:
            return
        self._checkpoints.clear()
        if not self.has_ended:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._record_file.unlink(missing_ok=True)
            self._log_file.write_text("")
            shutil.rmtree(self.folder / TENSORBOARD_FOLDER, ignore_errors=True)

    @property
    def model_folder(self) -> Path:
        """The best model so far, with its processor: what `from_pretrained` loads."""
        return self.folder / "model"

    @property
    def _log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def _record_file(self) -> Path:
        return self.folder / "run.json"

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
                    if (now := self.record[kind][name]) != before:
                        logger.warning(
                            "%s was %s when the checkpoint was saved and is %s now: results may differ in their last "
                            "digits from those of a run that was never stopped",
                            name,
                            before,
                            now,
                        )

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
        if self.is_main:
            line = {"event": event, "seconds": round(time.monotonic() - self._started, 2), **values}
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._step = values.get("step", self._step)
        self.accelerator.log(trackable(event, values), step=self._step)

    def save_model(self, model: Any, processor: Any) -> None:
        """Replaces the best model so far by this one."""
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

    def save_checkpoint(self, step: int, state: TrainingState, progress: Mapping[str, Any]) -> None:
        """Saves all that a run needs to go on from here; every process must call this.

        Args:
            step: the optimiser steps taken.
            state: the model and what trains it.
            progress: what `resume` shall return, in JSON's types.

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

    def finish(self, **results: Any) -> None:
        """Writes the record, with results, wall time and peak memory, and removes the checkpoints."""
        if self.is_main:
            self.record.update(results)
            self.record["wall_seconds"] = round(time.monotonic() - self._started, 1)
            # Linux counts in KiB.
            self.record["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            text = json.dumps(self.record, indent=2, ensure_ascii=False, default=str)
            replace_file(self._record_file, text + "\n")
            self._checkpoints.clear()
            if not draw_curves(self._log_file, self.folder / "curves.png"):
                logger.info("no curves.png: matplotlib is not installed (pip install 'flip_hf[train]')")
        self.accelerator.wait_for_everyone()
        self.close_trackers()

    def close_trackers(self) -> None:
        """Ends what the trackers have begun; what they were told is with them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's weights, as JSON has it, by dotted names."""
    flat = dict(_flat(json.loads(json.dumps(values, default=str))))
    # Where a model's configuration comes from and which library wrote it.
    origins = ("_name_or_path", "transformers_version")
    return {name: value for name, value in flat.items() if name not in _FREE_SETTINGS and not name.endswith(origins)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
