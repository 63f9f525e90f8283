"""What the engine asks of those that use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from flip_hf.training.state import TrainingState


class RunFolder(Protocol):
    """Where the training loop logs and saves; `flip_hf.runs.run.Run` is one.

    Attributes:
        folder: holds all that is saved.
        accelerator: what the run computes with.
        is_main: whether this process writes.
        record: what the run writes down at its end.
    """

    folder: Path
    accelerator: Accelerator
    is_main: bool
    record: dict[str, Any]

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log."""

    def save_model(self, model: Any, processor: Any, result: Mapping[str, Any]) -> None:
        """Replaces the best model so far by this one."""

    def save_checkpoint(self, step: int, state: TrainingState, progress: Mapping[str, Any], processor: Any) -> None:
        """Saves all that a run needs to go on from here."""

    def resume(self, state: TrainingState) -> dict[str, Any] | None:
        """Puts the state back to where the last checkpoint was saved, and returns the progress that came with it."""

    def close_trackers(self) -> None:
        """Ends what experiment trackers have begun."""
