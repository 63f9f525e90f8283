"""Scoring a file: what may be written, in which format, and what is copied."""

import datetime
import gzip
import io
import json
import math
import os
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
from example_runs import script

from flip_hf.runs.settings import PredictSettings
from flip_hf.runs.table_writers import WRITERS, check_output, check_values

TIMES = [datetime.datetime(2024, 1, 31, 10, 0, second) for second in range(5)]
KEPT = {
    "request_id": pa.array([2**53 + 1, 2, None, 4, 5], pa.int64()),
    "session": pa.array(["a,b", 'say "x"', "", None, "é\nü"]),
    "weight": pa.array([0.1, 1e-8, None, 3.5, -1.0], pa.float32()),
    "price": pa.array([Decimal("5.00"), None, Decimal("0.10"), Decimal("1.25"), Decimal("9.99")]),
    "shown_at": pa.array(TIMES, pa.timestamp("us")),
    "is_mobile": pa.array([True, False, None, True, False]),
}
AS_JSON = {
    "request_id": [2**53 + 1, 2, None, 4, 5],
    "session": ["a,b", 'say "x"', "", None, "é\nü"],
    "weight": [0.1, 1e-8, None, 3.5, -1.0],
    "price": ["5.00", None, "0.10", "1.25", "9.99"],
    "shown_at": [f"2024-01-31 10:00:0{second}.000000" for second in range(5)],
    "is_mobile": [True, False, None, True, False],
}


@pytest.fixture
def impressions(tmp_path, click_rows, field_names):
    """A Parquet file of five rows with columns that are no fields."""
    fields = {name: click_rows[name][:5] for name in field_names}
    tags = pa.array([["a"], [], None, ["b", "c"], ["d"]])
    raw = pa.array([b"\xff", b"", None, b"a", b"b"])
    pq.write_table(pa.table({**fields, **KEPT, "tags": tags, "raw": raw}), tmp_path / "impressions.parquet")
    return tmp_path / "impressions.parquet"


def predict(folder, source, output, *flags):
    settings = {"--model": folder, "--input": source, "--output": output, "--precision": "fp32"}
    script("predict")([str(part) for setting in settings.items() for part in setting] + [*flags])


def test_kept_columns_are_copied_as_they_are(ctr_folder, impressions, tmp_path):
    keep = [*KEPT, "tags", "raw", "user_id", "request_id"]
    predict(ctr_folder, impressions, tmp_path / "scores.parquet", "--keep", json.dumps(keep), "--chunk_rows", "2")
    scores, rows = (pq.read_table(path) for path in (tmp_path / "scores.parquet", impressions))
    written = ["row", *keep[:-1], "probability", "id_probability", "text_probability"]
    assert scores.column_names == written
    for name in keep:
        assert scores[name].type == rows[name].type
        assert scores[name].to_pylist() == rows[name].to_pylist()


@pytest.mark.parametrize("ending", WRITERS)
def test_the_name_of_the_output_says_its_format(ctr_folder, impressions, tmp_path, ending):
    keep = json.dumps([*KEPT])
    predict(ctr_folder, impressions, tmp_path / "expected.parquet")
    expected = pq.read_table(tmp_path / "expected.parquet")
    output = tmp_path / "new" / "folder" / f"scores{ending}"
    predict(ctr_folder, impressions, output, "--keep", keep, "--chunk_rows", "2", "--text_budget", "0.5")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert (output.read_bytes()[:2] == b"\x1f\x8b") == ending.endswith(".gz")
    names = ["row", *KEPT, "probability", "id_probability", "text_probability"]
    if ending == ".parquet":
        found = pq.read_table(output).to_pydict()
        assert list(found) == names
        return
    data = gzip.decompress(output.read_bytes()) if ending.endswith(".gz") else output.read_bytes()
    if ".csv" in ending:
        options = pv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False, null_values=[""])
        table = pv.read_csv(
            pa.BufferReader(data), parse_options=pv.ParseOptions(newlines_in_values=True), convert_options=options
        )
        assert table.column_names == names
        found = table.to_pydict()
        for name in ("request_id", "session", "weight", "is_mobile"):
            assert found[name] == AS_JSON[name]
        assert data.decode().splitlines()[1].startswith('0,9007199254740993,"a,b",0.1,5.00,2024-01-31 10:00:00')
    else:
        rows = [json.loads(line) for line in data.decode().splitlines()]
        assert [list(row) for row in rows] == [names] * 5
        found = {name: [row[name] for row in rows] for name in names}
        assert {name: found[name] for name in KEPT} == AS_JSON
    assert found["row"] == list(range(5))
    assert found["id_probability"] == pytest.approx(expected["id_probability"].to_pylist(), abs=1e-6)
    # Of each two rows the text of one is read, and of the last one.
    assert [value is None for value in found["text_probability"]].count(True) == 2


