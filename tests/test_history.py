"""A history holds what the user did strictly before the impression, and nothing else."""

import datetime
import decimal
import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_hf.data.history import add_history, earlier_positions, time_ranks
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


@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.timestamp("s")])
def test_no_rows_have_ranks_of_the_same_type(kind):
    ranks = time_ranks(pa.nulls(0, kind), "time")
    assert (ranks.dtype, ranks.shape) == (np.int64, (0,))


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


@pytest.mark.parametrize(
    ("items", "seen"),
    [(["f1", None, " ", "f4"], ["f1"]), ([1.5, float("nan"), None, 4.0], [1.5]), ([[1], None], [[1]])],
)
def test_an_item_that_is_missing_is_in_no_history(items, seen):
    size = len(items)
    log = {"user": ["ann"] * size, "item": items, "time": range(size)}
    assert add_history(Dataset.from_dict(log), "seen", **NAMES, max_values=2)["seen"][size - 1] == seen


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
    with pytest.raises(InputError, match="field 'label': the column exists already"):
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


START = datetime.datetime(2024, 2, 28, 23, 59, 58)
"""Steps of a second from here cross a leap day."""


def numbers_as(kind):
    return lambda times: pa.array(np.array(times, dtype=kind))


def decimals(times):
    return pa.array([decimal.Decimal(t) / 100 for t in times], pa.decimal128(12, 2))


def dates_as(kind):
    return lambda times: pa.array([START.date() + datetime.timedelta(t) for t in times], kind)


def moments_as(unit, zone=None):
    tick = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    # A second apart, or where the unit allows, a tick apart, far from 1970: a float64 could not tell them apart.
    return lambda times: pa.array([int(START.timestamp()) * tick + t for t in times], pa.timestamp(unit, zone))


def texts_as(show, kind=None):
    def build(times):
        texts = pa.array([show(t) for t in times], kind or pa.string())
        return texts.dictionary_encode() if kind is None and len(times) % 2 else texts

    return build


def zoned(time):
    hours = time % 5 - 2
    moment = START + datetime.timedelta(seconds=time, hours=hours)
    return moment.isoformat() + ("Z" if hours == 0 else f"{hours:+03d}:00")


TIMES = {
    **{kind: numbers_as(kind) for kind in ("i1", "i2", "i4", "i8", "f2", "f4", "f8")},
    **{
        f"u{size}": (lambda kind: lambda times: pa.array(np.array(times) + 100, kind))(f"uint{8 * size}")
        for size in (1, 2, 4, 8)
    },
    "int64 beyond a double": lambda times: pa.array([2**60 + t for t in times], pa.int64()),
    "uint64 beyond int64": lambda times: pa.array([2**63 + 100 + t for t in times], pa.uint64()),
    "decimal128": decimals,
    "decimal256": lambda times: pa.array([decimal.Decimal(10**45 + t) for t in times], pa.decimal256(50, 0)),
    "date32": dates_as(pa.date32()),
    "date64": dates_as(pa.date64()),
    **{
        f"{unit} {zone}": moments_as(unit, zone)
        for unit in ("s", "ms", "us", "ns")
        for zone in (None, "UTC", "Asia/Tokyo")
    },
    "duration": lambda times: pa.array(times, pa.duration("ms")),
    "dates as text": texts_as(lambda t: (START.date() + datetime.timedelta(t)).isoformat()),
    "T": texts_as(lambda t: (START + datetime.timedelta(seconds=t)).isoformat()),
    "space": texts_as(lambda t: str(START + datetime.timedelta(seconds=t)), pa.large_string()),
    "fractions": texts_as(lambda t: f"2024-05-31 17:05:09.{500000000 + t}", pa.string_view()),
    "short fractions": texts_as(lambda t: (START + datetime.timedelta(milliseconds=t * 100)).isoformat()),
    "zones": texts_as(zoned),
}
USERS = {
    "string": lambda users: pa.array([None if u is None else f" u{u}" for u in users], pa.string()),
    "large_string": lambda users: pa.array(["" if u is None else f"u{u}" for u in users], pa.large_string()),
    "dictionary": lambda users: pa.array(
        [None if u is None else f"u{u}" for u in users], pa.string()
    ).dictionary_encode(),
    "int": lambda users: pa.array(users, pa.int32()),
    "float": lambda users: pa.array([float("nan") if u is None else u for u in users], pa.float64()),
    "decimal": lambda users: pa.array([None if u is None else decimal.Decimal(u) for u in users], pa.decimal128(5, 2)),
    "date": lambda users: pa.array(users, pa.date32()),
    "bytes": lambda users: pa.array([None if u is None else str(u).encode() for u in users], pa.binary()),
}
ITEMS = {
    "string": lambda items: pa.array([None if i is None else f"f{i}" for i in items], pa.string()),
    "view": lambda items: pa.array([None if i is None else f"f{i}" for i in items], pa.string_view()),
    "int": lambda items: pa.array(items, pa.int16()),
    "float": lambda items: pa.array([float("nan") if i is None else i for i in items], pa.float32()),
    "bool": lambda items: pa.array([None if i is None else i % 2 == 0 for i in items], pa.bool_()),
    "decimal": lambda items: pa.array([None if i is None else decimal.Decimal(i) for i in items], pa.decimal128(5, 2)),
    "timestamp": lambda items: pa.array(items, pa.timestamp("us")),
    "list": lambda items: pa.array([None if i is None else [i] for i in items], pa.list_(pa.int64())),
    "struct": lambda items: pa.array([None if i is None else {"i": i} for i in items], pa.struct({"i": pa.int64()})),
}


