"""Files of rows, and files that are not what they should be."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_hf.data import files
from flip_hf.data.files import READERS, read_table, stream_tables
from flip_hf.data.schema import InputError, canonical_strings


def strings(table, field):
    return canonical_strings(table[field], field)[0].to_pylist()


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
    monkeypatch.setattr(files, "_CSV_BLOCK_BYTES", 1000)
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
