"""What the records of a table's row say: values and differences over seeds, with their intervals."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import Table, key_of
from significance import paired_t

# Users and items with so few training rows are rare.
RARE = 10
# Each seed draws these splits anew from the same rows.
DRAWN = ("random", "item")


def by_seed(table: Table, row: str, split: str, runs: Mapping[str, Any]) -> dict[int, Any]:
    """The records of a table's row, of the seeds that have one."""
    keys = {seed: key_of(table.runs(row, split, seed)) for seed in range(table.seeds)}
    return {seed: runs[key] for seed, key in keys.items() if key in runs}


def measured(records: Mapping[int, Any], shows: str, metric: str) -> list[float]:
    """A metric of a row's seeds, of those where it has a value."""
    values = (record["result"][shows].get(metric) for record in records.values())
    return [value for value in values if value is not None]


def differences(first: Mapping[int, Any], second: Mapping[int, Any], metric: str) -> list[float]:
    """By how much a row's test metric is above another's, over the seeds where both have a value."""
    pairs = [
        (record["result"]["test"], second[seed]["result"]["test"]) for seed, record in first.items() if seed in second
    ]
    values = [(one.get(metric), other.get(metric)) for one, other in pairs]
    return [one - other for one, other in values if one is not None and other is not None]


def test_ratio(records: Mapping[int, Any], runs: Mapping[str, Any]) -> float:
    """Test rows divided by training rows, where each seed has another split of the same rows; else 0."""
    record = next(iter(records.values()))
    if record["split"] not in DRAWN:
        return 0.0
    # Of an average the first part's.
    rows = runs[record["key"].split(" + ")[0]]["run"]["data"]["rows"]
    ratio: float = rows["test"] / rows["train"]
    return ratio


def spread(values: Sequence[float], ratio: float) -> str:
    """Mean and half of its 95% interval over seeds; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    if len(values) < 2:
        return mean
    found = paired_t(values, ratio)
    return f"{mean} ± {found.high - found.difference:.4f}"


def shown_p(p: float) -> str:
    """A probability as tables show it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"
