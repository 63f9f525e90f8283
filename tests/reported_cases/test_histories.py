"""Histories hold strictly earlier rows of the same user, whatever types the columns have."""

import datetime

import numpy as np
import pytest
from datasets import Dataset

from flip_hf.data.history import add_history
from flip_hf.data.schema import InputError

NAMES = {"user": "user", "item": "item", "time": "time"}


def seen(**columns):
    return add_history(Dataset.from_dict(columns), "seen", **NAMES)["seen"][:]


def test_times_of_digits_are_refused_as_strings_and_sorted_as_numbers():
    log = {"user": ["ann"] * 3, "item": ["at9", "at10", "at100"]}
    with pytest.raises(InputError, match="field 'time', row 0, value '9'"):
        seen(**log, time=["9", "10", "100"])
    assert seen(**log, time=[9, 10, 100]) == [[], ["at9"], ["at9", "at10"]]


def test_iso_times_with_zones_are_instants():
    times = ["2024-05-31T12:00:00+02:00", "2024-05-31T11:00:00+00:00", "2024-05-31T11:30:00+02:00"]
    assert seen(user=["ann"] * 3, item=["second", "third", "first"], time=times) == [
        ["first"],
        ["first", "second"],
        [],
    ]


def test_times_in_formats_that_differ_are_refused():
    times = ["2024-05-31", "31.05.2024"]
    with pytest.raises(InputError, match=r"field 'time', row 1, value '31.05.2024'"):
        seen(user=["ann"] * 2, item=["f1", "f2"], time=times)


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_rows_with_a_nan_user_share_no_history(missing):
    log = {"user": [missing, missing, 7.0], "item": ["f1", "f2", "f3"], "time": [1, 2, 3]}
    assert seen(**log) == [[], [], []]


@pytest.mark.parametrize("missing", ["", "  "])
def test_rows_with_an_empty_user_share_no_history(missing):
    assert seen(user=[missing, missing, "ann"], item=["f1", "f2", "f3"], time=[1, 2, 3]) == [[], [], []]


def test_a_user_is_the_same_with_and_without_spaces():
    assert seen(user=["ann", "ann "], item=["f1", "f2"], time=[1, 2]) == [[], ["f1"]]


def test_eligible_strings_are_refused():
    dataset = Dataset.from_dict({"user": ["ann"] * 3, "item": ["f1", "f2", "f3"], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match="eligible must hold one Boolean per row"):
        add_history(dataset, "seen", **NAMES, eligible=["0", "1", "0"])
    found = add_history(dataset, "seen", **NAMES, eligible=np.array([False, True, False]))
    assert found["seen"][:] == [[], [], ["f2"]]


def test_a_missing_item_is_in_no_history():
    assert seen(user=["ann"] * 3, item=["f1", None, "f3"], time=[1, 2, 3])[2] == ["f1"]


def test_no_types_of_time_user_and_item_let_a_row_see_itself_or_later_rows():
    import pyarrow as pa
    from test_history import ITEMS, TIMES, USERS, brute_force

    times, users, items = [2, 0, 1, 2, 1, -1], [1, 1, None, 1, 0, 0], [5, None, 6, 7, 8, 9]
    may = [u is not None and i is not None for u, i in zip(users, items, strict=True)]
    expected = brute_force(users, times, may, 2)
    for i, (time, as_times) in enumerate(TIMES.items()):
        user, item = (sorted(kinds)[i % len(kinds)] for kinds in (USERS, ITEMS))
        columns = {"user": USERS[user](users), "item": ITEMS[item](items), "time": as_times(times)}
        found = add_history(Dataset(pa.table(columns)), "seen", **NAMES, max_values=2)["seen"][:]
        values = columns["item"].to_pylist()
        assert found == [[values[j] for j in history] for history in expected], (time, user, item)


def test_dates_and_timestamps_are_times():
    moment = datetime.datetime(2024, 5, 31, tzinfo=datetime.UTC)
    times = [moment + datetime.timedelta(microseconds=1), moment]
    assert seen(user=["ann"] * 2, item=["f1", "f2"], time=times) == [["f2"], []]
