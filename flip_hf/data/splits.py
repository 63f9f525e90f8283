"""Train, validation and test rows, 8:1:1, the same on every machine."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset, DatasetDict

from flip_hf.data.history import add_history
from flip_hf.data.sources import DATASETS


def _random_order(timestamps: np.ndarray, seed: int) -> np.ndarray:
    # RandomState's stream is frozen for good (NEP 19); a Generator's may change with the numpy version, and with it
    # which rows are test rows.
    return np.random.RandomState(seed).permutation(len(timestamps))


def _time_order(timestamps: np.ndarray, seed: int) -> np.ndarray:
    return np.argsort(timestamps, kind="stable")


SPLITS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "random": _random_order,
    "time": _time_order,
}
"""Kind of split to the order, as row numbers, in which rows are dealt to train, then validation, then test."""


def split_indices(kind: str, timestamps: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Row numbers (int64) of `"train"`, `"validation"` and `"test"`: a partition of all rows.

    Validation and test get a tenth of the rows each, rounded down, and train the rest.

    Args:
        kind: `"random"`, shuffled by `seed`; or `"time"`, where no row is older than any row of an earlier split
            (rows of the same timestamp keep their order and may fall on both sides of a cut), and `seed` is unused.
        timestamps: one a row, `(rows,)`.
        seed: 0 to 2**32 - 1.

    Raises:
        ValueError: an unknown kind, or fewer than 10 rows, which would leave a split empty.
    """
    if kind not in SPLITS:
        raise ValueError(f"unknown split {kind!r}: choose one of {', '.join(SPLITS)}")
    if len(timestamps) < 10:
        raise ValueError(f"{len(timestamps)} rows cannot be split 8:1:1: at least 10 are needed")
    order = SPLITS[kind](timestamps, seed).astype(np.int64)
    tenth = len(order) // 10
    train, validation, test = np.split(order, [len(order) - 2 * tenth, len(order) - tenth])
    return {"train": train, "validation": validation, "test": test}


def load_splits(source_name: str, split: str, seed: int, history: bool = False) -> DatasetDict:
    """The dataset `source_name` of `DATASETS`, split as `split_indices` says.

    With `history`, rows also have the source's history field: what the row's user liked in strictly earlier rows. With
    the time split these are all earlier rows, as a server would know them; with the random split only training rows,
    or else labels of validation and test rows would be among the inputs of training.

    Raises:
        ValueError: an unknown name or split.
        flip_hf.fetch.FetchError: the dataset cannot be had.
    """
    if source_name not in DATASETS:
        raise ValueError(f"unknown dataset {source_name!r}: choose one of {', '.join(DATASETS)}")
    dataset = DATASETS[source_name].load()
    timestamps = dataset.with_format("numpy")["timestamp"][:]
    indices = split_indices(split, timestamps, seed)
    if history:
        recipe = DATASETS[source_name].history
        may_be_part = dataset.with_format("numpy")["label"][:] == 1
        if split == "random":
            may_be_part &= np.isin(np.arange(len(dataset)), indices["train"])
        dataset = add_history(
            dataset,
            recipe.field.name,
            user=recipe.user,
            item=recipe.item,
            time="timestamp",
            eligible=may_be_part,
            max_values=recipe.field.max_values,
        )
    # Laid out anew: rows that are only picked lie in one chunk each, and every later pass over them would be slow.
    table = dataset.with_format("arrow")[:]
    return DatasetDict({name: Dataset(table.take(rows)) for name, rows in indices.items()})