@st.composite
def typed_logs(draw):
    """Times, users and items as small whole numbers, None where a user or an item is missing; and what may be seen."""
    size = draw(st.integers(1, 16))
    rows = st.tuples(st.integers(-4, 4), st.none() | st.integers(0, 2), st.none() | st.integers(0, 9), st.booleans())
    return draw(st.lists(rows, min_size=size, max_size=size)), draw(st.integers(1, 4))


@pytest.mark.parametrize("time", TIMES)
@settings(max_examples=10, deadline=None)
@given(typed_logs(), st.sampled_from(sorted(USERS)), st.sampled_from(sorted(ITEMS)), st.randoms(use_true_random=False))
def test_no_history_holds_a_row_at_or_after_its_own_time_whatever_the_types(time, log, user, item, random):
    rows, max_values = log
    rows = random.sample(rows, len(rows))
    times, users, items, eligible = (list(column) for column in zip(*rows, strict=True))
    may = [e and u is not None and i is not None for e, u, i in zip(eligible, users, items, strict=True)]
    expected = brute_force(users, times, may, max_values)
    assert all(times[earlier] < times[row] for row, history in enumerate(expected) for earlier in history)
    table = pa.table({"user": USERS[user](users), "item": ITEMS[item](items), "time": TIMES[time](times)})
    found = add_history(Dataset(table), "seen", **NAMES, eligible=eligible, max_values=max_values)
    values = table["item"].to_pylist()
    assert found["seen"][:] == [[values[earlier] for earlier in history] for history in expected]


@pytest.mark.parametrize("time", TIMES)
def test_time_ranks_are_the_order_of_the_times(time):
    times = [3, -4, 0, 3, -3, 1, 0]
    column = TIMES[time](times)
    ranks = time_ranks(pa.chunked_array([column.slice(0, 3), column.slice(3)]), "time")
    assert ranks.dtype == np.int64
    assert np.unique(ranks, return_inverse=True)[1].tolist() == [4, 0, 2, 4, 1, 3, 2]


