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
"""The folder of the best model, in a run's folder."""
RECORD_NAME = "run.json"
"""The record's name in a run's folder, and beside its model on the Hub."""


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps what it writes.

    Args:
        folder: the run's.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The best model so far, with its processor: what `from_pretrained` loads."""
        return self.folder / MODEL_FOLDER

    @property
    def checkpoints(self) -> Path:
        """Where to go on after an interruption."""
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """A line of JSON for each event."""
        return self.folder / "log.jsonl"

    @property
    def record(self) -> Path:
        """What the run writes down at its end."""
        return self.folder / RECORD_NAME

    @property
    def scores(self) -> Path:
        """Labels and logits of the test rows."""
        return self.folder / "test_scores.parquet"

    @property
    def teacher_logits(self) -> Path:
        """A teacher's click logits of the training rows, which a resumed run reads."""
        return self.folder / "teacher_logits.parquet"

    @property
    def pictures(self) -> dict[Path, str]:
        """The pictures that a run draws when it ends, with their captions; not all runs have all of them."""
        return {
            self._curves: "Losses and metrics over the run",
            self._calibration: "Click rates on the test rows against the probabilities predicted for them",
        }

    @property
    def of_one_run(self) -> list[Path]:
        """What a new run in this folder replaces, but for the model and the checkpoints."""
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
        """Writes labels and logits, and the groups where there are some, a row for each test row in their order."""
        pq.write_table(pa.table(dict(scores)), self.scores)

    def save_teacher_logits(self, logits: np.ndarray) -> None:
        """Writes the click logits of the training rows, then of the unlabelled rows."""
        pq.write_table(pa.table({TEACHER_COLUMN: logits}), self.teacher_logits)

    def read_teacher_logits(self) -> np.ndarray:
        """What `save_teacher_logits` wrote.

        Raises:
            FileNotFoundError: the file is not there.
        """
        if not self.teacher_logits.exists():
            raise FileNotFoundError(f"{self.teacher_logits}, which the run to resume had written, is gone; restore it")
        logits: np.ndarray = pq.read_table(self.teacher_logits)[TEACHER_COLUMN].to_numpy()
        return logits

    def draw(self, result: Mapping[str, Any]) -> bool:
        """Draws the log and, of a result with test rows, their calibration; False where matplotlib is not there."""
        drawn = draw_curves(read_curves(self.log), self.folder.name, self._curves)
        if bins := result.get("test_calibration"):
            draw_calibration({"model": bins}, self._calibration)
        return drawn