@pytest.mark.parametrize("name", ["scores.tsv", "scores", "scores.csv.zst", "scores.parquet.gz"])
def test_an_unknown_format_is_refused_before_the_model_is_loaded(tmp_path, name):
    with pytest.raises(ValueError, match=r"the name must select a format; end it in one of \.parquet, \.csv, "):
        predict(tmp_path / "no-model", tmp_path / "rows.csv", tmp_path / name)


@pytest.mark.parametrize(("output", "column"), [("scores.csv", "tags"), ("scores.csv", "raw"), ("scores.jsonl", "raw")])
def test_what_a_format_can_not_hold_is_refused_before_scoring(ctr_folder, impressions, tmp_path, output, column):
    with pytest.raises(ValueError, match=rf"field '{column}': a \.\w+ file can't store values .* write \.parquet"):
        predict(ctr_folder, impressions, tmp_path / output, "--keep", f"[{column}]")
    assert [path.name for path in tmp_path.iterdir()] == ["impressions.parquet"]


def test_lists_are_lists_in_json_lines(ctr_folder, impressions, tmp_path):
    predict(ctr_folder, impressions, tmp_path / "scores.jsonl", "--keep", "[tags]")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["tags"] for row in rows] == [["a"], [], None, ["b", "c"], ["d"]]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "list<item: float>", "struct<x: double>"])
def test_json_lines_refuse_infinity_and_hold_nan_as_null(kind):
    def column(value):
        value = np.float16(value) if kind == "float16" else value
        held = {"l": [value], "s": {"x": value}}.get(kind[0], value)
        kinds = {"l": pa.list_(pa.float32()), "s": pa.struct([("x", pa.float64())])}
        return pa.table({"weight": pa.array([held], kinds.get(kind[0]) or getattr(pa, kind)())})

    sink = io.BytesIO()
    with WRITERS[".jsonl"](sink, column(1.5).schema) as writer:
        for value in (1.5, math.nan):
            writer.write_table(column(value))
        first, second = (json.loads(line)["weight"] for line in sink.getvalue().splitlines())
        wrapped = {"l": lambda value: [value], "s": lambda value: {"x": value}}.get(kind[0], lambda value: value)
        assert (first, second) == (wrapped(1.5), wrapped(None))
    for value in (math.inf, -math.inf):
        with pytest.raises(
            ValueError, match=r"^here, field 'weight', row 2, value .*inf.*: .* write \.parquet or \.csv"
        ):
            check_values(".jsonl.gz", column(value), 2, "here")
        check_values(".csv", column(value), 2, "here")
    for value in (1.5, math.nan):
        check_values(".jsonl", column(value), 2, "here")


def test_a_kept_infinity_names_its_row_in_the_file(ctr_folder, click_rows, field_names, tmp_path):
    fields = {name: click_rows[name][:3] for name in field_names}
    for number in range(2):
        weights = [1.0, 2.0, math.inf if number else 3.0]
        pq.write_table(pa.table({**fields, "weight": weights}), tmp_path / f"{number}.parquet")
    source = str(tmp_path / "?.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet, field 'weight', row 2, value inf: JSON can't store infinity"):
        predict(ctr_folder, source, tmp_path / "out" / "scores.jsonl", "--keep", "[weight]")
    assert list((tmp_path / "out").iterdir()) == []
    predict(ctr_folder, source, tmp_path / "out" / "scores.csv", "--keep", "[weight]")
    assert pv.read_csv(tmp_path / "out" / "scores.csv")["weight"].to_pylist() == [1.0, 2.0, 3.0, 1.0, 2.0, math.inf]