@pytest.mark.parametrize(
    ("times", "row"),
    [
        (["9", "10", "100"], 0),
        (["20240531", "20240601"], 0),
        (["31.05.2024"], 0),
        (["2024-05-31T17:05"], 0),
        (["2024-05-31T17:05:09.0123456789"], 0),
        (["2024-05-31T17:05:09+25:00"], 0),
        (["2024-05-31", "2024-05-31T00:00:00"], 1),
        (["2024-05-31T00:00:00Z", "2024-05-31T00:00:00"], 1),
        (["2024-02-29", "2023-02-29"], 1),
        (["2024-05-31T24:00:00"], 0),
        ([True, False], 0),
        ([b"2024-05-31"], 0),
        ([[1], [2]], 0),
        ([{"day": 1}], 0),
        ([datetime.time(17, 5)], 0),
    ],
    ids=str,
)
def test_times_that_cannot_be_compared_name_the_column_and_an_example(times, row):
    with pytest.raises(InputError) as caught:
        time_ranks(pa.array(times), "when")
    assert (caught.value.field, caught.value.row, caught.value.value) == ("when", row, times[row])


def test_a_time_of_digits_is_told_what_to_do():
    with pytest.raises(
        InputError, match=r"field 'time', row 0, value '9': not an ISO 8601 time .* convert the column to numbers"
    ):
        add_history(Dataset.from_dict({**LOG, "time": list("987654")}), "seen", **NAMES)


@pytest.mark.parametrize("missing", [[None, 1], ["", "2024-05-31"], ["  ", "2024-05-31"]])
def test_a_missing_time_is_named_whatever_the_type(missing):
    with pytest.raises(InputError, match="field 'time', row 0: the row has no time"):
        time_ranks(pa.array(missing), "time")


MAY = [True, False, True, True, True, False]


