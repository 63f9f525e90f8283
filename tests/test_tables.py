"""Rows in every form that users hold them, and files that are not what they should be."""

import collections
import datetime
import decimal
import gzip
import logging

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flip_hf.data import tables
from flip_hf.data.schema import InputError, canonical_labels, canonical_strings
from flip_hf.data.tables import READERS, read_table, stream_tables, to_table

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
        pytest.param({}, "field 'f': the column is missing; the columns there are: none", id="no columns"),
        pytest.param(datasets.DatasetDict(train=FORMS["dataset"]), "several splits, 'train'; take one", id="splits"),
        pytest.param(pd.DataFrame([[1, 2]], columns=["f", "f"]), "field 'f': the column is there twice", id="pandas"),
        pytest.param(pa.table([[1], [2]], ["f", "f"]), "field 'f': the column is there twice", id="Arrow"),
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
    for rows in ({"f": [1], "b": [1], "a": [[1]]}, [{"a": 1, "b": 1, "f": 1}], [{"f": 1, None: ["left over"]}]):
        with caplog.at_level(logging.WARNING):
            assert to_table(rows, ["f"]).column_names == ["f"]
    assert caplog.messages == [
        "ignoring columns that are not fields: a, b",
        "ignoring columns that are not fields: None",
    ]


def write(path, content):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(content), path, row_group_size=2)
    else:
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv.csv", "A.CSV", "a.tsv", "a.tsv.gz", "a.parquet"])
def test_every_file_gives_the_same_table(name, tmp_path):
    lines = ["x,user,item", "0,007,a", "0,NA,", "0,7, b"]
    content = "\n".join(lines) + "\n"
    if ".tsv" in name and not name.endswith(".csv"):
        content = content.replace(",", "\t")
    if name == "a.parquet":
        content = {"x": [0, 0, 0], "user": ["007", "NA", "7"], "item": ["a", None, " b"]}
    path = write(tmp_path / name, content)
    pieces = list(stream_tables(path, ["item", "user"], optional=["label", "x"], batch_rows=2))
    assert [(piece.column_names, len(piece)) for piece in pieces] == [(["item", "user", "x"], n) for n in (2, 1)]
    table = read_table(str(path), ["item", "user"])
    assert table.column_names == ["item", "user"]
    assert strings(table, "user") == ["007", "NA", "7"]
    assert strings(table, "item") == ["a", None, "b"]


