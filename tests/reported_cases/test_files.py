"""Reported cases of files: quotes that swallow rows, folders and remote places, and a cache that kept old labels."""

import bz2
import functools
import http.server
import json
import os
import threading

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_hf import FieldConfig, FlipProcessor
from flip_hf.data.schema import InputError
from flip_hf.runs.data import open_click_log_file

FIELDS = [FieldConfig("user"), FieldConfig("title")]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(place, **form):
    """What training reads of a place."""
    if form:
        from flip_hf.data.csv_files import CSVFormat

        found = open_click_log_file(place, FIELDS, "label", CSVFormat(**form))
    else:
        found = open_click_log_file(place, FIELDS, "label")
    return found.with_format(None)[:]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


SWALLOWING = 'user\ttitle\tlabel\n1\t"Heat\t1\n2\tFargo\t0\n3\tAlien"\t1\n'


def test_a_tsv_value_that_begins_with_a_quote_asks_for_csv_quote(tmp_path):
    path = write(tmp_path / "a.tsv", SWALLOWING)
    with pytest.raises(InputError) as caught:
        rows_of(path)
    assert f"""{path}, field 'title', row 0, value '"Heat': the value starts with a quote""" in str(caught.value)
    assert "csv.quote: true" in str(caught.value)
    assert "csv.quote: false" in str(caught.value)


def test_three_tsv_rows_between_two_quotes_are_three_rows(tmp_path):
    found = rows_of(write(tmp_path / "a.tsv", SWALLOWING), quote=False)
    assert (found["title"], found["label"]) == (['"Heat', "Fargo", 'Alien"'], ["1", "0", "1"])


def test_with_quoting_off_weird_al_stays_as_it_is(tmp_path):
    found = rows_of(write(tmp_path / "a.tsv", 'user\ttitle\tlabel\n1\t"Weird Al" Yankovic\t1\n'), quote=False)
    assert found["title"] == ['"Weird Al" Yankovic']


def test_quoted_tsv_of_pandas_is_read_right_with_quoting_on_and_refused_without(tmp_path):
    titles = ["Heat\tand dust", 'The "real" Fargo', "plain", "two\nlines"]
    frame = pd.DataFrame({"user": [1, 2, 3, 4], "title": titles, "label": [1, 0, 1, 0]})
    path = write(tmp_path / "a.tsv", frame.to_csv(sep="\t", index=False))
    assert rows_of(path, quote=True)["title"] == titles
    with pytest.raises(InputError, match=r"csv\.quote"):
        rows_of(path)


def test_a_quoted_csv_value_that_swallows_rows_is_refused_unless_quoting_was_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", SWALLOWING.replace("\t", ","))
    with pytest.raises(InputError, match=r"row 0, .*lines that look like rows; set csv\.quote: true"):
        rows_of(path)
    assert rows_of(path, quote=True)["title"] == ["Heat,1\n2,Fargo,0\n3,Alien"]
    assert rows_of(path, quote=False)["title"] == ['"Heat', "Fargo", 'Alien"']


SPARK = 'user,title,label\n1,"a \\"b\\" c",1\n2,"C:\\\\x, \\"y\\"",0\n3,C:\\z,0\n'


def test_quotes_that_spark_escaped_ask_for_csv_escape(tmp_path):
    with pytest.raises(InputError, match=r"field 'title', row 0, .*a backslash stands before a quote; set csv\.escape"):
        rows_of(write(tmp_path / "a.csv", SPARK))


def test_quotes_that_spark_escaped_are_read_right_with_csv_escape(tmp_path):
    found = rows_of(write(tmp_path / "a.csv", SPARK), escape="\\")
    assert found["title"] == ['a "b" c', 'C:\\x, "y"', "C:\\z"]


@pytest.mark.parametrize("value", ['"ab"c', '""ab', '"ab" ', ' "ab"'])
def test_a_stray_quote_that_can_be_read_in_two_ways_is_refused(tmp_path, value):
    path = write(tmp_path / "a.csv", f"user,title,label\n1,x,1\n2,{value},1\n")
    with pytest.raises(InputError, match=r"field 'title', row 1, .*set csv\.quote: false"):
        rows_of(path)
    assert rows_of(path, quote=False)["title"] == ["x", value]


def test_na_and_null_are_values_with_one_warning_that_counts_them(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "user,title,label\nNA,null,1\nNA,,0\n")
    # The second time from what is kept of the file.
    for _ in range(2):
        caplog.clear()
        found = rows_of(path)
        assert (found["user"], found["title"][0]) == (["NA", "NA"], "null")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "field 'user': NA (2); field 'title': null (1)" in warning
        assert 'csv.null_values: [NA, "null"]' in warning


def test_null_values_are_missing(tmp_path, caplog):
    found = rows_of(write(tmp_path / "a.csv", "user,title,label\nNA,null,1\nNA,x,0\n"), null_values=["NA"])
    assert (found["user"], found["title"]) == ([None, None], ["null", "x"])
    assert not caplog.records


def test_a_folder_of_spark_is_read_without_its_markers(tmp_path):
    for part in (1, 0):
        write(tmp_path / "log" / f"part-0000{part}.csv", f"user,title,label\n{part},x,1\n")
        write(tmp_path / "log" / f".part-0000{part}.csv.crc", "crc")
    write(tmp_path / "log" / "_SUCCESS", "")
    assert rows_of(tmp_path / "log")["user"] == ["0", "1"]
    assert rows_of(str(tmp_path / "log" / "part-*.csv"))["user"] == ["0", "1"]
    assert rows_of([tmp_path / "log" / f"part-0000{part}.csv" for part in (1, 0)])["user"] == ["1", "0"]