@pytest.mark.parametrize(
    "eligible",
    [
        MAY,
        np.array(MAY),
        pa.array(MAY),
        pa.chunked_array([MAY[:2], MAY[2:]]),
        pd.Series(MAY),
        pd.Series(MAY, dtype="boolean"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_eligible_may_be_booleans_of_any_library(eligible):
    found = add_history(Dataset.from_dict(LOG), "seen", **NAMES, eligible=eligible)["seen"][:]
    assert found == add_history(Dataset.from_dict(LOG), "seen", **NAMES, eligible=np.array(MAY))["seen"][:]
    assert found[0] == ["f3", "f4"]


@pytest.mark.parametrize(
    ("eligible", "row"),
    [
        (["0", "1"] * 3, 0),
        ([0, 1] * 3, 0),
        ([1.0] * 6, 0),
        ([True, None] * 3, 1),
        (pd.Series([True, None] * 3, dtype="boolean"), 1),
        (pa.array([True, True, None] * 2), 2),
        (pa.chunked_array([[True] * 4, [None, True]]), 4),
    ],
    ids=itertools.count(),
)
def test_eligible_of_anything_but_booleans_is_refused(eligible, row):
    with pytest.raises(ValueError, match=rf"eligible must hold one Boolean per row; row {row} holds"):
        add_history(Dataset.from_dict(LOG), "seen", **NAMES, eligible=eligible)


def test_eligible_has_one_axis():
    with pytest.raises(ValueError, match="eligible has 2 dimensions"):
        add_history(Dataset.from_dict(LOG), "seen", **NAMES, eligible=np.ones((6, 1), bool))


ADVICE = (
    "convert the column to numbers, dates or timestamps, or write all of its values in one ISO 8601 format: "
    "2024-05-31, 2024-05-31T17:05:09.25 or, with a time zone, 2024-05-31T17:05:09Z"
)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1, None], "row 1: the row has no time, and so no history; drop it"),
        (["x"], f"row 0, value 'x': not an ISO 8601 time (compared as text, '10' would come before '9'); {ADVICE}"),
        (
            ["2024-05-31", "today"],
            f"row 1, value 'today': row 0 holds a date, '2024-05-31', but this row does not; {ADVICE}",
        ),
        (
            ["2024-05-31 00:00:00", "2024-05-31"],
            f"row 1, value '2024-05-31': row 0 holds a time without a zone, '2024-05-31 00:00:00', but this row does "
            f"not; {ADVICE}",
        ),
        (
            ["2024-05-31 00:00:00Z", "2024-05-31 00:00:00"],
            "row 1, value '2024-05-31 00:00:00': row 0 holds a time with a zone, '2024-05-31 00:00:00Z', but this row "
            f"does not; {ADVICE}",
        ),
        (
            ["2024-02-29", "2023-02-29", "2023-02-30"],
            "row 1, value '2023-02-29': there is no such day or time; correct it",
        ),
        ([True, False], f"row 0, value True: a time can't be of type bool; {ADVICE}"),
    ],
    ids=str,
)
def test_an_unreadable_time_is_told_what_to_do(times, message):
    with pytest.raises(InputError) as caught:
        time_ranks(pa.array(times), "when")
    assert str(caught.value) == f"field 'when', {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item": "film"}, "field 'film': the column is missing; the columns are: user, item, time, label"),
        ({"name": "item"}, "field 'item': the column exists already; choose another name for the history"),
        ({"max_values": 0}, "max_values=0 must be a whole number of at least 1"),
        ({"max_values": 1.5}, "max_values=1.5 must be a whole number of at least 1"),
        ({"max_values": True}, "max_values=True must be a whole number of at least 1"),
        ({"max_values": None}, "max_values=None must be a whole number of at least 1"),
        ({"eligible": [True] * 5}, "eligible has 5 values, but there are 6 rows; give one Boolean per row"),
        (
            {"eligible": [[True]] * 6},
            "eligible has 2 dimensions of values, but there are 6 rows; give one Boolean per row",
        ),
        (
            {"eligible": [1.0, 0.0] * 3},
            "eligible must hold one Boolean per row; row 0 holds 1.0 (float64). Use a comparison, such "
            "as labels == 1, and fill in missing values first",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_history_is_told(settings, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        add_history(Dataset.from_dict(LOG), **{"name": "seen", **NAMES, **settings})
    assert str(caught.value) == message


@pytest.mark.parametrize("values_per_chunk", [1, 4, 7])
def test_a_history_may_be_made_of_several_chunks(values_per_chunk, monkeypatch):
    expected = add_history(Dataset.from_dict(LOG), "seen", **NAMES, max_values=3)
    monkeypatch.setattr("flip_hf.data.history._CHUNK_VALUES", values_per_chunk)
    found = add_history(Dataset.from_dict(LOG), "seen", **NAMES, max_values=3)
    assert found["seen"][:] == expected["seen"][:] == [["f3", "f4", "f6"], [], [], ["f3"], ["f2"], ["f3"]]
    assert found.data.column("seen").num_chunks == {1: 6, 4: 6, 7: 3}[values_per_chunk]
    assert found.features == expected.features


def test_datasets_of_other_histories_have_other_fingerprints():
    log = Dataset.from_dict(LOG)
    changes = [{}, {"name": "other"}, {"user": "item"}, {"item": "label"}, {"time": "label"}, {"max_values": 2}]
    changes.append({"eligible": [True] * 5 + [False]})
    fingerprints = [add_history(log, **{"name": "seen", **NAMES, **changed})._fingerprint for changed in changes]
    assert len({log._fingerprint, *fingerprints}) == 1 + len(changes)
    assert add_history(log, "seen", **NAMES)._fingerprint == fingerprints[0]
    assert add_history(log, "seen", **NAMES, eligible=[True] * 6, max_values=50)._fingerprint == fingerprints[0]


def test_what_is_no_dataset_says_how_to_make_one():
    log = Dataset.from_dict(LOG)
    for rows in (log.to_pandas(), log.to_iterable_dataset(), DatasetDict(train=log), log.with_format("arrow")[:], LOG):
        kind = type(rows).__name__
        with pytest.raises(ValueError, match=rf"add_history takes a datasets\.Dataset, not a {kind}\. .*from_pandas"):
            add_history(rows, "seen", **NAMES)
    assert add_history(log, "seen", **NAMES, max_values=np.int64(3)).column_names[-1] == "seen"
