"""Sends the log of a run to experiment trackers."""

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
    """Creates the trackers that a run's settings name; accelerate starts and finishes them.

    TensorBoard writes to `tensorboard/` in the run's folder. trackio and wandb show the run in the project `flip_hf`,
    under the name of its folder. Configure their server and account with their own variables (`TRACKIO_*`, `WANDB_*`).

    Args:
        names: names from `TRACKERS`; None means TensorBoard if it is installed.
        folder: folder of the run.
        settings: settings of the run, which trackio and wandb show.
        first_step: the next step of a resumed run. TensorBoard purges this and later steps, because the run repeats
            them.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    if names is None:
        names = ["tensorboard"] if find_spec("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"training.report_to: {name!r} is not one of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ValueError(f"training.report_to: {name!r} is not installed; run pip install {name}, or leave it out")
    run = {"name": folder.name, "config": dict(settings)}
    made = {
        "tensorboard": lambda: TensorBoardTracker(TENSORBOARD_FOLDER, folder, purge_step=first_step),
        "trackio": lambda: TrackioTracker(PROJECT, **run),
        "wandb": lambda: WandBTracker(PROJECT, dir=str(folder), **run),
    }
    return [made[name]() for name in dict.fromkeys(names)]


def trackable(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a log line under the names that trackers show, such as `train/loss`."""
    return {
        f"{event}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
