"""CSV files are read back exactly as they were written, or refused; what a quote means is never guessed."""

import csv
import io
import re

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_hf.data import csv_files
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import read_table, stream_tables
from flip_hf.data.schema import InputError


def read(path, content, names=("f", "g"), name="a.csv", **form):
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(file, names, csv=CSVFormat(**form)).to_pydict()


def read_or_none(*arguments, **form):
    """What is read, or None where that is refused."""
    try:
        return read(*arguments, **form)
    except InputError:
        return None


# The characters that mean something to some program that writes CSV, and some that mean nothing.
TEXTS = st.text(st.sampled_from("ab1,;|\t\"'\\ \n\ré🙂"), max_size=8)


def by_csv(**options):
    def write(table, delimiter):
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=delimiter, **options)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        return file.getvalue()

    return write


def by_pandas(**options):
    return lambda table, delimiter: pd.DataFrame(table).to_csv(sep=delimiter, index=False, **options)


def by_arrow(table, delimiter):
    file = io.BytesIO()
    pv.write_csv(pa.table(table), file, pv.WriteOptions(delimiter=delimiter))
    return file.getvalue().decode()


def by_spark(table, delimiter):
    """As Spark does by default: quotes only where needed, escapes only within quotes."""

    def spelled(value):
        if value == "" or any(c in value for c in f'{delimiter}"\r\n'):
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return value

    rows = [list(table), *zip(*table.values(), strict=True)]
    return "".join(delimiter.join(map(spelled, row)) + "\n" for row in rows)


# Who writes -> how, the settings with which the file can be read, and whether it can always be read then.
ESCAPED = {"escapechar": "\\", "doublequote": False}
QUOTED, SPARK = {"quote": True, "escape": ""}, {"quote": True, "escape": "\\"}
WRITERS = {
    "csv": (by_csv(), QUOTED, True),
    "csv, line feeds": (by_csv(lineterminator="\n"), QUOTED, False),
    "csv, all quoted": (by_csv(quoting=csv.QUOTE_ALL), QUOTED, True),
    "csv, escaped": (by_csv(**ESCAPED), SPARK, False),
    "csv, all quoted and escaped": (by_csv(quoting=csv.QUOTE_ALL, **ESCAPED), SPARK, True),
    "csv, nothing quoted": (by_csv(quoting=csv.QUOTE_NONE, escapechar="\\"), {"quote": False, "escape": "\\"}, True),
    "pandas": (by_pandas(), QUOTED, False),
    "pandas, all quoted": (by_pandas(quoting=csv.QUOTE_ALL), QUOTED, True),
    "pandas, escaped": (by_pandas(**ESCAPED), SPARK, False),
    "Arrow": (by_arrow, QUOTED, True),
    "Spark": (by_spark, SPARK, False),
}


