"""A history holds what the user did strictly before the impression, and nothing else."""

import datetime
import itertools

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from flip_hf.data.history import add_history, earlier_positions
from flip_hf.data.schema import InputError

LOG = {
    "user": ["ann", "bob", "ann", "ann", "bob", "ann"],
    "item": ["f1", "f2", "f3", "f4", "f5", "f6"],
    "time": [30, 10, 10, 20, 20, 20],
    "label": [1, 0, 1, 0, 1, 1],
}
NAMES = {"user": "user", "item": "item", "time": "time"}


@st.composite
def logs(draw, distinct_times=False):
    """Groups, times, eligible and max_values of a few rows; few users and times, so that ties are common."""
    size = draw(st.integers(0, 25))
    groups = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    times = (
        draw(st.permutations(range(size)))
        if distinct_times
        else draw(st.lists(st.integers(-3, 4), min_size=size, max_size=size))
    )
    eligible = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    kind = draw(st.sampled_from(["int64", "float64", "datetime64[s]"]))
    columns = np.array(groups, np.int64), np.array(times, np.int64).astype(kind), np.array(eligible, bool)
    return *columns, draw(st.integers(1, 5))


def histories(groups, times, eligible, max_values):
    offsets, rows = earlier_positions(groups, times, eligible, max_values)
    assert offsets.dtype == rows.dtype == np.int64
    assert len(offsets) == len(groups) + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(rows)
    return [rows[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def brute_force(groups, times, eligible, max_values):
    expected = []
    for i in range(len(groups)):
        earlier = [j for j in range(len(groups)) if groups[j] == groups[i] and times[j] < times[i] and eligible[j]]
        expected.append(sorted(earlier, key=lambda j: times[j])[-max_values:])
    return expected


@given(logs())
def test_histories_are_those_of_a_plain_loop(log):
    assert histories(*log) == brute_force(*log)


@given(logs())
def test_a_history_holds_earlier_eligible_rows_of_its_user_only(log):
    groups, times, eligible, _ = log
    for row, history in enumerate(histories(*log)):
        assert (times[history] < times[row]).all()
        assert (groups[history] == groups[row]).all()
        assert eligible[history].all()


@given(logs())
def test_a_long_history_keeps_the_most_recent_rows(log):
    *columns, max_values = log
    whole = histories(*columns, max_values=100)
    assert histories(*log) == [history[-max_values:] for history in whole]


@given(logs(distinct_times=True), st.randoms(use_true_random=False))
def test_permuted_rows_have_permuted_histories(log, random):
    *columns, max_values = log
    order = np.array(random.sample(range(len(columns[0])), len(columns[0])), np.int64)
    expected = histories(*log)
    permuted = histories(*(column[order] for column in columns), max_values)
    assert [order[history].tolist() for history in permuted] == [expected[row] for row in order]


@given(logs())
def test_nothing_at_or_after_a_row_changes_its_history(log):
    *columns, max_values = log
    times = columns[1]
    for row, history in enumerate(histories(*log)):
        kept = np.flatnonzero((times < times[row]) | (np.arange(len(times)) == row))
        alone = histories(*(column[kept] for column in columns), max_values)
        assert kept[alone[kept.tolist().index(row)]].tolist() == history


@pytest.mark.parametrize("times", [np.array([1.0, np.nan]), np.array(["2020-01-01", "NaT"], "datetime64[s]")])
def test_positions_need_all_times(times):
    with pytest.raises(ValueError, match="row 1"):
        earlier_positions(np.zeros(2, np.int64), times, np.ones(2, bool), 5)


def test_a_row_has_the_items_of_the_earlier_rows_of_its_user():
    dataset = add_history(Dataset.from_dict(LOG), "seen", **NAMES)
    assert dataset["seen"][:] == [["f3", "f4", "f6"], [], [], ["f3"], ["f2"], ["f3"]]
    assert dataset.remove_columns("seen")[:] == LOG
    assert dataset.features["seen"] == List(Value("string"))


def test_only_eligible_rows_are_part_of_a_history():
    liked = np.array(LOG["label"]) == 1
    dataset = add_history(Dataset.from_dict(LOG), "liked", **NAMES, eligible=liked)
    assert dataset["liked"][:] == [["f3", "f6"], [], [], ["f3"], [], ["f3"]]


def test_a_history_has_at_most_max_values_items():
    dataset = add_history(Dataset.from_dict(LOG), "seen", **NAMES, max_values=2)
    assert dataset["seen"][0] == ["f4", "f6"]


def test_rows_without_a_user_have_no_history_and_are_in_none():
    log = {**LOG, "user": [None, "bob", None, "ann", "bob", "ann"]}
    assert add_history(Dataset.from_dict(log), "seen", **NAMES)["seen"][:] == [[], [], [], [], ["f2"], []]


def test_users_and_items_may_be_numbers_and_times_dates():
    log = {
        "user": [7, None, 7],
        "item": [1, 2, None],
        "time": [datetime.datetime(2020, 1, day) for day in (1, 2, 3)],
    }
    dataset = add_history(Dataset.from_dict(log), "seen", **NAMES)
    assert dataset["seen"][:] == [[], [], [1]]
    assert dataset.features["seen"] == List(Value("int64"))


def test_an_item_that_is_missing_stays_in_its_place():
    log = {"user": ["ann"] * 3, "item": ["f1", None, "f3"], "time": [1, 2, 3]}
    assert add_history(Dataset.from_dict(log), "seen", **NAMES)["seen"][2] == ["f1", None]


def test_selected_rows_are_the_only_rows():
    selected = Dataset.from_dict(LOG).select([5, 0, 3, 1])
    dataset = add_history(selected, "seen", **NAMES, eligible=np.array([True, True, False, True]))
    assert dataset["item"][:] == ["f6", "f1", "f4", "f2"]
    assert dataset["seen"][:] == [[], ["f6"], [], []]


def test_columns_keep_their_types():
    features = {"user": Value("string"), "item": Value("large_string"), "time": Value("int32")}
    features["label"] = ClassLabel(names=["no", "yes"])
    dataset = Dataset.from_dict(LOG, features=Features(features))
    assert add_history(dataset, "seen", **NAMES).features == {**features, "seen": List(Value("large_string"))}


@pytest.mark.parametrize("dataset", [Dataset.from_dict(LOG).select([]), Dataset.from_dict(LOG).filter(lambda _: False)])
def test_no_rows_have_no_histories(dataset):
    dataset = add_history(dataset, "seen", **NAMES)
    assert len(dataset) == 0
    assert dataset.column_names == [*LOG, "seen"]


@pytest.mark.parametrize("role", NAMES)
def test_a_column_that_is_missing_is_named(role):
    with pytest.raises(InputError, match=r"field 'nothing': the column is missing; .* user, item, time, label"):
        add_history(Dataset.from_dict(LOG), "seen", **{**NAMES, role: "nothing"})


def test_a_history_replaces_no_column():
    with pytest.raises(InputError, match="field 'label': the column is there already"):
        add_history(Dataset.from_dict(LOG), "label", **NAMES)


@pytest.mark.parametrize(
    "times", [[1, 2, None, 3, None, 4], [1.0, 2.0, float("nan"), 3.0, None, 4.0], [datetime.date.min] * 2 + [None] * 4]
)
def test_the_first_row_without_a_time_is_named(times):
    with pytest.raises(InputError, match="field 'time', row 2"):
        add_history(Dataset.from_dict({**LOG, "time": times}), "seen", **NAMES)


def test_eligible_needs_one_value_a_row():
    with pytest.raises(ValueError, match=r"5 .* 6"):
        add_history(Dataset.from_dict(LOG), "seen", **NAMES, eligible=np.ones(5, bool))


def test_a_history_has_room_for_an_item():
    with pytest.raises(ValueError, match="max_values=0"):
        add_history(Dataset.from_dict(LOG), "seen", **NAMES, max_values=0)
