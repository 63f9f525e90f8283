"""One value has one spelling, whatever its column's type or its file's format, in training and in serving."""

import datetime
import json
import math
import unicodedata
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from flip_hf import FieldConfig, FlipProcessor
from flip_hf.data.files import read_table
from flip_hf.data.kinds import KINDS
from flip_hf.data.schema import InputError, canonical_labels, canonical_lists, canonical_numbers, canonical_strings
from flip_hf.data.tables import to_table

UNITS = ("s", "ms", "us", "ns")
# Decimal digits that a number of each width gives back.
DIGITS = {pa.float16(): 3, pa.float32(): 6, pa.float64(): 15}


def decimals(digits, least=-4, most=4):
    """Decimal numbers of at most so many digits, of sizes that a float16 has, too."""
    sizes = st.integers(-(10**digits) + 1, 10**digits - 1)
    return st.builds(lambda n, place: Decimal(n).scaleb(min(place, 4 - digits)), sizes, st.integers(least, most))


def plain(number):
    """What the text should show of a number: its digits, without zeros that say nothing."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def numbers_of(column):
    numbers, strings, _ = canonical_numbers(column, "price")
    return [None if math.isnan(n) else n for n in numbers.tolist()], strings.to_pylist()


def ids_of(column):
    return canonical_strings(column, "id")[0].to_pylist()


def number_columns(values, digits):
    """The same numbers as columns of every type that holds them."""
    fields = {
        "decimal": pa.array(values, pa.decimal128(38, 12)),
        "wide decimal": pa.array(values, pa.decimal256(60, 20)),
        "string": pa.array([None if v is None else str(v) for v in values], pa.string()),
        "string view": pa.array(
            [None if v is None else f" {v:f}0" if "." in f"{v:f}" else str(v) for v in values]
        ).cast(pa.string_view()),
        "Python": to_table({"f": [None if v is None else float(v) for v in values]}, ["f"], contents={"f": "numbers"})[
            "f"
        ],
        "Python decimals": to_table({"f": values}, ["f"], contents={"f": "numbers"})["f"],
        "JSON": to_table(
            [{"f": v} for v in json.loads(json.dumps([None if v is None else float(v) for v in values]))],
            ["f"],
            contents={"f": "numbers"},
        )["f"],
    }
    floats = [math.nan if v is None else float(v) for v in values]
    for kind, most in DIGITS.items():
        if digits <= most:
            column = pa.array(np.array(floats, kind.to_pandas_dtype()), from_pandas=True)
            fields[str(kind)] = column
            if kind != pa.float16():
                fields[f"polars {kind}"] = to_table(pl.from_arrow(pa.table({"f": column})), ["f"])["f"]
                fields[f"pandas {kind}"] = to_table(pd.DataFrame({"f": column.to_numpy(zero_copy_only=False)}), ["f"])[
                    "f"
                ]
    scalars = {pa.float16(): np.float16, pa.float32(): np.float32, pa.float64(): np.float64}
    kinds = [kind for kind, most in DIGITS.items() if digits <= most]
    mixed = [scalars[kinds[i % len(kinds)]](v) for i, v in enumerate(floats)]
    fields["scalars of several widths"] = to_table({"f": mixed}, ["f"], contents={"f": "numbers"})["f"]
    return fields


@given(st.data())
@pytest.mark.parametrize("digits", DIGITS.values(), ids=map(str, DIGITS))
def test_a_number_of_every_type_is_one_number_and_one_text(digits, data):
    values = data.draw(st.lists(st.none() | decimals(digits), min_size=1, max_size=8))
    expected = [None if v is None else float(v) + 0.0 for v in values]
    found = {name: numbers_of(column) for name, column in number_columns(values, digits).items()}
    texts = found["decimal"][1]
    for name, (numbers, shown) in found.items():
        assert numbers == expected, name
        assert shown == texts, name
    for value, text in zip(values, texts, strict=True):
        assert text is None if value is None else float(text) == float(value)
        if value is not None and value == value.to_integral_value():
            assert text == plain(value)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_whole_numbers_are_shown_by_their_digits(values):
    columns = [
        pa.array(values, pa.int64()),
        pa.array([str(v) for v in values]),
        pa.array([f"{v}.0" for v in values]),
        pa.array([Decimal(v) for v in values], pa.decimal128(38, 2)),
        to_table({"f": [*values, 0.5]}, ["f"], contents={"f": "numbers"})["f"].slice(0, len(values)),
    ]
    if all(abs(v) < 2**53 for v in values):
        columns += [pa.array([float(v) for v in values]), pa.array([f"{v:e}" for v in map(Decimal, values)])]
    for column in columns:
        numbers, texts = numbers_of(column)
        assert numbers == [float(v) for v in values]
        assert texts == [str(v) for v in values]


@given(st.lists(st.none() | st.integers(-(2**15), 2**15 - 1), min_size=1))
def test_a_whole_number_of_every_type_is_one_id(values):
    expected = [None if v is None else str(v) for v in values]
    floats = np.array([math.nan if v is None else v for v in values])
    columns = {
        str(kind): pa.array(values, kind) for kind in (pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64())
    }
    columns |= {
        "NaN": pa.array(floats),
        "decimal": pa.array([None if v is None else Decimal(v) for v in values], pa.decimal128(20, 3)),
        "string": pa.array(expected, pa.string()),
        "view": pa.array(expected, pa.string_view()),
        "dictionary": pa.array(expected, pa.string()).dictionary_encode(),
        "runs": pa.RunEndEncodedArray.from_arrays(range(1, len(values) + 1), pa.array(expected, pa.string())),
        "Python": to_table({"f": values}, ["f"])["f"],
        "Python floats": to_table({"f": [None if v is None else float(v) for v in values]}, ["f"])["f"],
        "several types": to_table({"f": [v if i % 2 else v and Decimal(v) for i, v in enumerate(values)]}, ["f"])["f"],
        "pandas": to_table(pd.DataFrame({"f": floats}), ["f"])["f"],
        "pandas nullable": to_table(pd.DataFrame({"f": pd.array(values, dtype="Int64")}), ["f"])["f"],
        "polars": to_table(pl.DataFrame({"f": pl.Series(values, dtype=pl.Int64)}), ["f"])["f"],
    }
    for name, column in columns.items():
        assert ids_of(column) == expected, name


times = st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)).map(
    lambda t: t.replace(microsecond=0)
)


@given(st.lists(st.none() | times, min_size=1))
def test_a_time_of_every_unit_is_one_id(values):
    def spelled(value):
        return value and value.isoformat(" ").removesuffix(" 00:00:00")

    expected = [spelled(v) for v in values]
    columns = [pa.array(values, pa.timestamp(unit)) for unit in UNITS]
    columns.append(to_table(pd.DataFrame({"f": pd.Series(values, dtype="datetime64[s]")}), ["f"])["f"])
    columns.append(to_table(pl.DataFrame({"f": pl.Series(values, dtype=pl.Datetime("ms"))}), ["f"])["f"])
    columns.append(to_table({"f": values}, ["f"])["f"])
    for column in columns:
        assert ids_of(column) == expected
    with_zone = [None if v is None else v.isoformat(" ") + "Z" for v in values]
    for unit in UNITS:
        for zone in ("UTC", "Asia/Tokyo", "+03:00"):
            assert ids_of(pa.array(values, pa.timestamp(unit, zone))) == with_zone


@given(st.lists(st.none() | st.dates(datetime.date(1900, 1, 1), datetime.date(2200, 1, 1)), min_size=1))
def test_a_date_of_every_type_is_one_id(values):
    expected = [None if v is None else v.isoformat() for v in values]
    for kind in (pa.date32(), pa.date64(), *map(pa.timestamp, UNITS)):
        assert ids_of(pa.array(values, pa.date32()).cast(kind)) == expected


@given(st.lists(st.text(), min_size=1))
def test_texts_that_unicode_calls_the_same_are_one_id(values):
    expected = [unicodedata.normalize("NFC", v.strip()).strip() or None for v in values]
    for form in ("NFC", "NFD"):
        column = pa.array([unicodedata.normalize(form, v) for v in values])
        assert ids_of(column) == expected
        assert canonical_lists(column, "f", "\0")[0].to_pylist() == [
            part.strip() for v in expected if v for part in v.split("\0") if part.strip()
        ]


@given(st.lists(st.none() | st.lists(st.integers(-9, 9), max_size=4), min_size=1))
def test_a_list_of_every_type_holds_the_same_values(values):
    expected = [str(v) for row in values for v in row or []]
    offsets = np.cumsum([0, *(len(row or []) for row in values)]).tolist()
    kinds = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
    inner = (pa.int8(), pa.int64(), pa.float32(), pa.decimal128(10, 2))
    columns = [pa.array(values, kind(item)) for kind in kinds for item in inner]
    texts = [None if row is None else [str(v) for v in row] for row in values]
    columns += [pa.array(texts, kind(pa.string_view())) for kind in kinds]
    columns.append(pa.array([None if row is None else "|".join(row) for row in texts]))
    columns.append(to_table(pl.DataFrame({"f": pl.Series(values, dtype=pl.List(pl.Int32))}), ["f"])["f"])
    for column in columns:
        strings, bounds, _ = canonical_lists(column, "f", "|")
        assert strings.to_pylist() == expected
        assert bounds.tolist() == offsets


@given(st.lists(st.booleans(), min_size=1))
def test_a_label_of_every_type_is_one_label(values):
    kinds = (
        pa.bool_(),
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.decimal128(5, 2),
        pa.decimal256(5, 0),
    )
    columns = [pa.array([int(v) for v in values], pa.int8()).cast(kind) for kind in kinds]
    columns += [pa.array([spell[v] for v in values]) for spell in ("01", ("0.00", "1.00"), ("False", "TRUE"))]
    columns += [to_table({"f": [Decimal(v) for v in values]}, ["f"])["f"], pl.Series(values).to_arrow()]
    for column in columns:
        assert canonical_labels(column, "label").tolist() == values


FORMATS = ("dicts", "columns", "pandas", "arrow", "polars", "dataset", "Parquet", "CSV", "JSON")


@pytest.mark.parametrize("trained", ["arrow", "CSV"])
def test_a_row_of_every_format_is_encoded_alike(trained, wordpiece, tmp_path):
    random = np.random.default_rng(0)
    rows = {
        "user": random.integers(100, 120, 300).tolist(),
        "price": [round(float(v), 2) for v in random.uniform(0, 50, 300)],
        "seen": [int(v) for v in random.integers(1_700_000_000_000, 1_700_000_000_050, 300)],
        "city": [unicodedata.normalize("NFC", v) for v in random.choice(["Malmö", "Zürich", "Köln"], 300).tolist()],
        "day": [datetime.date(2024, 1, int(v)) for v in random.integers(1, 29, 300)],
        "label": random.integers(0, 2, 300).tolist(),
    }
    table = pa.table(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    pv.write_csv(table, tmp_path / "a.csv")
    as_dicts = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    frame = pd.DataFrame(rows)
    frame["user"] = frame["user"].astype("float64")  # what a missing value would have made of it
    frame["price"] = frame["price"].astype("float32")
    frame["day"] = pd.to_datetime(frame["day"]).astype("datetime64[ms]")
    frame["city"] = [unicodedata.normalize("NFD", v) for v in frame["city"]]
    forms = {
        "dicts": as_dicts,
        "columns": {name: [Decimal(str(v)) if name == "price" else v for v in values] for name, values in rows.items()},
        "pandas": frame,
        "arrow": table,
        "polars": pl.from_arrow(table),
        "dataset": Dataset(table),
        "Parquet": read_table(tmp_path / "a.parquet", list(rows)),
        "CSV": read_table(tmp_path / "a.csv", list(rows)),
        "JSON": json.loads(json.dumps(as_dicts, default=str)),
    }
    assert set(forms) == set(FORMATS)
    fields = [
        "user",
        FieldConfig("price", kind="numeric", num_buckets=7),
        FieldConfig("seen", kind="numeric", num_buckets=5),
        "city",
        "day",
    ]
    processor = FlipProcessor.fit(forms[trained], fields, wordpiece, label="label")
    expected = processor.encode(forms[trained], with_label=True).combine_chunks()
    assert not np.concatenate(expected["fallbacks"].to_pylist()).any()
    for name, form in forms.items():
        found = processor.encode(form, with_label=True).combine_chunks()
        assert found.equals(expected), name
        assert FlipProcessor.fit(form, fields, wordpiece, label="label").vocabulary == processor.vocabulary, name


def test_times_in_lists_keep_their_nanoseconds():
    values = [pd.Timestamp(1_700_000_000_000_000_001), pd.Timestamp(1_700_000_000_000_000_002)]
    expected = ["2023-11-14 22:13:20.000000001", "2023-11-14 22:13:20.000000002"]
    for rows in (
        {"f": values},
        [{"f": v} for v in values],
        {"f": pd.Series(values, dtype=object)},
        {"f": np.array([v.to_datetime64() for v in values])},
        {"f": [v.to_datetime64() for v in values]},
        pd.DataFrame({"f": values}),
    ):
        assert ids_of(to_table(rows, ["f"])["f"]) == expected
    assert ids_of(to_table({"f": [*values, pd.NaT, "x"]}, ["f"])["f"]) == [*expected, None, "x"]


@pytest.mark.parametrize("unit", ["D", "W", "h", "m", "ms", "ns"])
def test_times_of_every_numpy_unit_are_read(unit):
    values = np.array(["2024-01-04", "NaT"], dtype=f"M8[{unit}]")
    for column in (values, list(values)):
        assert ids_of(to_table({"f": column}, ["f"])["f"]) == ["2024-01-04", None]


def test_numbers_of_a_text_are_shown_alike_in_every_column_type():
    field, kind = FieldConfig("f", kind="text"), KINDS["text"]
    plain = pa.array([0.5, 2.0, 1e30])
    decimals_ = pa.array([Decimal("0.50"), Decimal("2.0"), Decimal("1E+30")])
    ends = pa.array([1, 2, 3], pa.int32())
    for column in (plain, decimals_, plain.dictionary_encode(), pa.RunEndEncodedArray.from_arrays(ends, plain)):
        assert kind.read(pa.chunked_array([column]), field, 0, None).strings.to_pylist() == ["0.5", "2", "1e+30"]


STREAMED = {
    "u": ["a", None, "b"] * 50,
    "price": pa.array(np.float32([0.1, 0.2, 0.3] * 50)),
    "label": [0, 1, 1] * 50,
    "row": [7] * 150,
}


@pytest.mark.parametrize("change", ["none", "filter", "rename", "shards", "shuffle", "map"])
def test_a_stream_is_encoded_like_the_rows_that_it_gives(change, wordpiece):
    rows = Dataset(pa.table(STREAMED))
    fields = ["u", FieldConfig("price", kind="numeric")]
    processor = FlipProcessor.fit(rows, fields, wordpiece, label="label")
    stream = rows.to_iterable_dataset(num_shards=3 if change == "shards" else 1)
    if change == "filter":
        stream = stream.filter(lambda row: True)
    elif change == "rename":
        stream = rows.rename_column("u", "v").to_iterable_dataset().rename_column("v", "u")
    elif change == "shuffle":
        stream = stream.shuffle(seed=0, buffer_size=20)
    elif change == "map":
        stream = stream.map(lambda row: {"u": row["u"] and row["u"].upper().lower()})
    taken = list(stream)
    expected = processor.encode(
        pa.table({n: pa.array([r[n] for r in taken], rows.features.arrow_schema.field(n).type) for n in STREAMED}),
        with_label=True,
    )
    found = [{k: np.asarray(v).tolist() for k, v in row.items()} for row in processor.encode_dataset(stream)]
    wanted = expected.to_pylist()
    if change == "map":
        # The stream no longer says its types: a float32 is the Python number that it gives.
        found, wanted = ([(r["row"], r["label"], r["feature_ids"][0]) for r in part] for part in (found, wanted))
    assert found == wanted
    if change != "map":
        assert FlipProcessor.fit(stream, fields, wordpiece, label="label").vocabulary == processor.vocabulary


def test_a_transform_that_would_be_passed_over_is_refused(wordpiece):
    rows = Dataset.from_dict({"u": ["a", "b"]})
    processor = FlipProcessor.fit(rows, ["u"], wordpiece)
    changed = rows.with_transform(lambda batch: {"u": ["x" for _ in batch["u"]]})
    for read in (processor.encode, processor.encode_dataset, lambda r: FlipProcessor.fit(r, ["u"], wordpiece)):
        with pytest.raises(InputError, match="has a transform"):
            read(changed)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(pd.Series(["a"]), "a Series may be a column", id="pandas Series"),
        pytest.param(pl.Series(["a"]), "must be a table", id="polars Series"),
        pytest.param(
            pl.DataFrame({"u": pl.Series([object()], dtype=pl.Object)}),
            "field 'u': the column holds polars",
            id="objects",
        ),
    ],
)
def test_what_is_no_table_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        to_table(rows, ["u"])
