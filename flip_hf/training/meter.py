"""Progress, averages and memory use of a training."""

import math
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch


@dataclass
class Meter:
    """Averages of logged values over the steps since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0

    def add(self, values: dict[str, float], rows: int, seconds: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.rows, self.seconds = self.steps + 1, self.rows + rows, self.seconds + seconds

    def averages(self) -> dict[str, float]:
        averages = {name: total / self.steps for name, total in self.sums.items()}
        return averages | {"rows_per_second": round(self.rows / self.seconds, 1)}


@dataclass
class Progress:
    """The progress of a training. Together with the `TrainingState`, it is all that resuming needs.

    Attributes:
        step: number of optimiser steps taken; it determines which rows come next.
        evaluated_step: step after which the last evaluation took place.
        best: the best validation metrics.
        best_step: step after which the best metrics were measured.
        without_better: number of evaluations since `best_step`.
        rows: number of training rows read.
        seconds: time spent on these rows.
        meter: averages for the next line of the log.
    """

    step: int = 0
    evaluated_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    without_better: int = 0
    rows: int = 0
    seconds: float = 0.0
    meter: Meter = field(default_factory=Meter)

    def add_step(self, values: dict[str, float], num_rows: int, seconds: float) -> None:
        """Counts an optimiser step.

        Args:
            values: the step's values to log, by name.
            num_rows: number of rows that the step read on all processes.
            seconds: duration of the step.
        """
        self.step += 1
        self.rows, self.seconds = self.rows + num_rows, self.seconds + seconds
        self.meter.add(values, num_rows, seconds)

    def take_averages(self) -> dict[str, float]:
        """Returns averages over the steps since the last call, and starts new ones."""
        averages, self.meter = self.meter.averages(), Meter()
        return averages

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Progress":
        """Restores progress from a checkpoint: the output of `asdict`, in which null stands for NaN metrics."""
        best = {name: math.nan if value is None else value for name, value in saved["best"].items()}
        return cls(**{**saved, "best": best, "meter": Meter(**saved["meter"])})

    def result(self, total_steps: int) -> dict[str, Any]:
        """Returns the results of a training that was planned for `total_steps` steps."""
        return {
            "validation": self.best,
            "best_step": self.best_step,
            "steps": self.step,
            "stopped_early": self.step < total_steps,
            "rows_per_second": round(self.rows / self.seconds, 1),
        }


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Returns this process's resident memory and, on a CUDA device, the peak memory of tensors so far, both in GiB."""
    found = {"memory_gib": round(psutil.Process().memory_info().rss / 2**30, 3)}
    if device.type == "cuda":
        found["device_peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found