@st.composite
def tables(draw):
    columns = draw(st.integers(1, 3))
    rows = draw(st.integers(0, 4))
    values = st.lists(TEXTS, min_size=rows, max_size=rows)
    names = st.lists(TEXTS.filter(str.strip), min_size=columns, max_size=columns, unique=True)
    return {name: draw(values) for name in draw(st.one_of(st.just(["f", "g", "h"][:columns]), names))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


def same(found, table):
    """White space at the ends of a value means nothing; a carriage return there may belong to the line break."""
    return found == table or {k: [v.rstrip("\r") for v in column] for k, column in found.items()} == {
        k: [v.rstrip("\r") for v in column] for k, column in table.items()
    }


@pytest.mark.parametrize("writer", WRITERS)
@given(
    table=tables(),
    delimiter=st.sampled_from(",;|\t"),
    is_told=st.booleans(),
    block_bytes=st.sampled_from([7, 1 << 21]),
)
@settings(deadline=None)
def test_a_table_is_read_back_exactly_or_refused(folder, writer, table, delimiter, is_told, block_bytes):
    write, form, is_always_read = WRITERS[writer]
    try:
        content = write(table, delimiter)
    except csv.Error:
        return
    if not is_told:
        # Nobody can tell `a\\b` with and without an escape character, nor text that was written without quotes.
        if (form["escape"] and "\\" in content) or not form["quote"]:
            return
        form = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", block_bytes)
        found = read_or_none(folder, content, list(table), delimiter=delimiter, **form)
    if found is None:
        assert not (is_told and is_always_read), content
    else:
        assert same(found, table), content


@given(
    content=st.text(st.sampled_from('ab,"\\ \n'), max_size=30),
    quote=st.sampled_from([None, True]),
    block_bytes=st.sampled_from([3, 1 << 21]),
)
@settings(deadline=None)
def test_any_text_is_read_as_python_reads_it_or_refused(folder, content, quote, block_bytes):
    content = "f,g\n" + content
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", block_bytes)
        found = read_or_none(folder, content, quote=quote, escape="")
    if found is None:
        return
    rows = [row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row][1:]
    assert list(zip(found["f"], found["g"], strict=True)) == list(map(tuple, rows))


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        pytest.param('1,"a"b\n', {}, "field 'g', row 1, value '\"a\"b': text follows the quote", id="after the quote"),
        pytest.param('1, "a"\n', {}, "field 'g', row 1, value ' \"a\"': spaces stand before", id="before the quote"),
        pytest.param('1,"a\\", b"\n', {}, "field 'g', row 1, .*set csv.escape", id="backslash"),
        pytest.param('1,a\\"b\n', {}, "field 'g', row 1, .*set csv.escape", id="backslash without quotes"),
        pytest.param('1,"a\n', {}, "field 'g', row 1, value '\"a': a quote is never closed", id="never closed"),
        pytest.param('"a,1\nb",2\n', {}, "field 'f', row 1, .*look like rows", id="two rows"),
        pytest.param('"a\nb,1\nc",2\n', {}, "field 'f', row 1, .*look like rows", id="a row within"),
        pytest.param('"x, y",z\n"a ""b"",1\nc",2\n', {}, "field 'f', row 2, .*look like rows", id="doubled quotes"),
        pytest.param("1,a\rb\n", {}, "field 'g', row 1, .*carriage return", id="carriage return"),
        pytest.param('1,"a\\xb"\n', {"escape": "\\"}, "row 1, .*escape character before 'x'", id="escaped letter"),
        pytest.param("1,a\\\\b\n", {"escape": "\\"}, "row 1, .*two ways", id="escaped escape without quotes"),
        pytest.param("1,a\\nb\n", {"escape": "\\", "quote": False}, "row 1, .*before 'n'", id="C's escapes"),
        pytest.param('1|"a"\n', {"delimiter": "|"}, "field 'g', row 1, value '\"a\"': .*csv.quote: false", id="|"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_its_place(tmp_path, content, form, message):
    delimiter = form.get("delimiter", ",")
    # A row with a line break and an empty line before it: neither moves the number of the row.
    before = f"f{delimiter}g\n\n0{delimiter}0\n"
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, before + content + f"9{delimiter}9\n", **form)
    assert caught.value.source == str(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        pytest.param('6" nails,a"\n', {}, ('6" nails', 'a"'), id="quotes within values"),
        pytest.param('"a\nb",2\n', {}, ("a\nb", "2"), id="two lines"),
        pytest.param('1,"a, b\nc"\n', {}, ("1", "a, b\nc"), id="two lines with a delimiter"),
        pytest.param('1,"a\\"\n', {"escape": ""}, ("1", "a\\"), id="no escape"),
        pytest.param("1;a,b\n", {"delimiter": ";"}, ("1", "a,b"), id="semicolon"),
        pytest.param('1|6" nails\n', {"delimiter": "|"}, ("1", '6" nails'), id="no value begins with a quote"),
        pytest.param("a\\,b,c\\\nd\n", {"quote": False, "escape": "\\"}, ("a,b", "c\nd"), id="all escaped"),
        pytest.param('"a\r\nb",2\r\n', {}, ("a\r\nb", "2"), id="Windows line breaks"),
    ],
)
def test_what_can_be_read_in_one_way_is_read(tmp_path, content, form, expected):
    header = f"f{form.get('delimiter', ',')}g\n"
    found = read(tmp_path, header + content, **form)
    assert (found["f"], found["g"]) == ([expected[0]], [expected[1]])