def test_every_reader_is_tested():
    assert set(READERS) == {".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"\xef\xbb\xbff,g\n1,2\n", ["1"], id="byte-order mark"),
        pytest.param(b'\xef\xbb\xbf"f",g\n1,2\n', ["1"], id="byte-order mark and quotes"),
        pytest.param(b'f,g\n"a\nb, ""c""",2\n3,4', ['a\nb, "c"', "3"], id="quoted line break"),
        pytest.param(b'"f",g\r\n1,2\r\n\r\n3,4\r\n', ["1", "3"], id="Windows line breaks"),
        pytest.param(b"f,g\n" + b"x" * 200_000 + b",2\n", ["x" * 200_000], id="long value"),
        pytest.param(b'f,g\n"",2\n,2\nnull,2\n', ["", "", "null"], id="only the empty string is empty"),
        pytest.param(b"f,g\n", [], id="no rows"),
        pytest.param(b"f,g", [], id="no rows and no line break"),
        pytest.param(b"f,g\n\n\n", [], id="empty lines"),
        pytest.param(b"\n\nf,g\n1,2\n", ["1"], id="empty lines before the header"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_what_a_csv_file_may_hold(name, content, expected, tmp_path):
    pieces = list(stream_tables(write(tmp_path / name, content), ["f"], optional=["g"]))
    assert pieces[0].schema.names == ["f", "g"]
    assert pa.concat_tables(pieces)["f"].to_pylist() == expected
    assert pieces[0].schema.field("f").type == pa.string()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", ": the file is empty", id="empty"),
        pytest.param(b"\n\n", ": the file is empty", id="empty lines"),
        pytest.param(b"\xef\xbb\xbf", ": the file is empty", id="only a byte-order mark"),
        pytest.param(
            b"g,h\n1,2\n", ", field 'f': the column is missing; the columns there are: 'g', 'h'", id="missing"
        ),
        pytest.param(b"f,g,f\n1,2,3\n", ", field 'f': the column is there twice", id="column twice"),
        pytest.param(b"f,g\n1,2\n3\n", ", row 1, value '3': the row has 1 values and the header 2", id="short row"),
        pytest.param(b"f,g\n1,2\n\n3,4,5\n", ", row 1, value '3,4,5': the row has 3 values", id="long row"),
        pytest.param(b'f,g\n"1\n1",2\n3\n', ", row 1, value '3': the row has 1 values", id="short after a line break"),
        pytest.param(b"h,g,f\n1,2,3\n1,2,\xff\n", ", field 'f', row 1: not UTF-8", id="not UTF-8"),
        pytest.param(b"f,g\xff\n1,2\n", r", value b'g\xff': the header is not UTF-8", id="header not UTF-8"),
        pytest.param("f,g\n1,2\n".encode("utf-16"), r", value b'\xff\xfef\x00': the header is not UTF-8", id="UTF-16"),
        pytest.param(
            b'"f,g\n' + b"1,2\n" * 40_000, ": not a readable CSV file (field larger", id="header quote left open"
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_what_a_csv_file_may_not_hold(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        list(stream_tables(path, ["f"], optional=["g", "h"]))
    assert str(caught.value).startswith(f"{path}{message}")


def test_csv_rows_are_counted_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_CSV_BLOCK_BYTES", 1000)
    good = b"f,g\n" + b"".join(b'%d,"x\ny"\n' % i for i in range(3000))
    for bad, message in (
        (b"9\n", "row 3000, value '9': the row has 1"),
        (b"\xff,1\n", "field 'f', row 3000: not UTF-8"),
    ):
        read = []
        with pytest.raises(InputError, match=message):
            read.extend(stream_tables(write(tmp_path / "a.csv", good + bad), ["f"], optional=["g"]))
        assert len(read) > 10  # what stood before the bad row came in pieces, none of them the whole file
    path = write(tmp_path / "a.csv", good + b'1,"x\n' + b"1,2\n" * 3000)
    with pytest.raises(InputError, match="a quote is never closed"):
        list(stream_tables(path, ["f"], optional=["g"]))


def test_a_broken_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.csv.gz"
    for data in (b"f\n1\n", gzip.compress(b"f\n" + np.random.default_rng(0).bytes(5000).hex().encode())[:2000]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"^{path}: not a readable CSV file"):
            list(stream_tables(path, ["f"]))


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_truncated_parquet_file_is_named(kept, tmp_path):
    path = write(tmp_path / "a.parquet", {"f": [1, 2, 3]})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"^{path}: not readable as Parquet from row 0 on"):
        list(stream_tables(path, ["f"]))


def test_a_parquet_file_broken_within_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pa.table({"f": [f"{i:05d}" for i in range(4000)]})
    pq.write_table(rows, path, row_group_size=2000, use_dictionary=False, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    read = []
    with pytest.raises(InputError, match=rf"^{path}: not readable as Parquet from row 2000 on"):
        read.extend(stream_tables(path, ["f"], batch_rows=500))
    assert [len(piece) for piece in read] == [500] * 4


def test_a_parquet_column_there_twice_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([[1], [2]], ["f", "f"]), path)
    with pytest.raises(InputError, match=rf"^{path}, field 'f': the column is there twice"):
        read_table(path, ["f"])


def test_a_parquet_file_without_rows_is_one_table(tmp_path):
    content = {"f": pa.nulls(0, pa.int64()), "g": pa.nulls(0, pa.string())}
    (table,) = stream_tables(write(tmp_path / "a.parquet", content), ["g", "f"])
    assert table.schema.names == ["g", "f"]
    assert len(table) == 0


def test_parquet_columns_whose_names_hold_dots(tmp_path):
    path = write(tmp_path / "a.parquet", {"a.b": [1], "a": [2]})
    assert read_table(path, ["a", "a.b"]).to_pydict() == {"a": [2], "a.b": [1]}


def test_a_file_that_is_not_there_or_not_known_is_named_at_once(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/a.csv: there is no such file"):
        stream_tables(tmp_path / "a.csv", ["f"])
    with pytest.raises(InputError, match=r"^a.json: .* \.csv, \.csv\.gz, \.tsv, \.tsv\.gz, \.parquet$"):
        stream_tables("a.json", ["f"])
