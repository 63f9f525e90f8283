"""What raw values mean: canonical strings, labels, and what is said of a value that means nothing."""

import datetime
import decimal
import itertools
import logging
import math
import pickle
import string
import unicodedata
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_hf.data import schema
from flip_hf.data.schema import (
    Fallback,
    InputError,
    canonical_labels,
    canonical_lists,
    canonical_numbers,
    canonical_strings,
)
from flip_hf.data.tables import to_table

OK, MISSING, STRIPPED, BOOLEAN = Fallback(0), Fallback.MISSING, Fallback.STRIPPED, Fallback.BOOLEAN
NOT_UTF8 = pa.StringArray.from_buffers(
    2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
)  # as Arrow reads a Parquet file that claims its bytes are text


def read(column):
    strings, flags = canonical_strings(column, "user_id")
    assert strings.type == pa.string()
    assert flags.dtype == np.uint8
    assert len(flags) == len(strings)
    return strings.to_pylist(), flags.tolist()


@pytest.mark.parametrize(
    ("column", "strings", "flags"),
    [
        pytest.param(pa.array([1, None, -5], pa.int8()), ["1", None, "-5"], [OK, MISSING, OK], id="int8"),
        pytest.param(pa.array([2**24 + 1]), ["16777217"], [OK], id="above 2^24"),
        pytest.param(pa.array([2**63 - 1, -(2**63)]), [str(2**63 - 1), str(-(2**63))], [OK, OK], id="int64 limits"),
        pytest.param(pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)], [OK], id="uint64 limit"),
        pytest.param(pa.array([str(2**70), str(-(2**70))]), [str(2**70), str(-(2**70))], [OK, OK], id="beyond int64"),
        pytest.param(pa.array(["007", "7"]), ["007", "7"], [OK, OK], id="leading zeros"),
        pytest.param(pa.array(["1"]), ["1"], [OK], id="string 1"),
        pytest.param(pa.array(["NA", "null", "nan", "None"]), ["NA", "null", "nan", "None"], [OK] * 4, id="words"),
        pytest.param(pa.array([" a b ", "a b"]), ["a b", "a b"], [STRIPPED, OK], id="spaces"),
        pytest.param(pa.array(["", "  ", None]), [None] * 3, [MISSING, MISSING | STRIPPED, MISSING], id="empty"),
        pytest.param(pa.array([True, False, None]), ["true", "false", None], [BOOLEAN, BOOLEAN, MISSING], id="Boolean"),
        pytest.param(
            pa.array([196.0, math.nan, None]), ["196", None, None], [OK, MISSING, MISSING], id="null made float"
        ),
        pytest.param(pa.array([-0.0, -3.0, 2.0**53 - 1]), ["0", "-3", str(2**53 - 1)], [OK] * 3, id="float64"),
        pytest.param(pa.array([2.0**24 - 1], pa.float32()), ["16777215"], [OK], id="float32"),
        pytest.param(pa.array(np.float16([2047, np.nan])), ["2047", None], [OK, MISSING], id="float16"),
        pytest.param(pa.array([b"caf\xc3\xa9 ", None]), ["café", None], [STRIPPED, MISSING], id="bytes"),
        pytest.param(pa.array([b"ab"], pa.binary(2)), ["ab"], [OK], id="fixed-size bytes"),
        pytest.param(pa.array([b"ab"], pa.binary_view()), ["ab"], [OK], id="byte views"),
        pytest.param(pa.array(["a"], pa.large_string()), ["a"], [OK], id="large strings"),
        pytest.param(pa.array(["a"], pa.string_view()), ["a"], [OK], id="string views"),
        pytest.param(pa.array(["b ", None, "b "]).dictionary_encode(), ["b", None, "b"], [4, 2, 4], id="dictionary"),
        pytest.param(pa.array([1.0, None]).dictionary_encode(), ["1", None], [OK, MISSING], id="dictionary of floats"),
        pytest.param(pa.array([datetime.date(2020, 1, 2)]), ["2020-01-02"], [OK], id="date"),
        pytest.param(pa.array([decimal.Decimal("1.50")]), ["1.5"], [OK], id="decimal"),
        pytest.param(pa.nulls(2), [None, None], [MISSING, MISSING], id="nulls"),
        pytest.param(pa.nulls(2, pa.list_(pa.int64())), [None, None], [MISSING, MISSING], id="no lists"),
        pytest.param(pa.chunked_array([["a"], [" b"]]), ["a", "b"], [OK, STRIPPED], id="chunks"),
        pytest.param(pa.chunked_array([], pa.int64()), [], [], id="no rows"),
    ],
)
def test_canonical_strings(column, strings, flags):
    assert read(column) == (strings, [int(flag) for flag in flags])


