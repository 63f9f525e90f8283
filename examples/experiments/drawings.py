"""The pictures of docs/results.md and README that show several models or matrices beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flip_hf.runs.curves import Line, line_styles

# A moving mean is over a tenth of a line. A line of few points is drawn point by point.
_SHARE_OF_LINE, _FEW_POINTS = 10, 20


def draw_learning(panels: Mapping[str, Mapping[str, Line]], target: Path) -> None:
    """Draws the learning curves of several models, one panel beside the other.

    Args:
        panels: title -> name of a model -> its line. Lines of many points are drawn as moving means.
        target: the PNG to write.
    """
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    styles = line_styles(dict.fromkeys(name for lines in panels.values() for name in lines))
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, (steps, values) in lines.items():
            marker = "o" if len(values) <= _FEW_POINTS else ""
            width = 1 if marker else len(values) // _SHARE_OF_LINE
            means = moving_means(values, width)
            axes.plot(steps[width - 1 :], means, marker=marker, linewidth=1.3, markersize=4, label=name, **styles[name])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def moving_means(values: Sequence[float], width: int) -> list[float]:
    """The means of each `width` consecutive values: `width - 1` fewer than there are values."""
    return [sum(values[i - width : i]) / width for i in range(width, len(values) + 1)]


def draw_matrices(
    matrices: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str], target: Path
) -> None:
    """Draws matrices of numbers from 0 to 1 beside each other.

    Args:
        matrices: title -> matrix.
        rows: the names of their rows.
        columns: the names of their columns.
        target: the PNG to write.
    """
    figure = Figure(figsize=(5.2 * len(matrices), 4.6), layout="constrained")
    for place, (title, matrix) in enumerate(matrices.items(), start=1):
        axes = figure.add_subplot(1, len(matrices), place)
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        for i, values in enumerate(matrix):
            for j, value in enumerate(values):
                color = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    figure.savefig(target, dpi=110)


@dataclass(frozen=True)
class Bar:
    """One model of a bar chart.

    Attributes:
        name: the label of the bar.
        auc: the model's mean AUC.
        difference: its AUC minus that of the model that the others are compared with.
        low: the lower bound of the difference's confidence interval.
        high: the upper bound.
    """

    name: str
    auc: float
    difference: float
    low: float
    high: float


def draw_bars(panels: Mapping[str, Sequence[Bar]], title: str, target: Path, *, dark: bool) -> None:
    """Draws differences of AUC as horizontal bars with their intervals, one panel beside the other.

    Args:
        panels: title -> bars from top to bottom. The first is the model that the others are compared with.
        title: the label of the horizontal axis.
        target: the SVG to write.
        dark: whether it is for dark pages; then the background is transparent, and otherwise white.
    """
    ink, better, worse = ("#e6edf3", "#1f6feb", "#db6d28") if dark else ("#1f2328", "#54aeff", "#fb8f44")
    rows = max(map(len, panels.values()))
    # The same records give the same bytes, and letters are shapes, which look alike everywhere.
    with rc_context({"svg.hashsalt": target.name, "svg.fonttype": "path"}):
        figure = Figure(figsize=(9.4, 1.1 + 0.36 * rows), layout="constrained")
        for place, (name, bars) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), place)
            for i, bar in enumerate(bars):
                axes.barh(i, bar.difference, color=better if bar.difference > 0 else worse, height=0.6)
                if i:
                    reach = [[bar.difference - bar.low], [bar.high - bar.difference]]
                    axes.errorbar(bar.difference, i, xerr=reach, color=ink, capsize=3, linewidth=1.2)
            axes.text(0, 0, " (reference)", color=ink, fontsize=9, va="center")
            axes.axvline(0, color=ink, linewidth=1)
            axes.set_yticks(range(len(bars)), [f"{bar.name}   {bar.auc:.4f}" for bar in bars], fontsize=9)
            axes.set_ylim(rows - 0.5, -0.5)
            axes.set_title(name, fontsize=11, color=ink)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:+.3f}")
            axes.tick_params(labelsize=9, colors=ink, length=0)
            axes.grid(axis="x", color=ink, alpha=0.15)
            axes.set_axisbelow(True)
            for side in axes.spines.values():
                side.set_visible(False)
        figure.supxlabel(title, fontsize=9, color=ink)
        figure.savefig(target, transparent=dark, metadata={"Date": None})
