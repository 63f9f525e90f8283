"""Rows in every form that users hold them, and files that are not what they should be."""

import collections
import datetime
import decimal
import logging

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from flip_hf.data import tables
from flip_hf.data.schema import InputError, canonical_labels, canonical_strings
from flip_hf.data.tables import to_table

COLUMNS = {"item": ["a", "b", None], "user": [1, 2, 3]}
ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
FORMS = {
    "dicts": ROWS,
    "mappings": [collections.OrderedDict(row) for row in ROWS],
    "dict of lists": COLUMNS,
    "dict of arrays": {"item": np.array(COLUMNS["item"], object), "user": np.array([1, 2, 3], np.int32)},
    "dict of tensors": {"item": tuple(COLUMNS["item"]), "user": torch.tensor([1, 2, 3])},
    "dict of Arrow arrays": {name: pa.array(values) for name, values in COLUMNS.items()},
    "pandas": pd.DataFrame(COLUMNS, index=[7, 7, 9]),
    "pandas nullable": pd.DataFrame(COLUMNS).convert_dtypes(),
    "pandas categories": pd.DataFrame(COLUMNS).astype("category"),
    "pandas objects": pd.DataFrame(COLUMNS, dtype=object),
    "Arrow table": pa.table(COLUMNS),
    "Arrow batch": pa.RecordBatch.from_pydict(COLUMNS),
    "dataset": datasets.Dataset.from_dict(COLUMNS),
    "selected dataset": datasets.Dataset.from_dict({n: [None, *v[::-1]] for n, v in COLUMNS.items()}).select([3, 2, 1]),
    "streamed dataset": datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
}


def strings(table, name):
    return canonical_strings(table[name], name)[0].to_pylist()


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_table(rows):
    table = to_table(rows, ["user", "item"], optional=["label"])
    assert table.column_names == ["user", "item"]
    assert strings(table, "user") == ["1", "2", "3"]
    assert strings(table, "item") == ["a", "b", None]


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS.keys())
def test_a_missing_column_is_named(rows):
    with pytest.raises(InputError, match=r"clicks, field 'genre': the column is missing; .* 'item', 'user'"):
        to_table(rows, ["user", "genre"], optional=["item"], source="clicks")


@pytest.mark.parametrize("format_type", [None, "numpy", "torch", "pandas", "arrow"])
def test_batches_that_datasets_maps_over(format_type):
    seen = []
    dataset = datasets.Dataset.from_dict(COLUMNS).with_format(format_type)
    dataset.map(lambda batch: seen.append(strings(to_table(batch, ["user"], optional=["item"]), "user")), batched=True)
    assert seen == [["1", "2", "3"]]


@pytest.mark.parametrize(
    "row",
    [
        {"user": 1, "item": None, "label": np.float32(1)},
        {"user": torch.tensor(1), "item": pd.NA, "label": True},
        {"user": decimal.Decimal(1), "item": "", "label": [1]},
    ],
    ids=["Python", "tensor", "decimal"],
)
def test_one_row_as_a_dict(row):
    table = to_table(row, ["user", "item"], optional=["label"])
    assert (strings(table, "user"), strings(table, "item")) == (["1"], [None])
    assert canonical_labels(table["label"], "label").tolist() == [1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([1, "1", "01"], ["1", "1", "01"], id="integers and strings"),
        pytest.param([True, "a", None, False], ["true", "a", None, "false"], id="Booleans and strings"),
        pytest.param([True, np.bool_(False), 1], ["true", "false", "1"], id="NumPy Booleans"),
        pytest.param([2**70, -(2**70), 1], [str(2**70), str(-(2**70)), "1"], id="beyond int64"),
        pytest.param([2**64 - 1, -1], [str(2**64 - 1), "-1"], id="uint64 and negative"),
        pytest.param([2**24 + 1, 2**53 + 1, None], [str(2**24 + 1), str(2**53 + 1), None], id="large with a null"),
        pytest.param([2**53 + 1, float("nan")], [str(2**53 + 1), None], id="large with NaN"),
        pytest.param([196.0, float("nan"), None], ["196", None, None], id="null made float"),
        pytest.param([196.0, "a", 7], ["196", "a", "7"], id="floats and strings"),
        pytest.param([np.int64(3), np.float32(4), np.str_("x"), 5], ["3", "4", "x", "5"], id="NumPy scalars"),
        pytest.param([np.float16(3), np.float16(4)], ["3", "4"], id="float16 scalars"),
        pytest.param([torch.tensor(3), torch.tensor(4.0)], ["3", "4"], id="tensors"),
        pytest.param(["a", pd.NA, pd.NaT, float("nan"), 1], ["a", None, None, None, "1"], id="pandas nulls"),
        pytest.param([b"caf\xc3\xa9", "x"], ["café", "x"], id="bytes and strings"),
        pytest.param([datetime.date(2020, 1, 2), "x"], ["2020-01-02", "x"], id="dates and strings"),
        pytest.param([None, None], [None, None], id="nulls"),
        pytest.param([], [], id="no rows"),
    ],
)
@pytest.mark.parametrize("form", ["dicts", "lists", "pandas"])
def test_columns_of_several_types(form, values, expected):
    rows = {
        "dicts": [{"f": v} for v in values],
        "lists": {"f": values},
        "pandas": pd.DataFrame({"f": pd.Series(values, dtype=object)}),
    }[form]
    assert strings(to_table(rows, ["f"]), "f") == expected


