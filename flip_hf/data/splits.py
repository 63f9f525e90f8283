"""Splits a named dataset into training, validation and test rows, identically on every machine."""

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

# For rows scattered over a file, gathering this many at a time is faster per row than gathering more.
_PICKED_ROWS = 1 << 13
_WORDED_ITEM = "the item of a history, with its words"
_PARTS = ("train", "validation", "test")


def _random(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    return _tenths(_shuffled(len(rows), seed), "rows")


def _by_time(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    if "timestamp" not in rows.column_names:
        raise ValueError(f"{source.name} has no timestamps, so it can't be split by time; choose another split")
    return _tenths(np.argsort(time_ranks(_column(rows, "timestamp"), "timestamp"), kind="stable"), "rows")


def _by_item(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    encoded = _column(rows, source.item).combine_chunks().dictionary_encode()
    names, _ = canonical_strings(encoded.dictionary, source.item)
    # Sort the items by name before drawing, so that the order of the rows makes no difference.
    items, place_of_value = np.unique(names.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    part_of_item = np.empty(len(items), dtype=np.int8)
    for part, drawn in enumerate(_tenths(_shuffled(len(items), seed), f"values of {source.item}")):
        part_of_item[drawn] = part
    parts = part_of_item[place_of_value][encoded.indices.to_numpy()]
    # Shuffle the rows. Otherwise the first training rows would come from a few users only.
    order = _shuffled(len(rows), seed)
    return [order[parts[order] == part] for part in range(len(_PARTS))]


def _by_month(rows: Dataset, source: DatasetSource, seed: int) -> list[np.ndarray]:
    times = _column(rows, "timestamp").to_numpy()
    order = np.argsort(times, kind="stable")
    starts = np.array(_months(source).starts, "datetime64[M]")
    cuts = np.searchsorted(times[order], starts.astype("datetime64[s]").astype(np.int64))
    for month, (start, end) in zip(starts, pairwise(cuts), strict=False):
        if start == end:
            raise ValueError(
                f"{source.name} has no rows in the months from {month} on, which its months split needs; choose another"
            )
    return [order[start:end] for start, end in pairwise(cuts)]


def _months(source: DatasetSource) -> Months:
    if source.months is None:
        raise ValueError(f"{source.name} can't be split by months; choose another split")
    return source.months


def _itself(source: DatasetSource) -> DatasetSource:
    return source


def _shuffled(number: int, seed: int) -> np.ndarray:
    # RandomState's stream is frozen (NEP 19). A Generator's stream, and with it the test rows, may change with the
    # NumPy version.
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
    """A way to split rows into training, validation and test rows.

    Attributes:
        deal: returns the row numbers of the three parts, given the rows, their source and a seed (0 to 2**32 - 1).
        follows_time: whether no row is older than any row of an earlier part. If true, histories hold all earlier rows
            of the three parts, as a server would know them. If false, they hold training rows only; otherwise the
            labels of validation and test rows would be training inputs.
        rows_of: given the source, returns the object that loads and describes the rows to split. This is the source
            itself, unless the split has its own label rule.
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
"""Maps the name of a split to its definition."""


def split_indices(kind: str, rows: Dataset, source: DatasetSource, seed: int) -> dict[str, np.ndarray]:
    """Returns the row numbers (int64) of `"train"`, `"validation"` and `"test"`. The parts don't overlap.

    Args:
        kind: the split:

            - `"random"` shuffles the rows by `seed`. A tenth of them, rounded down, is for validation and another tenth
              for test.
            - `"time"` uses the same shares, but no row is older than any row of an earlier part. Rows with equal
              timestamps keep their order and may lie on both sides of a cut.
            - `"item"` uses all rows of a tenth of the items for validation, and all rows of another tenth for test.
              `seed` draws the items, independent of the order of the rows. Each part's rows are shuffled.
            - `"months"` uses the calendar months of `source.months` in order of time. Rows of other months are unused.
        rows: the rows, as `SPLITS[kind].rows_of(source).load` returns them.
        source: the source of the rows.
        seed: 0 to 2**32 - 1; `"time"` and `"months"` ignore it.

    Raises:
        ValueError: the kind is unknown; the rows have no times for a split by time; the source has no months for a
            split by months; there are fewer than 10 rows or items; or a month has no rows. No part is ever empty.
    """
    parts = find_split(kind).deal(rows, source, seed)
    return {name: part.astype(np.int64) for name, part in zip(_PARTS, parts, strict=True)}


def find_split(kind: str) -> Split:
    """Returns the split with this name. An unknown name raises a ValueError that lists the names."""
    if kind not in SPLITS:
        raise ValueError(f"unknown split {kind!r}: choose one of {', '.join(SPLITS)}")
    return SPLITS[kind]


def load_splits(source_name: str, split: str, seed: int, histories: Sequence[HistoryField] = ()) -> DatasetDict:
    """Loads the dataset `source_name` of `DATASETS` and splits it as `split_indices` describes.

    Each history (one of the source's) becomes a column with what the row's user did in strictly earlier rows. The split
    decides which rows a history may hold (`Split.follows_time`).

    Rows that the dataset keeps on disk stay there, in one file per split.

    Raises:
        ValueError: the name or split is unknown, or the rows don't allow the split.
        flip_hf.fetch.FetchError: the dataset can't be downloaded.
    """
    source, way = dataset_source(source_name), find_split(split)
    dataset = way.rows_of(source).load()
    indices = split_indices(split, dataset, source, seed)
    known = np.concatenate(list(indices.values())) if way.follows_time else indices["train"]
    for recipe in histories:
        dataset = _with_history(dataset, recipe, np.isin(np.arange(len(dataset)), known))
    if dataset.cache_files:
        return DatasetDict({name: _picked(dataset, rows, f"{source_name} ({name})") for name, rows in indices.items()})
    # Copied, because a mere selection would have one chunk per row, and every later pass would be slow.
    table = dataset.with_format("arrow")[:]
    return DatasetDict({name: Dataset(table.take(rows)) for name, rows in indices.items()})


def _picked(dataset: Dataset, rows: np.ndarray, source: str) -> Dataset:
    """Writes the rows with these numbers, in this order, to a file of their own."""
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