def test_kept_columns_of_csv_are_the_text_that_was_there(ctr_folder, click_rows, field_names, tmp_path):
    rows = pa.table({"request_id": ["007", "1e3", ""], **{name: click_rows[name][:3] for name in field_names}})
    pv.write_csv(rows, tmp_path / "rows.csv")
    predict(ctr_folder, tmp_path / "rows.csv", tmp_path / "scores.parquet", "--keep", "[request_id]")
    assert pq.read_table(tmp_path / "scores.parquet")["request_id"].to_pylist() == ["007", "1e3", ""]


def test_what_can_not_be_kept_is_an_error_before_scoring(ctr_folder, impressions, tmp_path):
    output = tmp_path / "scores.parquet"
    with pytest.raises(ValueError, match=r"impressions\.parquet, field 'visit': the column is missing; the columns "):
        predict(ctr_folder, impressions, output, "--keep", "[visit]")
    with pytest.raises(ValueError, match=r"keep: the output has its own column 'probability'; rename"):
        predict(ctr_folder, impressions, output, "--keep", "[probability]")
    assert not output.exists()


@pytest.mark.parametrize("spelling", ["same", "relative", "symlink", "hard link", "through a linked folder"])
def test_the_input_is_never_the_output(impressions, tmp_path, monkeypatch, spelling):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    output = folder / "scores.parquet"
    if spelling == "same":
        output = impressions
    elif spelling == "relative":
        monkeypatch.chdir(folder)
        output = os.path.join("..", impressions.name)
    elif spelling == "symlink":
        output.symlink_to(impressions)
    elif spelling == "hard link":
        output.hardlink_to(impressions)
    else:
        (folder / "link").symlink_to(tmp_path)
        output = folder / "link" / impressions.name
    before = impressions.read_bytes()
    with pytest.raises(ValueError, match=r"output=.* would overwrite the input .*impressions\.parquet;"):
        predict(tmp_path / "no-model", impressions, output)
    assert impressions.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "is_refused"),
    [
        ("FOLDER/a[1].csv", True),
        ("FOLDER/*.csv", True),
        ("FOLDER/**/*.csv", True),
        (["s3://bucket/a.csv", "FOLDER/b.csv", "FOLDER/a[1].csv"], True),
        ("FOLDER", True),
        ("FOLDER/b.csv", False),
        ("FOLDER/b*.csv", False),
        ("https://example.org/a[1].csv", False),
        (None, False),
    ],
)
def test_patterns_folders_and_lists_hold_no_output(tmp_path, place, is_refused):
    for name in ("a[1].csv", "b.csv"):
        (tmp_path / name).write_text("user_id\n1\n")
    parts = [part.replace("FOLDER", str(tmp_path)) for part in (place if isinstance(place, list) else [place or ""])]
    places = [parts if isinstance(place, list) else parts[0] or None]
    if is_refused:
        with pytest.raises(ValueError, match=r"would overwrite the input|is inside the input folder"):
            check_output(tmp_path / "a[1].csv", places)
    else:
        check_output(tmp_path / "a[1].csv", places)


def test_an_output_that_is_there_is_replaced(ctr_folder, impressions, tmp_path):
    output = tmp_path / "scores.csv"
    output.write_text("old")
    predict(ctr_folder, impressions, output)
    assert output.read_text().startswith('"row","probability"')
    (tmp_path / "scores.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"output=.* is a folder; set it to a file"):
        PredictSettings("model", impressions, tmp_path / "scores.jsonl")


def test_ids_that_are_spelled_otherwise_than_in_training_are_warned_of(
    ctr_folder, click_rows, field_names, tmp_path, capsys
):
    rows = {name: click_rows[name][:40] for name in field_names}
    pq.write_table(pa.table({**rows, "user_id": [f"{v}.0" for v in rows["user_id"]]}), tmp_path / "rows.parquet")
    predict(ctr_folder, tmp_path / "rows.parquet", tmp_path / "scores.parquet", "--chunk_rows", "8")
    printed = capsys.readouterr().out.splitlines()
    assert "  user_id: 40 oov" in printed
    (warned,) = [line for line in printed if "rows.parquet, field 'user_id': " in line]
    assert "100% of the rows unseen (0% in training); seen in training: " in warned
    assert warned.endswith(f"here: '{rows['user_id'][0]}.0'")
