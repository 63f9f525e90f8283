"""The description of a metric of click prediction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClickMetric:
    """A metric of click prediction, for the reports of runs and for `flip_hf.metrics.load`.

    Args:
        function: takes the labels, 0 or 1 (rows,), the click probabilities (rows,), and the input that `needs` names
            (rows,). Returns a float, which is NaN if the metric is undefined.
        title: the metric's name in tables and model cards.
        needs: the function's third input, if it has one: `"groups"`, such as the rows' users, or
            `"base_probabilities"`, the click probabilities of another model.
        citation: the metric's source.
    """

    function: Callable[..., float]
    title: str
    needs: Literal["groups", "base_probabilities"] | None = None
    citation: str = ""
