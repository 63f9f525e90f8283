"""Streams CSV files as Arrow tables. Raises an error instead of guessing what a quote means."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from flip_hf.data.csv_rows import RowCutter
from flip_hf.data.schema import InputError
from flip_hf.fields import printable

NULL_WORDS = ("NA", "N/A", "n/a", "NULL", "null", "None", "NaN", "nan", r"\N")
"""Words that other programs write for a missing value. By default they are values here, and a warning counts them."""

# Number of bytes parsed at a time.
_BLOCK_BYTES = 1 << 21
# A row must fit in memory. A quote that is never closed turns the rest of the file into one row.
_MOST_ROW_BYTES = 1 << 26
# With these delimiters, all common programs enclose values in quotes. With others, about half of the programs do.
_QUOTED_DELIMITERS = (",", ";")


@dataclass(frozen=True)
class CSVFormat:
    """The format of CSV files. If an unset setting matters for a file, an error names the setting.

    Args:
        delimiter: the character between values. Default: a tab for a file name with `.tsv`, otherwise a comma.
        quote: true: double quotes may enclose values. false: a quote is an ordinary character. Default: true for commas
            and semicolons. For other delimiters, a value that starts with a quote is an error by default.
        escape: the character that escapes quotes, such as the backslash in Spark's files. An empty string means that
            there is none. By default there is none, and a backslash before a quote is an error.
        null_values: values that mean "missing", such as `[NA, "null"]`. By default only empty values do. A warning
            counts values such as NA and null, which other programs write for a missing value.

    Raises:
        ValueError: a setting is invalid.
    """

    delimiter: str | None = None
    quote: bool | None = None
    escape: str | None = None
    null_values: list[str] | None = None

    def __post_init__(self) -> None:
        forbidden = '"\r\n'
        if self.delimiter is not None and not _is_one_character(self.delimiter, forbidden):
            raise ValueError(
                f"csv.delimiter={self.delimiter!r} must be one ASCII character other than a quote or line break"
            )
        if self.quote is not None and not isinstance(self.quote, bool):
            raise ValueError(f"csv.quote={self.quote!r} must be true or false, without quotes")
        if self.escape not in (None, "") and not _is_one_character(self.escape, forbidden + (self.delimiter or "")):
            raise ValueError(
                f"csv.escape={self.escape!r} must be one ASCII character other than a quote, line break or delimiter. "
                "Doubled quotes need no setting"
            )
        if isinstance(self.null_values, str):
            raise ValueError(f"csv.null_values={self.null_values!r} must be a list: write [{self.null_values}]")
        if self.null_values is not None and not isinstance(self.null_values, list | tuple):
            raise ValueError(f"csv.null_values={self.null_values!r} must be a list, such as [NA]")
        if self.null_values is not None and not all(isinstance(value, str) for value in self.null_values):
            raise ValueError(f"csv.null_values={self.null_values!r} must be strings; put quotes around null")


def _is_one_character(text: Any, forbidden: str) -> bool:
    return isinstance(text, str) and len(text) == 1 and text.isascii() and text not in forbidden


def stream_csv(
    stream: pa.NativeFile,
    source: str,
    form: CSVFormat,
    default_delimiter: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    batch_rows: int,
    warn: Callable[[str], object],
) -> Iterator[pa.Table]:
    """Streams the chosen columns of a CSV file as strings, in tables of at most `batch_rows` rows.

    Args:
        stream: the file's bytes, decompressed.
        source: name of the file, for error messages.
        form: format of the file.
        default_delimiter: the delimiter if `form` sets none.
        choose: returns the columns to read, given the names of all columns.
        batch_rows: maximum number of rows of a table.
        warn: called at the end of the file if it holds words that may mean a missing value.

    Raises:
        InputError: the file can't be read, or is ambiguous.
    """
    reader = _Reader(source, form, form.delimiter or default_delimiter)
    blocks = reader.blocks(stream)
    names = reader.header(next(blocks, b""))
    wanted = list(choose(names))
    nulls = _NullWords(form.null_values)
    is_empty = True
    for block in blocks:
        table = nulls.replaced(reader.parsed(block, wanted))
        for start in range(0, len(table), batch_rows):
            is_empty = False
            yield table.slice(start, batch_rows)
    if is_empty:
        yield pa.schema([(name, pa.string()) for name in wanted]).empty_table()
    if counts := nulls.counts():
        warn(f"{printable(source)}: {counts}")


class _NullWords:
    """Replaces the values that mean "missing" by null, or counts the words that may mean it."""

    def __init__(self, null_values: Sequence[str] | None) -> None:
        self._null_values = null_values
        self._words = pa.array(NULL_WORDS if null_values is None else null_values, pa.string())
        self._longest = max((len(word.encode()) for word in self._words.to_pylist()), default=0)
        self._counts: dict[str, Counter[str]] = {}

    def replaced(self, table: pa.Table) -> pa.Table:
        if not len(self._words):
            return table
        columns = {}
        for name in table.column_names:
            column = table[name]
            # White space around a value is ignored, as in `data.schema`.
            stripped = pc.utf8_trim_whitespace(column)
            found = pc.is_in(stripped, value_set=self._words)
            if self._null_values is None:
                if pc.any(found).as_py():
                    values = stripped.filter(found).value_counts()
                    counts = self._counts.setdefault(name, Counter())
                    counts.update({v["values"]: v["counts"] for v in values.to_pylist()})
            else:
                column = pc.if_else(found, pa.scalar(None, pa.string()), column)
            columns[name] = column
        return pa.table(columns)

    def counts(self) -> str:
        """Describes how often fields hold such words, and which setting to use; empty if there are none."""
        if not self._counts:
            return ""
        counts = "; ".join(
            f"field {name!r}: " + ", ".join(f"{word} ({number})" for word, number in sorted(words.items()))
            for name, words in self._counts.items()
        )
        found = sorted({word for of_field in self._counts.values() for word in of_field})
        # Without quotes, YAML may not read these words as strings.
        listed = ", ".join(f'"{word}"' if word.lower() in ("null", "nan") else word for word in found)
        return (
            f"these words are read as values, not as missing: {printable(counts)}. If they mean that a value is "
            f"missing, set csv.null_values: [{listed}]; if not, set csv.null_values: []"
        )


class _Reader:
    """Reads one file in blocks of whole rows and parses them."""

    def __init__(self, source: str, form: CSVFormat, delimiter: str) -> None:
        self._source = source
        self._delimiter = delimiter
        quote = form.quote
        if quote is None and delimiter in _QUOTED_DELIMITERS:
            quote = True
        self._quote = quote
        self._escape = form.escape
        if form.escape and quote is None:
            raise InputError("csv.escape is set, so set csv.quote to true or false as well", source=source)
        self._cutter = RowCutter(source, delimiter, quote, form.escape, is_quote_given=form.quote is not None)

    def blocks(self, stream: pa.NativeFile) -> Iterator[bytes]:
        """Yields the header's bytes, then blocks of whole rows. Escaped quotes are replaced by doubled quotes."""
        rest, is_start, has_header = b"", True, False
        try:
            while chunk := stream.read(max(_BLOCK_BYTES, len(rest))):
                data = rest + chunk
                if is_start and len(data) >= 3:
                    data, is_start = data.removeprefix(b"\xef\xbb\xbf"), False
                if is_start:
                    rest = data
                    continue
                if not has_header:
                    data = data.lstrip(b"\r\n")
                    end, line = self._cutter.first_row(data, is_last=False)
                    if end:
                        yield line
                        data, has_header = data[end:], True
                if has_header:
                    end, block = self._cutter.rows(data, is_last=False)
                    if end:
                        yield block
                        data = data[end:]
                rest = data
                if len(rest) > _MOST_ROW_BYTES:
                    # If a quote is the reason, this raises an error about the quote.
                    self._cutter.rows(rest, is_last=True)
                    self._cutter.fail(f"a row is longer than {_MOST_ROW_BYTES >> 20} MiB; repair the file", rest, 0)
            rest = rest.removeprefix(b"\xef\xbb\xbf") if is_start else rest
            if not has_header:
                rest = rest.lstrip(b"\r\n")
                if not rest:
                    message = "the file is empty; its first line must name the columns"
                    raise InputError(message, source=self._source)
                end, line = self._cutter.first_row(rest, is_last=True)
                yield line
                rest = rest[end:]
            if rest:
                yield self._cutter.rows(rest, is_last=True)[1]
        except (pa.ArrowException, OSError) as error:
            message = (
                f"not readable as CSV from row {self._cutter.rows_read} on ({error}); write or download the file again"
            )
            raise InputError(message, source=self._source) from error

    def header(self, line: bytes) -> list[str]:
        """Parses the column names."""
        options: dict[str, Any] = {"delimiter": self._delimiter}
        if not self._quote:
            options |= {"quoting": csv.QUOTE_NONE, "escapechar": self._escape or None}
        text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
        try:
            names = next(csv.reader([text], **options))
        except csv.Error as error:
            raise InputError(f"the header can't be read ({error}); correct it", source=self._source) from error
        for name in names:
            try:
                name.encode("utf-8")
            except UnicodeEncodeError as error:
                value = name.encode("utf-8", "surrogateescape")
                message = "the header is not UTF-8; convert the file to UTF-8"
                raise InputError(message, source=self._source, value=value) from error
        self._cutter.names = names
        return names

    def parsed(self, block: bytes, wanted: Sequence[str]) -> pa.Table:
        """Parses the wanted columns of a block of whole rows."""
        try:
            table = self._read(block, wanted, use_threads=True)
        except pa.ArrowException:
            # With several threads, Arrow's errors lack the row number.
            try:
                table = self._read(block, wanted, use_threads=False)
            except pa.ArrowException as error:
                raise self._error(str(error)) from error
        if len(self._cutter.names) == 1:
            self._refuse_empty_lines(block, table)
        self._cutter.rows_read += len(table)
        return table

    def _read(self, block: bytes, wanted: Sequence[str], *, use_threads: bool, skip_empty: bool = True) -> pa.Table:
        escape = self._escape if not self._quote else None
        return pv.read_csv(
            pa.BufferReader(block),
            read_options=pv.ReadOptions(
                use_threads=use_threads, block_size=len(block) + 1, column_names=self._cutter.names
            ),
            parse_options=pv.ParseOptions(
                delimiter=self._delimiter,
                quote_char='"' if self._quote else False,
                escape_char=escape or False,
                newlines_in_values=self._cutter.has_line_breaks,
                ignore_empty_lines=skip_empty,
            ),
            convert_options=pv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=False,
            ),
        )

    def _refuse_empty_lines(self, block: bytes, table: pa.Table) -> None:
        """Raises InputError on an empty line in a file of one column, which Arrow writes for a missing value.

        Other programs ignore such a line, so its meaning is ambiguous.
        """
        with_empty = self._read(block, self._cutter.names, use_threads=False, skip_empty=False)
        if len(with_empty) == len(table):
            return
        values = self._read(block, self._cutter.names, use_threads=False)[0].to_pylist()
        pairs = zip(with_empty[0].to_pylist(), [*values, None], strict=False)
        row = next(i for i, (one, other) in enumerate(pairs) if one != other)
        message = 'an empty line in a file of one column; write "" for a missing value, or remove the line'
        raise InputError(message, source=self._source, field=self._cutter.names[0], row=self._cutter.rows_read + row)

    def _error(self, text: str) -> InputError:
        """Converts Arrow's error message for a block to an InputError.

        Arrow's `invalid_row_handler` would tell less about a row with too few or too many values. Errors that it raises
        are lost, and it is not called for a row that is not UTF-8. With several threads it lacks the row number.
        """
        row = re.search(r"Row #(\d+)", text)
        number = self._cutter.rows_read + int(row.group(1)) - 1 if row else None
        if ragged := re.search(r"Expected (\d+) columns, got (\d+): (.*)", text, re.DOTALL):
            expected, got, value = ragged.groups()
            message = (
                f"the row has {got} values, but the header has {expected}; correct the row, quote values that hold a "
                "delimiter, or set csv.delimiter"
            )
            return InputError(message, source=self._source, row=number, value=value)
        if "UTF8" in text:
            column = re.search(r"CSV column #(\d+)", text)
            field = self._cutter.names[int(column.group(1))] if column else None
            message = "not UTF-8; convert the file to UTF-8"
            return InputError(message, source=self._source, field=field, row=number)
        message = f"not readable as CSV ({text}); write or download the file again"
        return InputError(message, source=self._source, row=number)
