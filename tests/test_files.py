"""Files of rows, and files that are not what they should be."""

import bz2
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_hf.data import csv_files
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import READERS, content_of, read_table, shown, stream_tables
from flip_hf.data.schema import InputError, canonical_strings


def strings(table, field):
    return canonical_strings(table[field], field)[0].to_pylist()


def write(path, content):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(content), path, row_group_size=2)
    else:
        data = content if isinstance(content, bytes) else content.encode()
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": pa.Codec("zstd").compress}.get(path.suffix, bytes)
        path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("a.csv", "a.csv.gz", "a.csv.bz2", "a.csv.zst", "a.tsv.csv", "A.CSV", "a.tsv", "a.tsv.gz", "a.tsv.bz2"),
        *("a.tsv.zst", "a.parquet"),
    ],
)
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
    packed = ("", ".gz", ".bz2", ".zst")
    assert set(READERS) == {
        ".parquet",
        *(f".csv{suffix}" for suffix in packed),
        *(f".tsv{suffix}" for suffix in packed),
    }


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
        pytest.param(b"g,h\n1,2\n", ", field 'f': the column is missing; the columns are: 'g', 'h'", id="missing"),
        pytest.param(b"f,g,f\n1,2,3\n", ", field 'f': the column occurs twice", id="column twice"),
        pytest.param(b"f,g\n1,2\n3\n", ", row 1, value '3': the row has 1 values, but the header", id="short row"),
        pytest.param(b"f,g\n1,2\n\n3,4,5\n", ", row 1, value '3,4,5': the row has 3 values", id="long row"),
        pytest.param(b'f,g\n"1\n1",2\n3\n', ", row 1, value '3': the row has 1 values", id="short after a line break"),
        pytest.param(b"h,g,f\n1,2,3\n1,2,\xff\n", ", field 'f', row 1: not UTF-8", id="not UTF-8"),
        pytest.param(b"f,g\xff\n1,2\n", r", value b'g\xff': the header is not UTF-8", id="header not UTF-8"),
        pytest.param("f,g\n1,2\n".encode("utf-16"), r", value b'\xff\xfef\x00': the header is not UTF-8", id="UTF-16"),
        pytest.param(
            b'"f,g\n' + b"1,2\n" * 40_000,
            ": a quote in the header is not closed within 64 lines",
            id="header quote left open",
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
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(csv_files, "_MOST_ROW_BYTES", 8000)
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
        with pytest.raises(InputError, match=rf"^{path}: not readable as CSV from row 0 on"):
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
    with pytest.raises(InputError, match=rf"^{path}, field 'f': the column occurs twice"):
        read_table(path, ["f"])


def test_a_parquet_file_without_rows_is_one_table(tmp_path):
    content = {"f": pa.nulls(0, pa.int64()), "g": pa.nulls(0, pa.string())}
    (table,) = stream_tables(write(tmp_path / "a.parquet", content), ["g", "f"])
    assert table.schema.names == ["g", "f"]
    assert len(table) == 0


def test_a_parquet_file_is_read_a_few_row_groups_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    table = pa.table({"user": list(range(1000))})
    pq.write_table(table, path, row_group_size=100)
    asked, real = [], pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, row_groups, **settings):
        asked.append(row_groups)
        return real(self, batch_size, row_groups, **settings)

    # Arrow holds all row groups that it is asked for in memory.
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    found = list(stream_tables(str(path), ["user"], batch_rows=250))
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert pa.concat_tables(found).equals(table)
    assert max(map(len, found)) == 250


def test_parquet_columns_whose_names_hold_dots(tmp_path):
    path = write(tmp_path / "a.parquet", {"a.b": [1], "a": [2]})
    assert read_table(path, ["a", "a.b"]).to_pydict() == {"a": [2], "a.b": [1]}


def test_a_file_that_is_not_there_or_not_known_is_named_at_once(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/a.csv: there is no such file"):
        stream_tables(tmp_path / "a.csv", ["f"])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match=rf"^{tmp_path}/a.json: .* \.parquet, \.csv, \.csv\.gz, "):
        stream_tables(tmp_path / "a.json", ["f"])


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write(path / name, content)
    return path