def test_white_space_is_what_python_strips():
    characters = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    expected = [unicodedata.normalize("NFC", c.strip()) or None for c in characters]
    assert expected.count(None) == 29
    assert read(pa.array(characters))[0] == expected


@pytest.mark.parametrize(
    ("column", "row", "value", "reason"),
    [
        pytest.param(pa.array([1.0, 2.5, math.inf]), 1, "2.5", "whole number", id="fraction"),
        pytest.param(pa.array([None, -math.inf]), 1, "-inf", "whole number", id="infinity"),
        pytest.param(pa.array([2.0**53, 2.5]), 0, "9007199254740992.0", "too large", id="float64 too large"),
        pytest.param(pa.array([1.0, 2.0**24], pa.float32()), 1, "16777216.0", "too large", id="float32 too large"),
        pytest.param(pa.array(np.float16([2048])), 0, "2048.0", "too large", id="float16 too large"),
        pytest.param(pa.array([2.5, 2.0**53]), 0, "2.5", "whole number", id="the first row is named"),
        pytest.param(pa.array([None, b"a", b"\xff", b"\xfe"]), 2, r"b'\xff'", "UTF-8", id="bytes"),
        pytest.param(NOT_UTF8, 1, r"b'\xff'", "UTF-8", id="text that is not UTF-8"),
        pytest.param(pa.array([[1, 2]]), 0, "[1, 2]", "one value per row", id="list"),
        pytest.param(pa.array([None, {"a": 1}]), 1, "{'a': 1}", "one value per row", id="struct"),
        pytest.param(pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), 0, "[('a', 1)]", "one value", id="map"),
    ],
)
def test_a_value_that_is_no_id_is_named(column, row, value, reason):
    with pytest.raises(InputError, match=reason) as caught:
        canonical_strings(column, "user_id", first_row=100, source="clicks.csv")
    assert str(caught.value).startswith(f"clicks.csv, field 'user_id', row {100 + row}, value {value}: ")
    assert caught.value.row == 100 + row


def test_the_error_says_what_to_do():
    with pytest.raises(InputError) as caught:
        canonical_strings(pa.array([2.5]), "user_id", first_row=3, source="clicks.csv")
    assert str(caught.value) == (
        "clicks.csv, field 'user_id', row 3, value 2.5: "
        "an id must be a whole number; store it as a string or an integer"
    )


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([pa.MonthDayNano([1, 2, 3])]), id="interval"),
        pytest.param(pa.array([1000], pa.duration("ms")), id="duration"),
        pytest.param(
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=0).bytes], pa.binary(16))), id="UUID"
        ),
    ],
)
def test_a_type_without_a_string_is_named(column):
    with pytest.raises(InputError, match=r"^x.parquet, field 'f': an id can't be of type .*; store it as a string"):
        canonical_strings(column, "f", source="x.parquet")


def test_strings_numbers_and_floats_of_one_id_are_one_feature():
    columns = pa.array([1]), pa.array([1], pa.uint8()), pa.array(["1"]), pa.array([1.0]), pa.array([b"1"])
    assert {read(column)[0][0] for column in columns} == {"1"}


@given(st.lists(st.one_of(st.none(), st.text(), st.text(string.whitespace + "\x1c\x85\xa0\u2003a"))))
def test_text_is_stripped_and_else_kept(values):
    strings, flags = read(pa.array(values, pa.string()))
    assert strings == [(unicodedata.normalize("NFC", v).strip() or None) if v is not None else None for v in values]
    assert [bool(f & MISSING) for f in flags] == [s is None for s in strings]
    assert [bool(f & STRIPPED) for f in flags] == [v is not None and v != v.strip() for v in values]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers_are_written_in_decimal(values):
    assert read(pa.array(values, pa.int64()))[0] == [str(v) for v in values]


