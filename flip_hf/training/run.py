"""A run's folder: its log, its record and its model."""

import json
import logging
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from flip_hf import __version__
from flip_hf.training.checkpoints import replace_folder
from flip_hf.training.curves import draw_curves
from flip_hf.training.run_config import as_plain
from flip_hf.training.tracking import PROJECT, TENSORBOARD_FOLDER, make_trackers, trackable

_logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def make_accelerator(precision: str, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """An Accelerator for the devices there are.

    Args:
        precision: "bf16", "fp32", or "auto": bf16 where the device computes in it.
        trackers: what `init_trackers` starts.
    """
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=on_cpu, log_with=trackers or None)


def computes_bf16() -> bool:
    """Whether the device multiplies matrices in bfloat16; emulation would be slower than single precision."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch can't say.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


class Run:
    """Where a run writes: `log.jsonl` as it goes, and the same to trackers; `model/` the best model so far; at its end
    `run.json`, the record, and `curves.png`, the log as a picture.

    Args:
        folder: the run's folder, made where it is missing; a log that lies there is replaced, TensorBoard's too.
        settings: the run's dataclass, for the record.
        seed: of everything random.
        precision: as in `make_accelerator`.
        trackers: as in `make_trackers`.
    """

    def __init__(
        self, folder: Path, settings: Any, seed: int, precision: str, trackers: Sequence[str] | None = None
    ) -> None:
        self.folder = folder
        self.accelerator = make_accelerator(precision, make_trackers(trackers, folder, as_plain(settings)))
        self.is_main = self.accelerator.is_main_process
        self._started = time.monotonic()
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text("")
            shutil.rmtree(folder / TENSORBOARD_FOLDER, ignore_errors=True)
        self._step = 0
        self.accelerator.init_trackers(PROJECT)
        # A tracker may have drawn random numbers.
        set_seed(seed)
        logging.basicConfig(level=logging.INFO if self.is_main else logging.ERROR, format="%(message)s")
        # The scripts say what matters; transformers' report of each load would bury it.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.record: dict[str, Any] = {
            "settings": as_plain(settings),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
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

    @property
    def model_folder(self) -> Path:
        """The best model so far, with its processor: what `from_pretrained` loads."""
        return self.folder / "model"

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log: the event, seconds since the start, and the values. Trackers get the numbers."""
        if self.is_main:
            line = {"event": event, "seconds": round(time.monotonic() - self._started, 2), **values}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
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

    def finish(self, **results: Any) -> None:
        """Writes the record, with results, wall time and peak memory."""
        if self.is_main:
            self.record.update(results)
            self.record["wall_seconds"] = round(time.monotonic() - self._started, 1)
            # Linux counts in KiB.
            self.record["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            text = json.dumps(self.record, indent=2, ensure_ascii=False, default=str)
            (self.folder / "run.json").write_text(text + "\n", encoding="utf-8")
            if not draw_curves(self.folder / "log.jsonl", self.folder / "curves.png"):
                _logger.info("no curves.png: matplotlib is not installed (pip install 'flip_hf[train]')")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