def test_folders_and_patterns_are_read_in_the_order_of_their_paths(tmp_path, monkeypatch):
    parts = {f"log/part-{i:02}.csv": f"f\n{i}\n" for i in (10, 2, 1)}
    folder_of(tmp_path, {**parts, "log/deep/z.tsv": "f\n0\n", "log/_SUCCESS": "", "log/.hidden/a.csv": "f\n9\n"})
    monkeypatch.chdir(tmp_path)
    assert read_table("log", ["f"])["f"].to_pylist() == ["0", "1", "2", "10"]
    assert read_table(tmp_path / "log", ["f"])["f"].to_pylist() == ["0", "1", "2", "10"]
    assert read_table("log/part-*.csv", ["f"])["f"].to_pylist() == ["1", "2", "10"]
    assert read_table("l*", ["f"])["f"].to_pylist() == ["0", "1", "2", "10"]
    assert read_table(["log/part-10.csv", "log/deep"], ["f"])["f"].to_pylist() == ["10", "0"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    folder_of(tmp_path, {"a[b].csv": "f\n1\n", "ab.csv": "f\n2\n"})
    assert read_table(tmp_path / "a[b].csv", ["f"])["f"].to_pylist() == ["1"]
    assert read_table(tmp_path / "a[b]*.csv", ["f"])["f"].to_pylist() == ["2"]


@pytest.mark.parametrize("place", ["log", "log/day=*", "log/*/*.csv"])
def test_partitions_are_strings_in_their_place_among_the_columns(tmp_path, monkeypatch, place):
    folder_of(
        tmp_path / "log", {f"day={day}/a.csv": f"f\n{i}\n" for i, day in enumerate(["007", "a%2Fb", "7", HIVE_NULL])}
    )
    monkeypatch.chdir(tmp_path)
    table = read_table(place, ["day", "f"])
    assert table.column_names == ["day", "f"]
    assert sorted(zip(*table.to_pydict().values(), strict=True), key=str) == [
        ("007", "0"),
        ("7", "2"),
        ("a/b", "1"),
        (None, "3"),
    ]
    assert table.schema.field("day").type == pa.string()
    assert read_table(place, ["day"]).num_rows == 4


HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        pytest.param({"log/_SUCCESS": ""}, "log", "log: the folder holds no files", id="only markers"),
        pytest.param({"log/a.csv": "f\n", "log/b.txt": ""}, "log", "log/b.txt: unknown file type", id="other"),
        pytest.param({}, "log/*.csv", "log/*.csv: no file matches the pattern", id="no match"),
        pytest.param({"a.csv": "f\n"}, ["a.csv", "./a.csv"], "a.csv: the file is named twice", id="twice"),
        pytest.param({}, [], "the list of files is empty", id="empty list"),
        pytest.param({}, [""], "a file name is empty", id="empty name"),
        pytest.param({}, "nowhere://a.csv", "nowhere://a.csv: can't be opened: Protocol not known", id="protocol"),
        pytest.param({"log/f=1/a.csv": "f\n1\n"}, "log", "log/f=1/a.csv, field 'f': the column is both", id="both"),
        pytest.param(
            {"log/a.csv": "f\n1\n", "log/b.csv": "f,g\n1,2\n"}, "log", "log/b.csv, field 'g': this file has", id="more"
        ),
        pytest.param(
            {"log/a.csv": "f,g\n1,2\n", "log/b.csv": "f\n1\n"}, "log", "log/b.csv, field 'g': log/a.csv has", id="less"
        ),
        pytest.param(
            {"log/a.csv": "f\n1\n", "log/b.parquet": {"f": [1]}},
            "log",
            "log/b.parquet, field 'f': the column is of type int64 here and of type string in log/a.csv",
            id="types",
        ),
        pytest.param(
            {"log/a.csv": "f\n1\n", "log/b.csv": "f\n1\n2,3\n"}, "log", "log/b.csv, row 1, value '2,3'", id="row"
        ),
    ],
)
def test_places_that_can_not_be_read_are_named(tmp_path, monkeypatch, files, place, message):
    folder_of(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read_table(place, ["f"], optional=["g"])
    assert message in str(caught.value)


def test_a_file_without_values_in_a_column_takes_the_other_files_type(tmp_path):
    files = {"a.parquet": {"f": pa.nulls(1)}, "b.parquet": {"f": ["x"]}, "c.parquet": {"f": pa.nulls(1)}}
    assert read_table(folder_of(tmp_path, files), ["f"]).to_pydict() == {"f": [None, "x", None]}


def test_files_without_rows_among_others_give_no_table(tmp_path):
    folder = folder_of(tmp_path, {"a.csv": "f\n", "b.csv": "f\n1\n", "c.csv": "f\n"})
    assert [len(table) for table in stream_tables(folder, ["f"])] == [1]
    (tmp_path / "b.csv").unlink()
    assert [len(table) for table in stream_tables(folder, ["f"])] == [0]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://key:secret@bucket/log/", "s3://bucket/log/"),
        ("https://me@host/a.csv?token=secret", "https://host/a.csv"),
        ("https://host/a.csv?secret", "https://host/a.csv"),
        ("https://me:sec,re]t@host/a.csv?sig=sec,ret&x=]", "https://host/a.csv"),
        ("--data.train_file=[s3://a/b,s3://me:secret@c/d]", "--data.train_file=[s3://a/b,s3://c/d]"),
        ("simplecache::https://me:secret@host/a.csv", "simplecache::https://host/a.csv"),
        ("s3://bucket/part-?.csv", "s3://bucket/part-?.csv"),
        ("hf://datasets/org/name@main/a.csv", "hf://datasets/org/name@main/a.csv"),
        ("/logs/me@work/a?.csv", "/logs/me@work/a?.csv"),
        (["a.csv", "s3://key:secret@bucket/b.csv"], "a.csv, s3://bucket/b.csv"),
        ("['https://host/a.csv?secret', 's3://k:secret@b/c']", "['https://host/a.csv', 's3://b/c']"),
    ],
)
def test_names_for_people_hold_no_credentials(place, expected):
    assert shown(place) == expected


def test_content_is_known_by_bytes_and_by_how_they_are_read(tmp_path):
    folder = folder_of(tmp_path / "x", {"day=1/a.csv": "f\n1\n", "b.tsv": "f\n1\n"})
    content = content_of(folder / "b.tsv")
    assert content == content_of(write(tmp_path / "c.tsv", "f\n1\n"))
    others = [
        content_of(write(tmp_path / "c.tsv", "f\n2\n")),
        content_of(write(tmp_path / "c.csv", "f\n1\n")),
        content_of(folder / "b.tsv", CSVFormat(quote=True)),
        content_of(folder / "day=1"),
        content_of(folder / "day=*"),
        content_of([folder / "b.tsv", tmp_path / "c.csv"]),
    ]
    assert all(content != other for other in others)
    assert len({str(other) for other in others}) == len(others) - 1  # a CSV file alone and the same in a folder
