"""Train, validation and test rows, 8:1:1, the same on every machine."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from flip_hf.data.arrow_files import rows_on_disk
from flip_hf.data.history import add_history, time_ranks
from flip_hf.data.sources import HistoryField, dataset_source

# Of rows that lie anywhere in a file, so many are gathered faster, a row, than more at a time.
_PICKED_ROWS = 1 << 13
_WORDED_ITEM = "the item of a history, with its words"


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


def load_splits(source_name: str, split: str, seed: int, histories: Sequence[HistoryField] = ()) -> DatasetDict:
    """The dataset `source_name` of `DATASETS`, split as `split_indices` says.

    A history, one of the source's, becomes a column more: what the row's user did in strictly earlier rows. With the
    time split these are all earlier rows, as a server would know them; with the random split only training rows, or
    else labels of validation and test rows would be among the inputs of training.

    Rows that the dataset keeps on disk stay there, each split in a file of its own.

    Raises:
        ValueError: an unknown name or split, or a split by time of rows that have none.
        flip_hf.fetch.FetchError: the dataset cannot be had.
    """
    dataset = dataset_source(source_name).load()
    if "timestamp" in dataset.column_names:
        timestamps = time_ranks(dataset.with_format("arrow")[:]["timestamp"], "timestamp")
    elif split == "time":
        raise ValueError(f"{source_name} can't be split by time, as its rows have none: choose the split random")
    else:
        timestamps = np.zeros(len(dataset))
    indices = split_indices(split, timestamps, seed)
    for recipe in histories:
        is_known = np.isin(np.arange(len(dataset)), indices["train"]) if split == "random" else None
        dataset = _with_history(dataset, recipe, is_known)
    if dataset.cache_files:
        return DatasetDict({name: _picked(dataset, rows, f"{source_name} ({name})") for name, rows in indices.items()})
    # Laid out anew: rows that are only picked lie in one chunk each, and every later pass over them would be slow.
    table = dataset.with_format("arrow")[:]
    return DatasetDict({name: Dataset(table.take(rows)) for name, rows in indices.items()})


def _picked(dataset: Dataset, rows: np.ndarray, source: str) -> Dataset:
    """The rows of those numbers, in that order, in a file of their own."""
    picked = dataset.select(rows).with_format("arrow")

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(rows), _PICKED_ROWS):
            yield picked[start : start + _PICKED_ROWS].combine_chunks()

    which = hashlib.sha256(rows.tobytes()).hexdigest()
    return rows_on_disk(["rows", dataset._fingerprint, which], tables, source)


def _with_history(dataset: Dataset, recipe: HistoryField, is_known: np.ndarray | None) -> Dataset:
    labels = dataset.with_format("numpy")["label"][:].tolist()
    words = pa.array([recipe.words.get(label) for label in labels], pa.string())
    items = dataset.with_format("arrow")[:][recipe.item].cast(pa.string())
    may_be_part = words.is_valid().to_numpy(zero_copy_only=False)
    return add_history(
        dataset.add_column(_WORDED_ITEM, pc.binary_join_element_wise(words, items, "")),
        recipe.field.name,
        user=recipe.user,
        item=_WORDED_ITEM,
        time="timestamp",
        eligible=may_be_part if is_known is None else may_be_part & is_known,
        max_values=recipe.field.max_values,
    ).remove_columns(_WORDED_ITEM)
