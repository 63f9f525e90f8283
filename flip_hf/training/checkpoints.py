"""Folders that are whole or not there."""

import shutil
from collections.abc import Callable
from pathlib import Path


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside `target` and puts it in its place, so that an interrupted write leaves the old one whole.

    Args:
        target: the folder to replace or make.
        write: fills the folder it is given.
    """
    aside, old = target.with_name(f"{target.name}.new"), target.with_name(f"{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    if not target.exists():
        # Also where a run died between the two renames below: what it put aside is older than what is written now.
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old)
