"""The files of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.data.distillation import TEACHER_COLUMN
from flip_hf.runs.curves import draw_calibration, draw_curves, read_curves
from flip_hf.runs.tracking import TENSORBOARD_FOLDER
from flip_hf.standard_json import measures_json

MODEL_FOLDER = "model"
"""Name of the best model's folder within a run's folder."""
RECORD_NAME = "run.json"
"""Name of the record in a run's folder, and beside the model on the Hub."""


@dataclass(frozen=True)
class RunFiles:
    """The files that a run writes.

    Args:
        folder: the run's folder.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The best model so far, with its processor; `from_pretrained` loads it."""
        return self.folder / MODEL_FOLDER

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """The log: one line of JSON per event."""
        return self.folder / "log.jsonl"

    @property
    def record(self) -> Path:
        """The record, written at the end of the run."""
        return self.folder / RECORD_NAME

    @property
    def scores(self) -> Path:
        """The labels and logits of the test rows."""
        return self.folder / "test_scores.parquet"

    @property
    def teacher_logits(self) -> Path:
        """The teacher's click logits of the training rows, which a resumed run reads."""
        return self.folder / "teacher_logits.parquet"

    @property
    def pictures(self) -> dict[Path, str]:
        """The pictures that a run may draw at its end, with their captions."""
        return {
            self._curves: "Losses and metrics during the run",
            self._calibration: "Click rates of the test rows against their predicted probabilities",
        }

    @property
    def of_one_run(self) -> list[Path]:
        """The files that a new run in this folder replaces, apart from the model and the checkpoints."""
        left = [path for path in (self.folder / TENSORBOARD_FOLDER).rglob("*") if path.is_file()]
        return [*left, self.record, self.scores, self.teacher_logits, self.log]

    @property
    def _curves(self) -> Path:
        return self.folder / "curves.png"

    @property
    def _calibration(self) -> Path:
        return self.folder / "calibration.png"

    def add_to_log(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(measures_json(line) + "\n")

    def save_scores(self, scores: Mapping[str, np.ndarray]) -> None:
        """Writes the labels, the logits and any groups of the test rows, in the order of the rows."""
        pq.write_table(pa.table(dict(scores)), self.scores)

    def save_teacher_logits(self, logits: np.ndarray) -> None:
        """Writes the click logits of the training rows, then of the unlabelled rows."""
        pq.write_table(pa.table({TEACHER_COLUMN: logits}), self.teacher_logits)

    def read_teacher_logits(self) -> np.ndarray:
        """Reads the logits that `save_teacher_logits` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        if not self.teacher_logits.exists():
            raise FileNotFoundError(f"{self.teacher_logits} is missing, and resuming this run needs it; restore it")
        logits: np.ndarray = pq.read_table(self.teacher_logits)[TEACHER_COLUMN].to_numpy()
        return logits

    def draw(self, result: Mapping[str, Any]) -> bool:
        """Draws the curves of the log and the calibration of any test rows; returns False without matplotlib."""
        drawn = draw_curves(read_curves(self.log), self.folder.name, self._curves)
        if bins := result.get("test_calibration"):
            draw_calibration({"model": bins}, self._calibration)
        return drawn
