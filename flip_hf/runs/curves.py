"""Pictures of a run: training curves and calibration."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

PANELS = {
    "loss": r"(.+_)?loss",
    "accuracy": r".+_accuracy",
    "AUC": r"(.+_)?auc",
    "AUC within groups": r"(.+_)?[gu]auc",
    "LogLoss": r"(.+_)?logloss",
    "gradient norm": r"gradient_norm",
    "learning rate": r"(.+_)?learning_rate",
    "rows a second": r"rows_per_second",
    "memory (GiB)": r"(.+_)?memory_gib",
}
"""The panels of the picture: title, and a pattern for the names of the values in the panel."""

_FROM_ZERO = ("accuracy", "gradient norm", "learning rate", "rows a second", "memory (GiB)")

Line: TypeAlias = tuple[Sequence[int], Sequence[float]]
"""Steps and the values at these steps."""

Series: TypeAlias = dict[str, Line]
"""Lines by the name of their value."""


def read_curves(log: Path) -> dict[str, Series]:
    """Reads the values of a run's `log.jsonl`, under "train" and "validation"."""
    with log.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {event: _series([line for line in lines if line["event"] == event]) for event in ("train", "validation")}


def draw_curves(curves: Mapping[str, Series], title: str, target: Path) -> bool:
    """Draws a run's training values (solid lines) and validation values (dashed, with a mark at each evaluation).

    Args:
        curves: the values from `read_curves`.
        title: title of the picture.
        target: PNG file to write.

    Returns:
        False if matplotlib is not installed, so that nothing was drawn.
    """
    if find_spec("matplotlib") is None:
        return False
    # No window and no global state, unlike pyplot.
    from matplotlib.figure import Figure

    panels = {
        panel: names
        for panel, pattern in PANELS.items()
        if (names := {name for found in curves.values() for name in found if re.fullmatch(pattern, name)})
    }
    columns = 3 if len(panels) <= 6 else 4
    rows = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for place, (panel, names) in enumerate(panels.items(), start=1):
        # The total loss comes before its parts.
        ordered = sorted(names, key=lambda name: (name.count("_"), name))
        _draw(figure.add_subplot(rows, columns, place), panel, ordered, curves)
    figure.suptitle(f"{title}: training as lines, validation dashed", fontsize=12)
    figure.savefig(target, dpi=110)
    return True


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns a colour and a line style for each name; line styles tell apart names that share a colour."""
    return {name: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]} for i, name in enumerate(names)}


def draw_calibration(models: Mapping[str, Sequence[Mapping[str, float]]], target: Path) -> bool:
    """Draws a reliability diagram: for bins of rows with similar probability, click rate against mean probability.

    Args:
        models: the bins of each model by its name, with `rows`, `probability` and `click_rate`, as in a run's record.
        target: PNG file to write.

    Returns:
        False if matplotlib is not installed, so that nothing was drawn.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    largest = max(found[name] for bins in models.values() for found in bins for name in ("probability", "click_rate"))
    top = min(1.0, 1.05 * max(largest, 1e-3))
    axes.plot([0, top], [0, top], color="grey", linewidth=1, linestyle="--", label="calibrated")
    styles = line_styles(models)
    for name, bins in models.items():
        predicted, clicked = ([found[value] for found in bins] for value in ("probability", "click_rate"))
        # 95% confidence interval of a binomial proportion.
        errors = [1.96 * (found["click_rate"] * (1 - found["click_rate"]) / found["rows"]) ** 0.5 for found in bins]
        line: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 2, **styles[name]}
        axes.errorbar(predicted, clicked, yerr=errors, label=name, **line)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("mean probability", fontsize=9)
    axes.set_ylabel("click rate", fontsize=9)
    num_rows = sum(int(found["rows"]) for found in next(iter(models.values())))
    axes.set_title(f"calibration, {num_rows:,} test rows", fontsize=11)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    return True


def _series(lines: Sequence[Mapping[str, Any]]) -> Series:
    lists: dict[str, Any] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float):
                steps, values = lists.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return lists


def _draw(axes: Any, title: str, names: Sequence[str], curves: Mapping[str, Series]) -> None:
    for i, name in enumerate(names):
        color = f"C{i}"
        if name in curves["train"]:
            axes.plot(*curves["train"][name], color=color, linewidth=1.3, label=name)
        if name in curves["validation"]:
            # A leading underscore keeps the second line of a value out of the legend.
            label = f"_{name}" if name in curves["train"] else name
            axes.plot(*curves["validation"][name], "o--", color=color, linewidth=1, markersize=4, label=label)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if title in _FROM_ZERO and axes.dataLim.y1 > 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    if len(names) > 1:
        axes.legend(fontsize=8, framealpha=0.8)
