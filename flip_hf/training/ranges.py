"""The valid ranges of numeric settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """A range of numbers.

    Attributes:
        low: the lower bound.
        high: the upper bound.
        has_low: whether the range includes the lower bound itself.
        has_high: whether the range includes the upper bound itself.
        is_finite: whether the range excludes infinity.
    """

    low: float
    high: float = math.inf
    has_low: bool = True
    has_high: bool = True
    is_finite: bool = True

    def __contains__(self, value: float) -> bool:
        is_above = value >= self.low if self.has_low else value > self.low
        is_below = value <= self.high if self.has_high else value < self.high
        return is_above and is_below and not (self.is_finite and math.isinf(value))

    def __str__(self) -> str:
        low = f"{self.low} or more" if self.has_low else f"above {self.low}"
        if self.high == math.inf:
            return low
        if self.has_low and self.has_high:
            return f"from {self.low} to {self.high}"
        return f"{low} and {'at most' if self.has_high else 'below'} {self.high}"


_COUNT, _AMOUNT, _SHARE = Range(1), Range(0), Range(0, 1)
# The seeds that NumPy accepts.
_SEED = Range(0, 2**32 - 1)

RANGES: Mapping[str, Range] = {
    "split_seed": _SEED,
    "max_train_rows": _COUNT,
    "max_validation_rows": _COUNT,
    "text_layers": _COUNT,
    "max_length": _COUNT,
    "text_mask_ratio": _SHARE,
    "tabular_mask_ratio": _SHARE,
    "distillation_weight": _SHARE,
    "num_train_epochs": _COUNT,
    "max_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _AMOUNT,
    "text_learning_rate": _AMOUNT,
    "weight_decay": _AMOUNT,
    "oov_dropout": Range(0, 1, has_high=False),
    "feature_l2": _AMOUNT,
    "warmup_ratio": _SHARE,
    # Infinity turns clipping off.
    "max_grad_norm": Range(0, has_low=False, is_finite=False),
    "per_device_eval_batch_size": _COUNT,
    "evaluations_per_epoch": _COUNT,
    "patience": _COUNT,
    "logging_steps": _COUNT,
    "save_steps": _COUNT,
    "save_total_limit": _COUNT,
    "dataloader_num_workers": _AMOUNT,
    "seed": _SEED,
    "batch_size": _COUNT,
    "text_budget": _SHARE,
    "chunk_rows": _COUNT,
}
"""The range of each numeric setting in all settings dataclasses, by the setting's name."""


def check_ranges(settings: Any, section: str = "") -> None:
    """Checks all numeric settings of a dataclass against `RANGES`.

    Args:
        settings: a dataclass of settings.
        section: name of this group of settings in a run's settings, such as `training`; empty for the top level.

    Raises:
        ValueError: a number is out of range; names the setting, its value and the range.
    """
    for name in (f.name for f in fields(settings)):
        value = getattr(settings, name)
        if name not in RANGES or value is None:
            continue
        # `oov_dropout` may be a mapping of fields to shares.
        numbers = value.values() if isinstance(value, Mapping) else [value]
        if any(number not in RANGES[name] for number in numbers):
            raise ValueError(f"{section}{'.' if section else ''}{name}={value} must be {RANGES[name]}")
