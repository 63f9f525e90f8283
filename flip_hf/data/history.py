"""What a user did before each impression, from strictly earlier rows only."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import update_fingerprint

from flip_hf.data.ragged import places as ragged_places
from flip_hf.data.schema import InputError

# A chunk of Arrow strings holds at most 2 GiB, which the histories of a large log exceed.
_CHUNK_VALUES = 1 << 20


def earlier_positions(
    groups: np.ndarray, times: np.ndarray, eligible: np.ndarray, max_values: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the last eligible rows of its group whose time is strictly smaller.

    Rows of one time never see each other; a history is in the order of time, and of the rows where times are equal.

    Args:
        groups: int64 (rows,), whose row it is.
        times: (rows,), numbers or dates, of any one unit.
        eligible: bool (rows,), which rows may be part of a history.
        max_values: most rows of a history, at least 1.

    Returns:
        Where each row's history begins and ends, int64 (rows + 1,); and the numbers of the rows in it, oldest first,
        int64 (offsets[-1],).

    Raises:
        ValueError: a time is NaN or NaT, or `max_values` is less than 1.
    """
    if max_values < 1:
        raise ValueError(f"max_values={max_values} must be at least 1")
    # Only NaN and NaT differ from themselves.
    unknown = times != times
    if unknown.any():
        raise ValueError(f"row {int(unknown.argmax())} has no time")
    order = np.lexsort((times, groups))
    sorted_groups, sorted_times = groups[order], times[order]
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = sorted_groups[1:] != sorted_groups[:-1]
    new_time = new_group.copy()
    new_time[1:] |= sorted_times[1:] != sorted_times[:-1]
    places = np.arange(len(order))
    group_starts = np.maximum.accumulate(np.where(new_group, places, 0))
    time_starts = np.maximum.accumulate(np.where(new_time, places, 0))
    # How many eligible rows come before each place.
    before = np.append(0, eligible[order].cumsum())
    ends = before[time_starts]
    starts = np.maximum(ends - max_values, before[group_starts])

    lengths = np.empty(len(order), dtype=np.int64)
    lengths[order] = ends - starts
    first = np.empty(len(order), dtype=np.int64)
    first[order] = starts
    return np.append(0, lengths.cumsum()), order[eligible[order]][ragged_places(first, lengths)]


def add_history(
    dataset: datasets.Dataset,
    name: str,
    *,
    user: str,
    item: str,
    time: str,
    eligible: np.ndarray | None = None,
    max_values: int = 50,
) -> datasets.Dataset:
    """The dataset with a further column: the items of the user's earlier rows, the most recent last.

    A history holds rows of strictly smaller time only, so neither the row's own label nor anything later can leak into
    it. Which earlier rows were known when a row was shown is the caller's to say, by `eligible`.

    Args:
        dataset: the log, its rows in any order.
        name: the new column, a list of values of the type of `item`.
        user: the column that says whose row it is, strings or ints; a row without a user has an empty history.
        item: the column that the history is made of.
        time: the column of the rows' times: numbers or dates.
        eligible: bool (rows,), which rows may be part of a history, such as those that were liked; by default all.
        max_values: most items of a history.

    Raises:
        InputError: a column is missing or `name` is one already, or a time is missing.
        ValueError: `eligible` has not one value a row, or `max_values` is less than 1.
    """
    if eligible is not None and len(eligible) != len(dataset):
        raise ValueError(f"eligible has {len(eligible)} values, but there are {len(dataset)} rows")
    for column in (user, item, time):
        if column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise InputError(f"the column is missing; the columns there are: {there}", field=column)
    if name in dataset.column_names:
        raise InputError("the column is there already; choose another name for the history", field=name)
    table = dataset.with_format("arrow")[:]
    times = table[time].combine_chunks()
    unknown = pc.is_null(times, nan_is_null=True).to_numpy(zero_copy_only=False)
    if unknown.any():
        raise InputError("a row without a time has no history; drop it", field=time, row=int(unknown.argmax()))
    users = table[user].combine_chunks().dictionary_encode()
    known = pc.is_valid(users.indices).to_numpy(zero_copy_only=False)
    # Rows without a user are a group of which none may be part.
    groups = pc.fill_null(users.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    may_be_part = known if eligible is None else known & np.asarray(eligible, dtype=bool)
    offsets, rows = earlier_positions(groups, times.to_numpy(zero_copy_only=False), may_be_part, max_values)

    items = table[item].combine_chunks()
    rows_per_chunk = max(1, _CHUNK_VALUES // max_values)
    chunks = []
    for start in range(0, len(dataset), rows_per_chunk):
        bounds = offsets[start : start + rows_per_chunk + 1]
        values = items.take(pa.array(rows[bounds[0] : bounds[-1]]))
        chunks.append(pa.ListArray.from_arrays(pa.array((bounds - bounds[0]).astype(np.int32)), values))
    history = pa.chunked_array(chunks, type=pa.list_(items.type))
    features = datasets.Features({**dataset.features, name: datasets.List(dataset.features[item])})
    # Without a fingerprint, Dataset would join the chunks and hash all values, which is slow and may overflow.
    arguments = {"name": name, "user": user, "item": item, "time": time, "rows": may_be_part, "max_values": max_values}
    fingerprint = update_fingerprint(dataset._fingerprint, add_history, arguments)
    return datasets.Dataset(table.append_column(name, history).cast(features.arrow_schema), fingerprint=fingerprint)
