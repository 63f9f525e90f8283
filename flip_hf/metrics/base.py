"""What a metric of click prediction is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClickMetric:
    """A metric of click prediction, as runs report it and as `flip_hf.metrics.load` offers it.

    Args:
        function: takes the labels, 0 or 1 (rows,), the click probabilities (rows,) and the input that `needs` names,
            (rows,), and returns a float: NaN where the metric is undefined.
        title: the metric's name in tables and model cards.
        needs: the third input of the function, for a metric that has one: `"groups"`, such as the rows' users, or
            `"base_probabilities"`, the click probabilities of another model.
        citation: where the metric comes from.
    """

    function: Callable[..., float]
    title: str
    needs: Literal["groups", "base_probabilities"] | None = None
    citation: str = ""