def test_hive_partitions_are_columns_of_strings_as_their_folders_name_them(tmp_path):
    for user in ("007", "7", "2024-01-01", "a%3Ab"):
        folder = tmp_path / "log" / f"user={user}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"title": ["x"], "label": [1]}), folder / "a.parquet")
    assert rows_of(tmp_path / "log")["user"] == ["007", "2024-01-01", "7", "a:b"]


@pytest.mark.parametrize(("suffix", "pack"), [("bz2", bz2.compress), ("zst", pa.Codec("zstd").compress)])
def test_compressed_files_are_read(tmp_path, suffix, pack):
    path = write(tmp_path / f"a.csv.{suffix}", bytes(pack(b"user,title,label\n1,x,1\n")))
    assert rows_of(path) == {"user": ["1"], "title": ["x"], "label": ["1"]}


def test_files_of_one_folder_with_different_columns_are_refused_by_name(tmp_path):
    write(tmp_path / "a.csv", "user,title,label\n1,x,1\n")
    write(tmp_path / "b.csv", "user,name,label\n1,x,1\n")
    with pytest.raises(InputError, match=f"^{tmp_path}/b.csv, field 'name': this file has this column and"):
        rows_of(tmp_path)


@pytest.fixture
def server(tmp_path):
    """The address of a server of `tmp_path` over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_files_are_read_over_http(tmp_path, server):
    write(tmp_path / "a.csv", "user,title,label\n1,x,1\n")
    pq.write_table(pa.table({"user": [2], "title": ["y"], "label": [0]}), tmp_path / "b.parquet")
    assert rows_of(f"http://{server}/a.csv?signature=secret") == {"user": ["1"], "title": ["x"], "label": ["1"]}
    assert rows_of(f"http://{server}/b.parquet") == {"user": [2], "title": ["y"], "label": [0]}
    with pytest.raises(InputError, match="404") as caught:
        rows_of(f"http://me:secret@{server}/gone.csv?signature=secret")
    assert "secret" not in str(caught.value)


def test_folders_are_read_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/reported/user=1/a.csv", b"title,label\nx,1\n")
    memory.pipe("/reported/user=2/a.csv", b"title,label\ny,0\n")
    memory.pipe("/reported/_SUCCESS", b"")
    assert rows_of("memory://reported") == {"user": ["1", "2"], "title": ["x", "y"], "label": ["1", "0"]}


def test_an_error_names_the_file_and_the_row_in_it(tmp_path, wordpiece):
    write(tmp_path / "a.csv", "user,price\n1,1\n2,2\n")
    write(tmp_path / "b.csv", "user,price\n3,3\n4,cheap\n")
    fields = [FieldConfig("user"), FieldConfig("price", kind="numeric")]
    with pytest.raises(InputError, match=f"^{tmp_path}/b.csv, field 'price', row 1, value 'cheap'"):
        FlipProcessor.fit(tmp_path, fields, wordpiece)


def test_an_error_over_a_row_that_training_reads_names_the_file_and_the_row_in_it(tmp_path, wordpiece):
    from flip_hf.runs.data import load_click_log
    from flip_hf.runs.settings import DataSettings

    write(tmp_path / "log" / "a.csv", "user,title,label\n1,x,1\n2,y,0\n")
    write(tmp_path / "log" / "b.csv", "user,title,label\n3,x,1\n4,y,7\n")
    places = {"train_file": str(tmp_path / "log"), "validation_file": tmp_path / "log" / "a.csv"}
    log = load_click_log(DataSettings(**places, fields=["user", "title"]))
    processor = FlipProcessor.fit(log.splits["train"], log.fields, wordpiece, label="label")
    with pytest.raises(InputError, match=f"^{tmp_path}/log/b.csv, field 'label', row 1, value '7'"):
        log.encode(processor, "train")


def test_flipped_labels_are_read_though_size_and_time_stay(tmp_path):
    path = write(tmp_path / "a.csv", "user,title,label\n1,x,1\n2,y,0\n")
    before = path.stat()
    assert rows_of(path)["label"] == ["1", "0"]
    write(path, "user,title,label\n1,x,0\n2,y,1\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert rows_of(path)["label"] == ["0", "1"]


def test_csv_settings_are_part_of_what_a_kept_file_is_known_by(tmp_path):
    path = write(tmp_path / "a.csv", 'user,title,label\n1,"x",1\n')
    assert [rows_of(path, quote=quote)["title"] for quote in (True, False, True)] == [["x"], ['"x"'], ["x"]]


def test_no_credentials_of_a_url_are_in_a_runs_settings():
    from flip_hf.runs.parsing import parse_run
    from flip_hf.runs.settings import FinetuneSettings, as_plain

    files = '["s3://key:secret@bucket/a.csv", "https://host/b.csv?signature=secret"]'
    run = parse_run(FinetuneSettings, ["--output_dir", "x", "--data.train_file", files])
    assert run.data.train_file[1] == "https://host/b.csv?signature=secret"
    assert as_plain(run)["data"]["train_file"] == ["s3://bucket/a.csv", "https://host/b.csv"]
    assert "secret" not in json.dumps(as_plain(run))
