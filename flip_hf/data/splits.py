"""Train, validation and test rows of a named dataset, the same on every machine."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from flip_hf.data.arrow_files import rows_on_disk
from flip_hf.data.history import add_history, time_ranks
from flip_hf.data.schema import canonical_strings
from flip_hf.data.sources import DatasetSource, HistoryField, Months, dataset_source

# Of rows that lie anywhere in a file, so many are gathered faster, a row, than more at a time.
_PICKED_ROWS = 1 << 13
_WORDED_ITEM = "the item of a history, with its words"
_PARTS = ("train", "validation", "test")


def _random(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    return _tenths(_shuffled(len(rows), seed), "rows")


def _by_time(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    if "timestamp" not in rows.column_names:
        raise ValueError(f"{source.name} can't be split by time, as its rows have none: choose another split")
    return _tenths(np.argsort(time_ranks(_column(rows, "timestamp"), "timestamp"), kind="stable"), "rows")


def _by_item(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    encoded = _column(rows, source.item).combine_chunks().dictionary_encode()
    names, _ = canonical_strings(encoded.dictionary, source.item)
    # Items are drawn in the order of their names: the order of the rows must not matter.
    items, place_of_value = np.unique(names.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    part_of_item = np.empty(len(items), dtype=np.int8)
    for part, drawn in enumerate(_tenths(_shuffled(len(items), seed), f"values of {source.item}")):
        part_of_item[drawn] = part
    parts = part_of_item[place_of_value][encoded.indices.to_numpy()]
    # Shuffled, or else the first training rows would be those of few users.
    order = _shuffled(len(rows), seed)
    return [order[parts[order] == part] for part in range(len(_PARTS))]


def _by_month(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    times = _column(rows, "timestamp").to_numpy()
    order = np.argsort(times, kind="stable")
    starts = np.array(_months(source).starts, "datetime64[M]")
    cuts = np.searchsorted(times[order], starts.astype("datetime64[s]").astype(np.int64))
    for month, (start, end) in zip(starts, pairwise(cuts), strict=False):
        if start == end:
            raise ValueError(f"{source.name} has no rows of the months from {month} on that its split by months needs")
    return [order[start:end] for start, end in pairwise(cuts)]


def _months(source: DatasetSource) -> Months:
    if source.months is None:
        raise ValueError(f"{source.name} can't be split by months: choose another split")
    return source.months


def _itself(source: DatasetSource) -> DatasetSource:
    return source


def _shuffled(number: int, seed: int) -> np.ndarray:
    # RandomState's stream is frozen for good (NEP 19); a Generator's may change with the numpy version, and with it
    # which rows are test rows.
    return np.random.RandomState(seed).permutation(number)


def _tenths(order: np.ndarray, what: str) -> list[np.ndarray]:
    if len(order) < 10:
        raise ValueError(f"{len(order)} {what} cannot be split 8:1:1: at least 10 are needed")
    tenth = len(order) // 10
    return np.split(order, [len(order) - 2 * tenth, len(order) - tenth])


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns([name]).with_format("arrow")[:][name]


@dataclass(frozen=True)
class Split:
    """A way to divide rows into training, validation and test rows.

    Attributes:
        deal: gives the row numbers of the three parts, from the rows, their source and a seed (0 to 2**32 - 1).
        follows_time: whether no row is older than any row of an earlier part. Histories then hold all earlier rows of
            the three parts, as a server would know them. Otherwise they hold training rows only, because labels of
            validation and test rows would be inputs of training.
        rows_of: gives what loads and describes the rows to divide, from their source; the source itself unless the
            split has a label rule of its own.
    """

    deal: Callable[[Dataset, DatasetSource, int], list[np.ndarray]]
    follows_time: bool
    rows_of: Callable[[DatasetSource], DatasetSource | Months] = _itself


SPLITS: dict[str, Split] = {
    "random": Split(_random, follows_time=False),
    "time": Split(_by_time, follows_time=True),
    "item": Split(_by_item, follows_time=False),
    "months": Split(_by_month, follows_time=True, rows_of=_months),
}
"""Name of a split -> how it divides the rows."""


def split_indices(kind: str, rows: Dataset, source: DatasetSource, seed: int) -> dict[str, np.ndarray]:
    """Row numbers (int64) of `"train"`, `"validation"` and `"test"`. No row is in two of them.

    Args:
        kind: `"random"`: the rows are shuffled by `seed`; a tenth of them, rounded down, is for validation and another
            for test. `"time"`: the same shares, but no row is older than any row of an earlier part; rows of the same
            timestamp keep their order and may fall on both sides of a cut. `"item"`: all rows of a tenth of the items
            are for validation and all rows of another tenth are for test. The items are drawn by `seed`, whatever the
            order of the rows; each part's rows are shuffled. `"months"`: the calendar months of `source.months`, in the
            order of time; rows of other months are in no part.
        rows: the rows, as `SPLITS[kind].rows_of(source).load` returns them.
        source: whose rows they are.
        seed: 0 to 2**32 - 1; `"time"` and `"months"` do not use it.

    Raises:
        ValueError: an unknown kind; rows without times for a split by time; no months for a split by months; fewer than
            10 rows or items; or months without rows. No part is ever empty.
    """
    parts = find_split(kind).deal(rows, source, seed)
    return {name: part.astype(np.int64) for name, part in zip(_PARTS, parts, strict=True)}


def find_split(kind: str) -> Split:
    """The split of that name, or a ValueError that lists the names."""
    if kind not in SPLITS:
        raise ValueError(f"unknown split {kind!r}: choose one of {', '.join(SPLITS)}")
    return SPLITS[kind]


def load_splits(source_name: str, split: str, seed: int, histories: Sequence[HistoryField] = ()) -> DatasetDict:
    """The dataset `source_name` of `DATASETS`, split as `split_indices` says.

    A history, one of the source's, becomes a column more: what the row's user did in strictly earlier rows, of those
    that the split lets it know (`Split.follows_time`).

    Rows that the dataset keeps on disk stay there, each split in a file of its own.

    Raises:
        ValueError: an unknown name or split, or a split that the rows do not allow.
        flip_hf.fetch.FetchError: the dataset cannot be had.
    """
    source, way = dataset_source(source_name), find_split(split)
    dataset = way.rows_of(source).load()
    indices = split_indices(split, dataset, source, seed)
    known = np.concatenate(list(indices.values())) if way.follows_time else indices["train"]
    for recipe in histories:
        dataset = _with_history(dataset, recipe, np.isin(np.arange(len(dataset)), known))
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


def _with_history(dataset: Dataset, recipe: HistoryField, is_known: np.ndarray) -> Dataset:
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
        eligible=may_be_part & is_known,
        max_values=recipe.field.max_values,
    ).remove_columns(_WORDED_ITEM)