@pytest.mark.parametrize(
    ("ragged", "number", "value"),
    [
        (b"3,4,5\n", 3, "'3,4,5'"),
        (b"3\n", 1, "'3'"),
        (b"3,\xff,5\n", 3, "'3,\ufffd,5'"),
        (b'3,"4,\n5",6\n', 3, "'3,\"4,\\n5\",6'"),
    ],
    ids=["too many", "too few", "not UTF-8", "a line break"],
)
@pytest.mark.parametrize("block_bytes", [7, 1 << 21])
def test_a_row_with_too_few_or_too_many_values_is_named(
    tmp_path, monkeypatch, capfd, ragged, number, value, block_bytes
):
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", block_bytes)
    # Neither the line break nor the empty lines move the number of the row.
    content = b'f,g\n\n0,"a\nb"\n\n1,2\n' + ragged + b"6,7\n"
    message = f"row 2, value {value}: the row has {number} values, but the header has 2; correct the row"
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read(tmp_path, content, quote=True)
    assert (caught.value.source, caught.value.row) == (str(tmp_path / "a.csv"), 2)
    assert capfd.readouterr().err == ""


def test_an_empty_line_in_a_file_of_one_column_is_refused(tmp_path):
    assert read(tmp_path, 'f\n1\n""\n', ["f"]) == {"f": ["1", ""]}
    with pytest.raises(InputError, match="field 'f', row 1: an empty line in a file of one column"):
        read(tmp_path, "f\n1\n\n2\n", ["f"])


def test_a_row_longer_than_a_block_is_read(tmp_path):
    long = "x" * (5 << 20)
    assert read(tmp_path, f'f,g\n1,{long}\n2,"{long}""\n"\n')["g"] == [long, f'{long}"\n']


def test_a_quote_that_is_never_closed_is_found_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(csv_files, "_MOST_ROW_BYTES", 1 << 20)
    with pytest.raises(InputError, match="field 'g', row 1, value '\"4': a quote is never closed"):
        read(tmp_path, 'f,g\n1,2\n3,"4\n' + "5,6,7\n" * 300_000)


def test_words_for_missing_values_are_counted_once_a_file(tmp_path, caplog):
    content = "f,g\n" + "NA, null \n" * 3 + "x,\n" + "NAN,nan\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", 8)
        found = read(tmp_path, content)
    assert found["f"] == ["NA"] * 3 + ["x", "NAN"]
    (message,) = caplog.messages
    assert message == (
        f"{tmp_path}/a.csv: these words are read as values, not as missing: field 'f': NA (3); field 'g': nan (1), "
        'null (3). If they mean that a value is missing, set csv.null_values: [NA, "nan", "null"]; if not, set '
        "csv.null_values: []"
    )


def test_null_values_are_missing_quoted_or_not(tmp_path, caplog):
    content = 'f,g\nNA,"NA"\n NA ,\nnull,x\n'
    assert read(tmp_path, content, null_values=["NA"]) == {"f": [None, None, "null"], "g": [None, "", "x"]}
    assert read(tmp_path, content, null_values=[])["f"] == ["NA", " NA ", "null"]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"delimiter": "ab"}, "csv.delimiter='ab' must be one ASCII character"),
        ({"delimiter": '"'}, "csv.delimiter='\"' must be"),
        ({"delimiter": ""}, "csv.delimiter='' must be"),
        ({"escape": "\\\\"}, "csv.escape="),
        ({"escape": '"'}, "Doubled quotes need no setting"),
        ({"escape": ",", "delimiter": ","}, "csv.escape=','"),
        ({"delimiter": 5}, "csv.delimiter=5 must be"),
        ({"escape": 0}, "csv.escape=0 must be"),
        ({"quote": "false"}, "csv.quote='false' must be true or false, without quotes"),
        ({"quote": 0}, "csv.quote=0 must be true or false"),
        ({"null_values": [None]}, "put quotes around null"),
        ({"null_values": "NA"}, "csv.null_values='NA' must be a list: write [NA]"),
        ({"null_values": 5}, "csv.null_values=5 must be a list, such as [NA]"),
    ],
)
def test_settings_that_can_not_be_are_refused(form, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CSVFormat(**form)


def test_an_escape_character_without_quoting_decided_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"set csv\.quote to true or false as well"):
        read(tmp_path, "f\tg\n", name="a.tsv", escape="\\")


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.csv"
    row = b'1,"' + b"x" * 1000 + b'"\n'
    peaks = []
    for rows in (20_000, 80_000):
        path.write_bytes(b"f,g\n" + row * rows)
        before = pa.total_allocated_bytes()
        peaks.append(max(pa.total_allocated_bytes() - before for _ in stream_tables(path, ["f", "g"])))
    assert peaks[1] <= peaks[0] + (4 << 20)