@given(st.lists(st.integers(-(2**53) + 1, 2**53 - 1)))
def test_integers_that_became_floats_are_read_back(values):
    assert read(pa.array([float(v) for v in values], pa.float64()))[0] == [str(v) for v in values]


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.text(st.characters(codec="utf-8")),
            st.integers(),
            st.booleans(),
            st.integers(-(2**53) + 1, 2**53 - 1).map(float),
        ),
        min_size=1,
    )
)
def test_every_form_of_the_same_rows_means_the_same(values):
    text = [str(v).lower() if isinstance(v, bool) else str(int(v)) if isinstance(v, float) else v for v in values]
    expected = [None if v is None else unicodedata.normalize("NFC", str(v)).strip() or None for v in text]
    frame = pd.DataFrame({"f": pd.Series(values, dtype=object)})
    arrow = pa.table({"f": pa.array([None if v is None else str(v) for v in text], pa.string())})
    for rows in ([{"f": v} for v in values], {"f": values}, frame, arrow):
        assert read(to_table(rows, ["f"])["f"])[0] == expected


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        pytest.param(pa.array([0, 1], pa.int8()), [0, 1], id="int8"),
        pytest.param(pa.array([0, 1], pa.uint64()), [0, 1], id="uint64"),
        pytest.param(pa.array([0.0, 1.0, -0.0]), [0, 1, 0], id="float64"),
        pytest.param(pa.array(np.float16([0, 1])), [0, 1], id="float16"),
        pytest.param(pa.array([True, False]), [1, 0], id="Boolean"),
        pytest.param(
            pa.array(["0", "1", "0.0", "1.0", "true", "FALSE", " True\n"]), [0, 1, 0, 1, 1, 0, 1], id="strings"
        ),
        pytest.param(pa.array(["1", "0"], pa.large_string()).dictionary_encode(), [1, 0], id="dictionary"),
        pytest.param(pa.chunked_array([[1], [0]]), [1, 0], id="chunks"),
        pytest.param(pa.nulls(0), [], id="no rows"),
    ],
)
def test_labels(column, labels):
    result = canonical_labels(column, "label")
    assert result.dtype == np.float32
    assert result.tolist() == labels


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        pytest.param(pa.array([1, 2, 3]), 1, "2", id="2"),
        pytest.param(pa.array([0, -1]), 1, "-1", id="-1"),
        pytest.param(pa.array([1, 2**64 - 1], pa.uint64()), 1, str(2**64 - 1), id="uint64"),
        pytest.param(pa.array([0.0, 0.5, math.nan]), 1, "0.5", id="0.5"),
        pytest.param(pa.array([0.0, math.nan, 0.5]), 1, "nan", id="NaN"),
        pytest.param(pa.array([0, None]), 1, "None", id="null"),
        pytest.param(pa.array([True, None]), 1, "None", id="null Boolean"),
        pytest.param(pa.array(["1", None, "yes"]), 1, "None", id="null string"),
        pytest.param(pa.array(["1", "yes"]), 1, "'yes'", id="yes"),
        pytest.param(pa.array(["", "1"]), 0, "''", id="empty"),
        pytest.param(pa.array(["1", "0", "01"]), 2, "'01'", id="01"),
        pytest.param(pa.array([[1]]), 0, "[1]", id="list"),
        pytest.param(pa.array([b"1"]), 0, "b'1'", id="bytes"),
        pytest.param(NOT_UTF8, 1, r"b'\xff'", id="not UTF-8"),
        pytest.param(pa.nulls(1), 0, "None", id="nulls"),
    ],
)
def test_a_value_that_is_no_label_is_named(column, row, value):
    with pytest.raises(InputError) as caught:
        canonical_labels(column, "label", first_row=7, source="clicks.csv")
    assert str(caught.value).startswith(f"clicks.csv, field 'label', row {7 + row}, value {value}: ")


def test_an_error_names_what_it_knows():
    assert str(InputError("no rows")) == "no rows"
    assert str(InputError("no rows", source="a.csv")) == "a.csv: no rows"
    assert str(InputError("odd", row=0, value=None)) == "row 0, value None: odd"