@pytest.mark.parametrize(
    ("values", "row", "reason"),
    [
        pytest.param([1, 2.5], 1, "value 2.5: an id must be a whole number", id="fraction"),
        pytest.param(["a", float("inf")], 1, "value inf: an id must be a whole number", id="infinity"),
        pytest.param(["a", 2.0**53], 1, "value 9007199254740992.0: too large to be exact", id="too large"),
        pytest.param(["a", np.float32(2**24)], 1, "value 16777216.0: too large to be exact", id="float32 too large"),
        pytest.param(["a", b"\xff"], 1, "not UTF-8", id="bytes"),
        pytest.param([b"a", b"\xff"], 1, "not UTF-8", id="only bytes"),
        pytest.param(["a", "\ud800"], 1, "half of a surrogate pair", id="surrogate"),
        pytest.param([1, 2, [3]], 2, "one value per row", id="list"),
        pytest.param([[1], [2, "a"]], 0, "one value per row", id="lists"),
        pytest.param([{"a": 1}], 0, "one value per row", id="dict"),
        pytest.param([np.zeros(2)], 0, "one value per row", id="array"),
        pytest.param([1, torch.zeros(2)], 1, "one value per row", id="tensor"),
        pytest.param([1, object()], 1, "can't be of type object", id="object"),
        pytest.param([1, 10**5000], 1, "can't be of type int", id="more digits than Python writes"),
    ],
)
@pytest.mark.parametrize("form", ["dicts", "pandas"])
def test_a_value_that_is_no_id_is_named(form, values, row, reason):
    rows = [{"f": v} for v in values] if form == "dicts" else pd.DataFrame({"f": pd.Series(values, dtype=object)})
    with pytest.raises(InputError, match=reason) as caught:
        canonical_strings(to_table(rows, ["f"], first_row=10, source="clicks")["f"], "f", first_row=10, source="clicks")
    assert str(caught.value).startswith(f"clicks, field 'f', row {10 + row}, value ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([{"f": 1}, {}], "field 'f', row 1: the row lacks this field", id="row without a key"),
        pytest.param([{"f": 1, "o": 1}, {"f": 1}], "field 'o', row 1: the row lacks", id="row without an optional key"),
        pytest.param([{"f": 1}, 5], "row 1, value 5: a row must be a dict", id="row that is no dict"),
        pytest.param("abc", "row 0, value 'a': a row must be a dict", id="string"),
        pytest.param(None, "value None: rows must be a list of dicts", id="None"),
        pytest.param({"f": [1, 2], "o": [1]}, "'f' has 2, 'o' has 1 values", id="ragged"),
        pytest.param({"f": {0: 1, 1: 2}}, "field 'f', value {0: 1, 1: 2}: a column must be a list", id="dict of dicts"),
        pytest.param({}, "field 'f': the column is missing; the columns are: none", id="no columns"),
        pytest.param(datasets.DatasetDict(train=FORMS["dataset"]), "several splits, 'train'; select one", id="splits"),
        pytest.param(pd.DataFrame([[1, 2]], columns=["f", "f"]), "field 'f': the column occurs twice", id="pandas"),
        pytest.param(pa.table([[1], [2]], ["f", "f"]), "field 'f': the column occurs twice", id="Arrow"),
    ],
)
def test_rows_that_are_no_table(rows, message):
    with pytest.raises(InputError) as caught:
        to_table(rows, ["f"], optional=["o"])
    assert message in str(caught.value)


@pytest.mark.parametrize("rows", [[], {"f": []}, pd.DataFrame({"f": []}), pa.table({"f": pa.nulls(0)})])
def test_no_rows_are_a_table(rows):
    table = to_table(rows, ["f"])
    assert (table.column_names, len(table), strings(table, "f")) == (["f"], 0, [])


def test_extra_columns_are_ignored_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(tables, "_already_ignored", set())
    for rows in (
        {"f": [1], "": [1]},
        {"f": [1], "b": [1], "a": [[1]]},
        [{"a": 1, "b": 1, "f": 1}],
        [{"f": 1, None: ["left over"]}],
    ):
        with caplog.at_level(logging.WARNING):
            assert to_table(rows, ["f"]).column_names == ["f"]
    assert caplog.messages == [
        "ignoring columns that are not fields: ''",
        "ignoring columns that are not fields: 'a', 'b'",
        "ignoring columns that are not fields: 'None'",
    ]
