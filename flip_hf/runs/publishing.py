"""Pushes a run's model to the Hub, during the run and at its end."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flip_hf.hub.push import HubRepo, stage
from flip_hf.runs.folder import RunFiles
from flip_hf.runs.settings import RunSettings

_STAGE = ".push-"

logger = logging.getLogger(__name__)


class Publisher:
    """Pushes a run's model as its settings say; without `push_to_hub` it does nothing.

    Use it only in the main process.

    Args:
        settings: settings of the run.
        files: files of the run.

    Raises:
        ValueError: `private` is set, but the repository is public.
        OSError: the repository is not writable. A token without write access is thus detected before training.
    """

    def __init__(self, settings: RunSettings, files: RunFiles) -> None:
        self._files = files
        self._when = settings.push_when
        self._repo = None
        if settings.push_to_hub is not None:
            self._repo = HubRepo(settings.push_to_hub, settings.private, settings.revision or "main")
            self._repo.prepare()

    def push_best(self, step: int, record: Mapping[str, Any]) -> None:
        """Pushes the best model so far unless `push_when` is "end"; a failure is only logged as a warning."""
        if self._when != "end":
            self._push_in_passing(f"Best model so far, after step {step}", self._copy_model, record)

    def push_checkpoint(self, step: int, save: Callable[[Path], object]) -> None:
        """Pushes the files that `save` writes if `push_when` is "checkpoint"; a failure is only logged as a warning."""
        if self._when == "checkpoint":
            self._push_in_passing(f"Checkpoint after step {step}", save, None)

    def push_at_end(self) -> None:
        """Pushes the model of a run that has written its record.

        Raises:
            OSError: the push failed. The model is still in the run's folder.
        """
        if self._repo is None:
            return
        record = json.loads(self._files.record.read_text(encoding="utf-8"))
        try:
            commit = self._push(f"Model of the run started {record['started']}", self._copy_model, record)
        except OSError as error:
            raise OSError(
                f"pushing to {self._repo.repo_id} failed: {error}. The model is saved in {self._files.model}. Run the "
                "same command with --resume true to push it again"
            ) from error
        logger.info("%s is at %s, commit %s", self._repo.repo_id, self._repo.revision, commit)

    def _push_in_passing(self, message: str, save: Callable[[Path], object], record: Mapping[str, Any] | None) -> None:
        if self._repo is None:
            return
        try:
            self._push(message, save, record)
        except OSError as error:
            logger.warning("pushing to %s failed, and training continues: %s", self._repo.repo_id, error)

    def _push(self, message: str, save: Callable[[Path], object], record: Mapping[str, Any] | None) -> str:
        assert self._repo is not None
        folder = self._files.folder
        for left in folder.glob(f"{_STAGE}*"):
            # A push that was killed left this folder behind.
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_STAGE) as name:
            stage(Path(name), save, self._repo.repo_id, record, self._files.pictures)
            return self._repo.push(Path(name), message)

    def _copy_model(self, folder: Path) -> None:
        shutil.copytree(self._files.model, folder, dirs_exist_ok=True)