@pytest.mark.parametrize(
    "value", ["x" * 10**6, b"x" * 10**6, 10**5000, list(range(10**4))], ids=lambda v: type(v).__name__
)
def test_an_error_stays_short(value):
    assert len(str(InputError("odd", field="f", value=value))) < 150


def test_an_error_survives_a_worker_process():
    error = InputError("odd", source="a.csv", field="f", row=3, value=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.message, copy.source, copy.field, copy.row, copy.value) == ("odd", "a.csv", "f", 3, 2.5)


def test_parquet_strings_that_are_not_utf8_are_named(tmp_path):
    pq.write_table(pa.table({"f": NOT_UTF8}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="field 'f', row 1, "):
        canonical_strings(pq.read_table(tmp_path / "a.parquet")["f"], "f")


def lists_by_bar(column, field, **place):
    return canonical_lists(column, field, "|", **place)


READERS = [canonical_strings, canonical_numbers, lists_by_bar, canonical_labels]
ID = "an id must be a whole number; store it as a string or an integer"
LABEL = "a label must be 0 or 1; convert ratings to labels, and drop unlabelled rows"
UTF8 = "not UTF-8; convert the file to UTF-8"


@pytest.mark.parametrize(
    ("read", "column", "row", "value", "message"),
    [
        (canonical_strings, pa.array([1.0, -2.5]), 1, "-2.5", ID),
        (
            canonical_strings,
            pa.array([1.0, 2.0**24], pa.float32()),
            1,
            "16777216.0",
            "too large to be exact as float, so the id may have changed; store it as a string",
        ),
        (
            canonical_strings,
            pa.array([None, -(2.0**53)]),
            1,
            "-9007199254740992.0",
            "too large to be exact as double, so the id may have changed; store it as a string",
        ),
        (
            canonical_strings,
            pa.array([None, [1]]),
            1,
            "[1]",
            "this field takes one value per row; declare a field with several as multi_categorical or sequence",
        ),
        (canonical_strings, pa.array([b"a", b"\xff"]), 1, r"b'\xff'", UTF8),
        (
            canonical_numbers,
            pa.array(["1", "1,5"]),
            1,
            "'1,5'",
            "not a number; write it with digits and a decimal point",
        ),
        (
            canonical_numbers,
            pa.array([math.nan, math.inf]),
            1,
            "inf",
            "a number must be finite; drop the row, or leave the value empty if it is unknown",
        ),
        (
            canonical_numbers,
            pa.array([None, datetime.date(2020, 1, 2)]),
            1,
            "datetime.date(2020, 1, 2)",
            "a number can't be of type date32[day]; store it as an integer or a float",
        ),
        (canonical_numbers, NOT_UTF8, 1, r"b'\xff'", UTF8),
        (lists_by_bar, pa.array([[], [1.0, 2.5]]), 1, "2.5", ID),
        (lists_by_bar, NOT_UTF8, 1, r"b'\xff'", UTF8),
        (
            lists_by_bar,
            pa.array([None, 3]),
            1,
            "3",
            "must be a list of values, or a string with a separator between values",
        ),
        (canonical_labels, pa.array([1, 2]), 1, "2", LABEL),
        (canonical_labels, pa.array([decimal.Decimal("1.00"), decimal.Decimal("0.50")]), 1, "Decimal('0.50')", LABEL),
        (canonical_labels, NOT_UTF8, 1, r"b'\xff'", UTF8),
    ],
    ids=itertools.count(),
)
def test_an_error_names_the_place_and_says_what_to_do(read, column, row, value, message):
    for place, named in (
        ({}, f"field 'f', row {row}"),
        ({"first_row": 20, "source": "a.csv"}, f"a.csv, field 'f', row {20 + row}"),
    ):
        with pytest.raises(InputError) as caught:
            read(column, "f", **place)
        assert str(caught.value) == f"{named}, value {value}: {message}"
        error = caught.value
        assert (error.field, error.row, error.message) == ("f", place.get("first_row", 0) + row, message)
        assert error.source == place.get("source")


def test_strings_of_lists_need_a_separator():
    with pytest.raises(InputError) as caught:
        canonical_lists(pa.array([None, "a,b"]), "f", None, source="a.csv")
    assert str(caught.value) == (
        "a.csv, field 'f', row 1, value 'a,b': strings need a separator between values; set the separator of 'f'"
    )
    strings, offsets, flags = canonical_lists(pa.array([None, None], pa.string()), "f", None)
    assert (strings.to_pylist(), offsets.tolist(), flags.tolist()) == ([], [0, 0, 0], [MISSING, MISSING])


@pytest.mark.parametrize("read", READERS[:3])
def test_no_rows_have_no_values(read):
    for kind in (pa.string(), pa.float16(), pa.decimal128(5, 2), pa.list_(pa.int8()), pa.null()):
        if pa.types.is_list(kind) != (read is lists_by_bar) and not pa.types.is_null(kind):
            continue
        strings = read(pa.nulls(0, kind), "f")[0]
        assert len(strings) == 0
    assert canonical_labels(pa.nulls(0, pa.int8()), "f").tolist() == []


def test_a_type_is_named_with_its_place():
    with pytest.raises(InputError) as caught:
        canonical_strings(pa.array([1], pa.duration("s")), "f", source="a.csv")
    assert str(caught.value) == (
        "a.csv, field 'f': an id can't be of type duration[s]; store it as a string or an integer"
    )
    error = caught.value
    assert (error.row, error.value) == (None, None)


@pytest.mark.parametrize(
    ("column", "numbers", "strings", "flags"),
    [
        (pa.array([" ", None, " 7"]), [None, None, 7.0], [None, None, "7"], [STRIPPED | MISSING, MISSING, STRIPPED]),
        (pa.array([True, None]), [1.0, None], ["1", None], [BOOLEAN, MISSING]),
        (pa.nulls(2), [None, None], [None, None], [MISSING, MISSING]),
        (pa.array(["nan", "-0", "-0.0"]), [None, 0.0, 0.0], [None, "0", "0"], [MISSING, OK, OK]),
        (pa.array([-0.0, -1.0]), [0.0, -1.0], ["0", "-1"], [OK, OK]),
        # Up to 2**53 a float64 holds every whole number. From there its own digits are shown if the column has them.
        (pa.array([2.0**53 - 1, -(2.0**53)]), [2.0**53 - 1, -(2.0**53)], [str(2**53 - 1), str(-(2**53))], [OK, OK]),
        (pa.array([2**53 + 1, 0]), [2.0**53, 0.0], [str(2**53 + 1), "0"], [OK, OK]),
        (pa.array([str(10**20 + 1), "1e20"]), [1e20, 1e20], [str(10**20 + 1), str(10**20)], [OK, OK]),
        (pa.array(["1e21", "999999999999999999999"]), [1e21, 1e21], ["1e+21", "1e+21"], [OK, OK]),
        (pa.array([0.1, 1e-7], pa.float32()), [0.1, 1e-7], ["0.1", "1e-7"], [OK, OK]),
        (pa.array(np.float16([0.1, 1000])), [0.1, 1000.0], ["0.1", "1000"], [OK, OK]),
        (pa.array([decimal.Decimal("2.50"), None]), [2.5, None], ["2.5", None], [OK, MISSING]),
    ],
    ids=itertools.count(),
)
def test_numbers_their_texts_and_flags(column, numbers, strings, flags):
    found, shown, found_flags = canonical_numbers(column, "f")
    assert found.dtype == np.float64
    assert [None if math.isnan(n) else n for n in found.tolist()] == numbers
    assert not np.signbit(found[found == 0]).any(), "zero has no sign"
    assert shown.type == pa.string()
    assert shown.to_pylist() == strings
    assert found_flags.dtype == np.uint8
    assert found_flags.tolist() == [int(flag) for flag in flags]


@pytest.mark.parametrize(
    ("column", "values", "offsets", "flags"),
    [
        (
            pa.array([[" a", None, "b"], None, [""], [], ["c"]]),
            ["a", "b", "c"],
            [0, 2, 2, 2, 2, 3],
            [STRIPPED | MISSING, MISSING, MISSING, MISSING, OK],
        ),
        (pa.array([[True], [False, None]]), ["true", "false"], [0, 1, 2], [BOOLEAN, BOOLEAN | MISSING]),
        (pa.array(["a| b", " ", "|", "c"]), ["a", "b", "c"], [0, 2, 2, 2, 3], [STRIPPED, MISSING, MISSING, OK]),
        (pa.array([b"a|b", None]), ["a", "b"], [0, 2, 2], [OK, MISSING]),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), ["1", "2", "3", "4"], [0, 2, 4], [OK, OK]),
        (pa.array([[" "], ["", "a"]]), ["a"], [0, 0, 1], [STRIPPED | MISSING, MISSING]),
        (pa.nulls(2), [], [0, 0, 0], [MISSING, MISSING]),
        # A column of numbers may be read where no row has one.
        (pa.nulls(2, pa.int8()), [], [0, 0, 0], [MISSING, MISSING]),
    ],
    ids=itertools.count(),
)
def test_lists_their_ends_and_flags(column, values, offsets, flags):
    strings, bounds, found_flags = canonical_lists(column, "f", "|")
    assert strings.type == pa.string()
    assert strings.to_pylist() == values
    assert bounds.dtype == np.int64
    assert bounds.tolist() == offsets
    assert found_flags.dtype == np.uint8
    assert found_flags.tolist() == [int(flag) for flag in flags]


