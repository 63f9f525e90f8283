"""A run watched from elsewhere: its log in an experiment tracker."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

PROJECT = "flip_hf"
TENSORBOARD_FOLDER = "tensorboard"
TRACKERS = ("tensorboard", "trackio", "wandb")


def make_trackers(
    names: Sequence[str] | None, folder: Path, settings: Mapping[str, Any], first_step: int | None = None
) -> list[GeneralTracker]:
    """The trackers that a run's settings name; accelerate starts, feeds and ends them.

    TensorBoard's files go into the run's folder, `tensorboard/`. trackio and wandb have a project `flip_hf`, with the
    run under its folder's name; where they send it and by which account is theirs to know (`TRACKIO_*`, `WANDB_*`).

    Args:
        names: out of `TRACKERS`; None is TensorBoard where it is installed.
        folder: the run's.
        settings: the run's, which trackio and wandb show.
        first_step: of a resumed run, the step that comes next: TensorBoard forgets what it had of it and of later ones.

    Raises:
        ValueError: a name is unknown, or the package of that name is not installed.
    """
    if names is None:
        names = ["tensorboard"] if find_spec("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"training.report_to: {name!r} is not one of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ValueError(f"training.report_to: {name!r} is not installed; pip install {name}, or leave it out")
    run = {"name": folder.name, "config": dict(settings)}
    made = {
        "tensorboard": lambda: TensorBoardTracker(TENSORBOARD_FOLDER, folder, purge_step=first_step),
        "trackio": lambda: TrackioTracker(PROJECT, **run),
        "wandb": lambda: WandBTracker(PROJECT, dir=str(folder), **run),
    }
    return [made[name]() for name in dict.fromkeys(names)]


def trackable(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log under the names that trackers show, such as `train/loss`."""
    return {
        f"{event}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
