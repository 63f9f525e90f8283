"""Atomic writes of folders and files, and the checkpoints of a run."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flip_hf.standard_json import measures_json

_STATE_NAME = "state.json"
_PREFIX = "step-"

logger = logging.getLogger(__name__)


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Replaces a folder atomically: an interrupted write leaves the old folder intact.

    The new folder is written beside `target` and then renamed.

    Args:
        target: the folder to replace or create.
        write: called with the path of the new folder, which it fills with files.

    Raises:
        OSError: the folder could not be written, for example because the disk is full.
    """
    recover_folder(target)
    aside, old = _beside(target)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for path in (*aside.rglob("*"), aside):
            _sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{target} could not be written ({error}); its previous content is unchanged") from error
    if target.exists():
        target.rename(old)
    aside.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Repairs `target` after a crash in `replace_folder`, and removes leftover folders beside it.

    After a crash between the two renames, the new folder is already complete, so it becomes `target`.
    """
    aside, old = _beside(target)
    if old.exists() and not target.exists():
        aside.rename(target)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def replace_file(target: Path, text: str) -> None:
    """Replaces a file atomically: an interrupted write leaves the old file, or no file if there was none."""
    aside = target.with_name(f"{target.name}.new")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    aside.replace(target)
    _sync(target.parent)


class Checkpoints:
    """The checkpoints of a run: folders such as `step-120`, each with its metadata in `state.json`.

    `state.json` is written last and lists the other files with their sizes. A checkpoint is complete if all these files
    exist with these sizes.

    Args:
        folder: folder of the checkpoints.
        kept: number of complete checkpoints to keep. Older ones are deleted once a newer one is complete.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self.kept = kept

    def last(self) -> Path | None:
        """Returns the last complete checkpoint, or None; logs a warning for each later, incomplete one."""
        for folder in reversed(self._folders()):
            if _is_complete(folder):
                return folder
            logger.warning("%s is incomplete and is ignored", folder)
        return None

    def save(self, step: int, write: Callable[[Path], object], metadata: Mapping[str, Any]) -> None:
        """Writes a checkpoint, then removes the ones that are too old to keep.

        Args:
            step: number of optimiser steps taken so far.
            write: called with the path of the new checkpoint, which it fills with files.
            metadata: values for `read_metadata` to return, of JSON types.

        Raises:
            OSError: the checkpoint could not be written. Earlier checkpoints are intact.
        """

        def fill(folder: Path) -> None:
            write(folder)
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            (folder / _STATE_NAME).write_text(measures_json({**metadata, "files": sizes}, indent=1), encoding="utf-8")

        target = self.folder / f"{_PREFIX}{step}"
        replace_folder(target, fill)
        complete = [folder for folder in self._folders() if _is_complete(folder)]
        for path in self.folder.iterdir():
            if path not in complete[-self.kept :]:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        found = [(path.name.removeprefix(_PREFIX), path) for path in self.folder.glob(f"{_PREFIX}*")]
        return [path for _, path in sorted((int(step), path) for step, path in found if step.isdigit())]


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns the metadata that a complete checkpoint was saved with."""
    metadata: dict[str, Any] = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    return metadata


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = read_metadata(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f"{target.name}.new"), target.with_name(f"{target.name}.old")


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