@pytest.mark.parametrize(
    ("column", "strings"),
    [
        (pa.array([1, None], pa.timestamp("s")), ["1970-01-01 00:00:01", None]),
        (pa.array([1500, 0], pa.timestamp("ms")), ["1970-01-01 00:00:01.5", "1970-01-01"]),
        (pa.array([10], pa.timestamp("s")), ["1970-01-01 00:00:10"]),
        (pa.array([86_400_000_000_100], pa.timestamp("ns")), ["1970-01-02 00:00:00.0000001"]),
        (pa.array([0, 1200], pa.timestamp("ms", "Asia/Tokyo")), ["1970-01-01 00:00:00Z", "1970-01-01 00:00:01.2Z"]),
        (pa.array([0], pa.timestamp("s", "UTC")), ["1970-01-01 00:00:00Z"]),
        (pa.array([61, 0], pa.time32("s")), ["00:01:01", "00:00:00"]),
        (pa.array([1500, 0], pa.time32("ms")), ["00:00:01.5", "00:00:00"]),
        (pa.array([1500], pa.time64("us")), ["00:00:00.0015"]),
        (
            pa.array([decimal.Decimal(v) for v in ("0.00", "-0.10", "100.00")], pa.decimal128(6, 2)),
            ["0", "-0.1", "100"],
        ),
        (pa.array([decimal.Decimal(v) for v in ("100", "0")], pa.decimal128(6, 0)), ["100", "0"]),
        (pa.array([decimal.Decimal("1200")], pa.decimal128(4, -2)), ["1200"]),
        (pa.array([np.float16(2047)]), ["2047"]),
    ],
    ids=itertools.count(),
)
def test_times_and_decimals_are_spelled_by_what_they_are(column, strings):
    assert read(column)[0] == strings


