"""Folders that are whole or not there, and the checkpoints among them."""

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
    """Writes a folder beside `target` and puts it in its place, so that an interrupted write leaves the old one whole.

    Args:
        target: the folder to replace or make.
        write: fills the folder it is given.

    Raises:
        OSError: the folder could not be written, as on a full disk.
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
        raise OSError(f"{target} could not be written ({error}); what was there before is as it was") from error
    if target.exists():
        target.rename(old)
    aside.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Puts right what a `replace_folder` left that died: `target` is there again if it ever was, and nothing beside it.

    Where it died between its two renames, the new folder was whole already and takes its place.
    """
    aside, old = _beside(target)
    if old.exists() and not target.exists():
        aside.rename(target)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def replace_file(target: Path, text: str) -> None:
    """Writes a file in one go: an interrupted write leaves the old one, or none."""
    aside = target.with_name(f"{target.name}.new")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    aside.replace(target)
    _sync(target.parent)


class Checkpoints:
    """The checkpoints of a run: folders `step-120`, each with its metadata in `state.json`.

    One is complete where `state.json`, which is written last, names files that are all there in the lengths they had.

    Args:
        folder: where they lie.
        kept: how many complete ones are kept; an older one goes when a newer one is complete.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self.kept = kept

    def last(self) -> Path | None:
        """The last complete one; later ones that are not complete are left out with a warning."""
        for folder in reversed(self._folders()):
            if _is_complete(folder):
                return folder
            logger.warning("%s is not complete and is left out", folder)
        return None

    def save(self, step: int, write: Callable[[Path], object], metadata: Mapping[str, Any]) -> None:
        """Writes one, then removes those that are too old to keep.

        Args:
            step: the optimiser steps taken.
            write: fills the folder it is given with files.
            metadata: what `read_metadata` shall return, in JSON's types.

        Raises:
            OSError: it could not be written; those that were there before are.
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
        """Removes them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        found = [(path.name.removeprefix(_PREFIX), path) for path in self.folder.glob(f"{_PREFIX}*")]
        return [path for _, path in sorted((int(step), path) for step, path in found if step.isdigit())]


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """What a complete checkpoint was saved with beside its files."""
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
    """Waits until a file's contents, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
