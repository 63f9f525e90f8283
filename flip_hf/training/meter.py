"""How far training has come, and what it took."""

import math
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch


@dataclass
class Meter:
    """Averages over the steps since they were last taken."""

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
    """How far training has come: with the `TrainingState`, all that it needs to go on.

    Attributes:
        step: optimiser steps taken; the order of rows is a function of it.
        evaluated_step: the step after which validation rows were last read.
        best: the best validation metrics.
        best_step: the step that they were measured after.
        without_better: evaluations since then.
        rows: training rows read.
        seconds: time spent on them.
        meter: what the log's next line is about.
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
            values: what a log should show of it.
            num_rows: the rows that it read on all processes.
            seconds: the time that it took.
        """
        self.step += 1
        self.rows, self.seconds = self.rows + num_rows, self.seconds + seconds
        self.meter.add(values, num_rows, seconds)

    def take_averages(self) -> dict[str, float]:
        """Averages over the steps since this was last called."""
        averages, self.meter = self.meter.averages(), Meter()
        return averages

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Progress":
        """What `asdict` made of one, out of a checkpoint, where a metric without a value is null."""
        best = {name: math.nan if value is None else value for name, value in saved["best"].items()}
        return cls(**{**saved, "best": best, "meter": Meter(**saved["meter"])})

    def result(self, total_steps: int) -> dict[str, Any]:
        """What training has come to, where it was to take `total_steps`."""
        return {
            "validation": self.best,
            "best_step": self.best_step,
            "steps": self.step,
            "stopped_early": self.step < total_steps,
            "rows_per_second": round(self.rows / self.seconds, 1),
        }


def memory_in_use(device: torch.device) -> dict[str, float]:
    """What this process's resident set takes now, in GiB, and the most that tensors took of a CUDA device so far."""
    found = {"memory_gib": round(psutil.Process().memory_info().rss / 2**30, 3)}
    if device.type == "cuda":
        found["device_peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found