@pytest.mark.parametrize("text", ["[1, 2]", " (1,) ", "{'a'}", "[]", "['a', 'b']"])
def test_a_text_that_looks_like_a_list_is_warned_of_once_for_each_field_and_file(text, caplog, monkeypatch):
    monkeypatch.setattr(schema, "_already_warned", set())
    columns = {"f": pa.array(["a|b", None, text, text]), "plain": pa.array(["a [b]", "[a", "b]", "(a]", "x"])}
    with caplog.at_level(logging.WARNING):
        for name, column in columns.items():
            for source in ("a.csv", "a.csv", "b.csv", None):
                canonical_lists(column, name, "|", first_row=10, source=source)
    message = (
        f"field 'f', row 12, value {text!r}: looks like a list written as text; it is split at its separator, "
        "brackets included. Store lists (Parquet, JSON Lines), or separate the values by the separator only"
    )
    found = [record.getMessage() for record in caplog.records]
    assert found == [f"a.csv, {message}", f"b.csv, {message}", message]


def test_a_value_in_an_error_is_cut():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    shown = {
        "x" * 78: repr("x" * 78),
        "x" * 79: "'" + "x" * 79 + "...",
        b"x" * 500: "b'" + "x" * 78 + "...",
        10**5000: "of type int",
        Broken(): "of type Broken",
    }
    for value, text in shown.items():
        assert str(InputError("odd", value=value)) == f"value {text}: odd"
