"""CSV files -> Arrow tables, in a stream, and never by guessing what a quote means."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from flip_hf.data.schema import InputError
from flip_hf.fields import printable

NULL_WORDS = ("NA", "N/A", "n/a", "NULL", "null", "None", "NaN", "nan", r"\N")
"""What other programs write for a missing value. Here they are values, and a warning counts them."""

# How much of a file is parsed at a time.
_BLOCK_BYTES = 1 << 21
# A row must fit into memory. A quote that is never closed makes a row of the rest of the file.
_MOST_ROW_BYTES = 1 << 26
_MOST_HEADER_LINES = 64
_QUOTE, _BACKSLASH, _NEWLINE, _RETURN = b'"\\\n\r'
# Delimiters beside which all common programs enclose values in quotes. With others, about half of the programs do.
_QUOTED_DELIMITERS = (",", ";")

_ON_OR_OFF = "set csv.quote: true if quotes enclose values, or csv.quote: false if they are part of the values"
_ESCAPED = (
    "a backslash stands before a quote; set csv.escape: '\\' if it escapes the quote, as in Spark's files, or "
    "csv.escape: '' if it is part of the value"
)


@dataclass(frozen=True)
class CSVFormat:
    """How CSV files are written. What is left unset and matters is an error that names the setting.

    Args:
        delimiter: the character between values. By default a tab if the file's name says `.tsv`, else a comma.
        quote: true: double quotes may enclose values. false: a quote is a character like any other. By default true for
            commas and semicolons. For other delimiters, a value that begins with a quote is an error by default.
        escape: the character that escapes quotes, such as the backslash in Spark's files. An empty string says that
            there is none. By default there is none, and a backslash before a quote is an error.
        null_values: values that mean "missing", such as `[NA, "null"]`. By default only empty values do, and a warning
            counts the words that other programs write for a missing value.

    Raises:
        ValueError: a setting is not what it must be.
    """

    delimiter: str | None = None
    quote: bool | None = None
    escape: str | None = None
    null_values: list[str] | None = None

    def __post_init__(self) -> None:
        forbidden = '"\r\n'
        if self.delimiter is not None and not _is_one_character(self.delimiter, forbidden):
            raise ValueError(
                f"csv.delimiter={self.delimiter!r} must be one ASCII character, and no quote or line break"
            )
        if self.quote is not None and not isinstance(self.quote, bool):
            raise ValueError(f"csv.quote={self.quote!r} must be true or false, without quotes")
        if self.escape not in (None, "") and not _is_one_character(self.escape, forbidden + (self.delimiter or "")):
            raise ValueError(
                f"csv.escape={self.escape!r} must be one ASCII character, no quote, line break or delimiter. Doubled "
                "quotes need no setting"
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
    """The chosen columns of a CSV file as strings, in tables of at most `batch_rows` rows.

    Args:
        stream: the file's bytes, decompressed.
        source: the file's name, for errors.
        form: how the file is written.
        default_delimiter: the delimiter if `form` names none.
        choose: the columns to take, given the names of all.
        batch_rows: most rows of a table.
        warn: is called at the end of the file if words in it may mean that a value is missing.

    Raises:
        InputError: the file can't be read, or can be read in two ways.
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
    """Makes the values that mean "missing" null, or counts the words that may mean it."""

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
            # White space around a value means nothing: `data.schema` strips it, too.
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
        """How often fields hold such words, and what to set; empty if none does."""
        if not self._counts:
            return ""
        counts = "; ".join(
            f"field {name!r}: " + ", ".join(f"{word} ({number})" for word, number in sorted(words.items()))
            for name, words in self._counts.items()
        )
        found = sorted({word for of_field in self._counts.values() for word in of_field})
        # As YAML would otherwise not read strings.
        listed = ", ".join(f'"{word}"' if word.lower() in ("null", "nan") else word for word in found)
        return (
            f"these words are read as values, not as missing: {printable(counts)}. If they mean that a value is "
            f"missing, set csv.null_values: [{listed}]; if not, set csv.null_values: []"
        )


class _Reader:
    """Cuts one file into blocks of whole rows, checks what its quotes mean, and parses them."""

    def __init__(self, source: str, form: CSVFormat, delimiter: str) -> None:
        self._source = source
        self._delimiter = delimiter
        self._delimiter_byte = ord(delimiter)
        quote = form.quote
        if quote is None and delimiter in _QUOTED_DELIMITERS:
            quote = True
        # None: nobody has said what a quote at the beginning of a value means.
        self._quote = quote
        self._is_quote_given = form.quote is not None
        self._escape = form.escape
        if form.escape and quote is None:
            raise InputError("with csv.escape, set csv.quote to true or false as well", source=source)
        # By the byte before a quote, and the byte after it.
        self._may_open, self._may_close = np.zeros((2, 256), dtype=bool)
        self._may_open[[self._delimiter_byte, _NEWLINE]] = True
        self._may_close[[self._delimiter_byte, _NEWLINE, _RETURN]] = True
        self._names: list[str] = []
        self._rows_read = 0
        self._has_line_breaks = False

    def blocks(self, stream: pa.NativeFile) -> Iterator[bytes]:
        """The header's bytes, then blocks of whole rows, with quotes doubled where they were escaped."""
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
                    end, line = self._first_row(data, is_last=False)
                    if end:
                        yield line
                        data, has_header = data[end:], True
                if has_header:
                    end, block = self._rows(data, is_last=False)
                    if end:
                        yield block
                        data = data[end:]
                rest = data
                if len(rest) > _MOST_ROW_BYTES:
                    # Says so if the reason is a quote.
                    self._rows(rest, is_last=True)
                    self._fail(f"a row is longer than {_MOST_ROW_BYTES >> 20} MiB; mend the file", rest, 0)
            rest = rest.removeprefix(b"\xef\xbb\xbf") if is_start else rest
            if not has_header:
                rest = rest.lstrip(b"\r\n")
                if not rest:
                    message = "the file is empty; its first line must name the columns"
                    raise InputError(message, source=self._source)
                end, line = self._first_row(rest, is_last=True)
                yield line
                rest = rest[end:]
            if rest:
                yield self._rows(rest, is_last=True)[1]
        except (pa.ArrowException, OSError) as error:
            message = f"not readable as CSV from row {self._rows_read} on ({error}); write or fetch the file again"
            raise InputError(message, source=self._source) from error

    def header(self, line: bytes) -> list[str]:
        """The columns' names."""
        options: dict[str, Any] = {"delimiter": self._delimiter}
        if not self._quote:
            options |= {"quoting": csv.QUOTE_NONE, "escapechar": self._escape or None}
        text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
        try:
            names = next(csv.reader([text], **options))
        except csv.Error as error:
            raise InputError(f"the header can't be read ({error}); mend it", source=self._source) from error
        for name in names:
            try:
                name.encode("utf-8")
            except UnicodeEncodeError as error:
                value = name.encode("utf-8", "surrogateescape")
                message = "the header is not UTF-8; convert the file to UTF-8"
                raise InputError(message, source=self._source, value=value) from error
        self._names = names
        return names

    def parsed(self, block: bytes, wanted: Sequence[str]) -> pa.Table:
        """The wanted columns of a block of whole rows."""
        try:
            table = self._read(block, wanted, use_threads=True)
        except pa.ArrowException:
            # With several threads Arrow's errors do not say the row.
            try:
                table = self._read(block, wanted, use_threads=False)
            except pa.ArrowException as error:
                raise self._error(str(error)) from error
        if len(self._names) == 1:
            self._refuse_empty_lines(block, table)
        self._rows_read += len(table)
        return table

    def _read(self, block: bytes, wanted: Sequence[str], *, use_threads: bool, skip_empty: bool = True) -> pa.Table:
        escape = self._escape if not self._quote else None
        return pv.read_csv(
            pa.BufferReader(block),
            read_options=pv.ReadOptions(use_threads=use_threads, block_size=len(block) + 1, column_names=self._names),
            parse_options=pv.ParseOptions(
                delimiter=self._delimiter,
                quote_char='"' if self._quote else False,
                escape_char=escape or False,
                newlines_in_values=self._has_line_breaks,
                ignore_empty_lines=skip_empty,
            ),
            convert_options=pv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=False,
            ),
        )

    def _refuse_empty_lines(self, block: bytes, table: pa.Table) -> None:
        """In a file of one column an empty line may be a missing value, as Arrow writes it, or nothing."""
        with_empty = self._read(block, self._names, use_threads=False, skip_empty=False)
        if len(with_empty) == len(table):
            return
        values = self._read(block, self._names, use_threads=False)[0].to_pylist()
        pairs = zip(with_empty[0].to_pylist(), [*values, None], strict=False)
        row = next(i for i, (one, other) in enumerate(pairs) if one != other)
        message = 'an empty line in a file of one column; write "" for a missing value, or remove the line'
        raise InputError(message, source=self._source, field=self._names[0], row=self._rows_read + row)

    def _error(self, text: str) -> InputError:
        row = re.search(r"Row #(\d+)", text)
        number = self._rows_read + int(row.group(1)) - 1 if row else None
        if ragged := re.search(r"Expected (\d+) columns, got (\d+): (.*)", text, re.DOTALL):
            expected, got, value = ragged.groups()
            message = (
                f"the row has {got} values and the header {expected}; mend the row, quote what holds a delimiter, or "
                "set csv.delimiter"
            )
            return InputError(message, source=self._source, row=number, value=value)
        if "UTF8" in text:
            column = re.search(r"CSV column #(\d+)", text)
            field = self._names[int(column.group(1))] if column else None
            message = "not UTF-8; convert the file to UTF-8"
            return InputError(message, source=self._source, field=field, row=number)
        message = f"not readable as CSV ({text}); write or fetch the file again"
        return InputError(message, source=self._source, row=number)

    def _first_row(self, data: bytes, *, is_last: bool) -> tuple[int, bytes]:
        """Where the first row ends, and the row as `_rows` has it; 0 if more bytes are needed to know."""
        end = 0
        for _ in range(_MOST_HEADER_LINES):
            end = data.find(b"\n", end) + 1
            if end == 0:
                return self._rows(data, is_last=True) if is_last else (0, b"")
            size, row = self._rows(data[:end], is_last=False)
            if size:
                return size, row
        message = f"a quote in the header is not closed within {_MOST_HEADER_LINES} lines; mend the header"
        raise InputError(message, source=self._source)

    def _rows(self, data: bytes, *, is_last: bool) -> tuple[int, bytes]:
        """How many bytes the whole rows in the data take, and these rows as RFC 4180 has them."""
        has_quotes = self._quote is not False and b'"' in data
        has_escapes = bool(self._escape) and str(self._escape).encode() in data
        structure = no_positions = np.zeros(0, dtype=np.int64)
        array = np.frombuffer(data, dtype=np.uint8)
        self._has_line_breaks = False
        if has_quotes or has_escapes:
            escaped = self._escaped(array) if has_escapes else no_positions
            if has_quotes:
                quotes = np.flatnonzero(array == _QUOTE)
                if len(escaped):
                    quotes = quotes[~np.isin(quotes, escaped)]
                structure = self._structure(data, array, quotes)
            newlines = np.flatnonzero(array == _NEWLINE)
            is_within = np.searchsorted(structure, newlines) % 2 == 1
            if not self._quote:
                is_within |= np.isin(newlines, escaped)
            ends = newlines[~is_within]
            end = int(ends[-1]) + 1 if len(ends) else 0
        else:
            escaped = no_positions
            end = data.rfind(b"\n") + 1
        if is_last:
            end = len(data)
            if len(structure) % 2:
                opening = structure[self._opens(array, structure)][-1]
                self._fail("a quote is never closed; mend the file", data, int(opening), structure)
        if b"\r" in data and data.count(b"\r", 0, end) != data.count(b"\r\n", 0, end):
            self._refuse_bare_returns(data, array[:end], structure, escaped, is_last)
        if len(structure):
            within = newlines[is_within & (newlines < end)]
            self._has_line_breaks = bool(len(within))
            if self._has_line_breaks and self._names and not self._is_quote_given:
                self._refuse_swallowed_rows(data[:end], array[:end], structure[structure < end], newlines)
        elif not self._quote and len(escaped):
            self._has_line_breaks = True
        block = data[:end]
        if len(escaped):
            block = self._unescaped(block, array[:end], structure, escaped[escaped < end])
        return end, block

    def _escaped(self, array: np.ndarray) -> np.ndarray:
        """The positions of bytes that an escape character stands before, int64 (bytes,)."""
        escapes = np.flatnonzero(array == ord(str(self._escape)))
        is_first = np.concatenate([[True], np.diff(escapes) > 1])
        place = np.arange(len(escapes))
        in_run = place - np.maximum.accumulate(np.where(is_first, place, 0))
        escaped: np.ndarray = escapes[in_run % 2 == 0] + 1
        return escaped[escaped < len(array)]

    def _opens(self, array: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Whether a value begins at each quote, bool (quotes,)."""
        is_start = self._may_open[array[quotes - 1]]
        is_start[:1] |= quotes[:1] == 0
        return is_start

    def _structure(self, data: bytes, array: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """The quotes that enclose values or stand doubled in such values, int64 (quotes,): every other one opens."""
        if not len(quotes):
            return quotes
        opens = self._opens(array, quotes)
        after_backslash = np.zeros(len(quotes), dtype=bool)
        if self._escape is None and b"\\" in data:
            after_backslash = (array[quotes - 1] == _BACKSLASH) & (quotes > 0)
        if self._quote is None:
            if opens.any():
                self._fail(f"the value begins with a quote; {_ON_OR_OFF}", data, int(quotes[opens.argmax()]))
            if after_backslash.any():
                self._fail(_ESCAPED, data, int(quotes[after_backslash.argmax()]))
            return quotes[:0]
        closes = self._may_close[array[np.minimum(quotes + 1, len(array) - 1)]]
        closes[-1] |= quotes[-1] + 1 == len(array)
        is_next = np.diff(quotes) == 1
        follows, leads = np.concatenate([[False], is_next]), np.concatenate([is_next, [False]])
        is_odd = np.arange(len(quotes)) % 2 == 1
        if np.where(is_odd, closes | leads, opens | follows).all() and not after_backslash.any():
            return quotes
        first = int(after_backslash.argmax()) if after_backslash.any() else len(quotes)
        structure = self._walked(data, quotes[:first], opens, closes, leads)
        if first < len(quotes):
            self._fail(_ESCAPED, data, int(quotes[first]), structure)
        return structure

    def _walked(
        self, data: bytes, quotes: np.ndarray, opens: np.ndarray, closes: np.ndarray, leads: np.ndarray
    ) -> np.ndarray:
        """The structure of a block with quotes inside values that no quotes enclose, quote by quote."""
        kept: list[int] = []
        i, count = 0, len(quotes)
        while i < count:
            position = int(quotes[i])
            if not opens[i]:
                before = data[:position].rstrip(b" ")
                if len(before) < position and (not before or before[-1] in (self._delimiter_byte, _NEWLINE)):
                    message = "spaces stand before the quote; remove them, or set csv.quote: false"
                    self._fail(message, data, position, quotes[kept])
                i += 1
                continue
            kept.append(i)
            i += 1
            while i < count and leads[i]:
                kept += [i, i + 1]
                i += 2
            if i == count:
                break
            if not closes[i]:
                message = (
                    "text follows the quote that closes the value; set csv.quote: false if quotes are part of the "
                    "values, or double the quotes within it"
                )
                self._fail(message, data, position, quotes[kept[:-1]])
            kept.append(i)
            i += 1
        structure: np.ndarray = quotes[kept]
        return structure

    def _refuse_bare_returns(
        self, data: bytes, array: np.ndarray, structure: np.ndarray, escaped: np.ndarray, is_last: bool
    ) -> None:
        """A carriage return that no line feed follows may be part of a value, or a line break for other programs."""
        returns = np.flatnonzero(array == _RETURN)
        is_free = np.searchsorted(structure, returns) % 2 == 0
        if not self._quote:
            is_free &= ~np.isin(returns, escaped)
        returns = returns[is_free]
        is_bare = array[np.minimum(returns + 1, len(array) - 1)] != _NEWLINE
        if is_last:
            is_bare &= returns + 1 < len(array)
        if is_bare.any():
            message = "a carriage return without a line feed; end lines with a line feed, or quote the value"
            self._fail(message, data, int(returns[is_bare.argmax()]), structure)

    def _refuse_swallowed_rows(
        self, data: bytes, array: np.ndarray, structure: np.ndarray, newlines: np.ndarray
    ) -> None:
        """A value with line breaks may be one value, or rows between two quotes that are part of their values.

        Rows are likely if a line within the value has as many delimiters as the header, or if both the first and the
        last of its lines have.
        """
        newlines = newlines[newlines < len(array)]
        is_opening = np.concatenate([[True], structure[2::2] - structure[1:-1:2] > 1])
        # Doubled quotes cut a value into several parts between quotes.
        value_of_part = np.cumsum(is_opening) - 1
        place = np.searchsorted(structure, newlines)
        (within,) = np.nonzero(place % 2)
        values = value_of_part[place[within] // 2]
        has_break = np.zeros(len(value_of_part), dtype=bool)
        has_break[values] = True
        delimiters = np.flatnonzero(array == self._delimiter_byte)
        place = np.searchsorted(structure, delimiters)
        # Delimiters within a quoted value that ends on its line are none.
        counted = place % 2 == 0
        counted[~counted] = has_break[value_of_part[place[~counted] // 2]]
        numbers = np.bincount(np.searchsorted(newlines, delimiters[counted]), minlength=len(newlines) + 1)
        is_like_row = numbers == len(self._names) - 1
        is_first = np.concatenate([[True], np.diff(values) > 0])
        is_last = np.concatenate([np.diff(values) > 0, [True]])
        suspects = values[~is_first & is_like_row[within]]
        both = is_like_row[within[is_first]] & is_like_row[within[is_last] + 1]
        suspects = np.concatenate([suspects, values[is_first][both]])
        if len(suspects):
            position = int(structure[::2][is_opening][suspects.min()])
            message = (
                "the quoted value holds a line break and lines that look like rows; set csv.quote: true if it is one "
                "value, or csv.quote: false if quotes are part of the values"
            )
            self._fail(message, data, position, structure)

    def _unescaped(self, data: bytes, array: np.ndarray, structure: np.ndarray, escaped: np.ndarray) -> bytes:
        """The data without escape characters if quotes enclose values, else as it is for Arrow to read.

        Programs that enclose values in quotes escape quotes and escape characters within them. In values without
        quotes, Python escapes too and Spark does not, so what both write there in different ways is refused.
        """
        is_within = np.searchsorted(structure, escaped) % 2 == 1
        allowed = [_QUOTE, ord(str(self._escape))]
        special = [*allowed, self._delimiter_byte, _NEWLINE, _RETURN]
        if self._quote:
            is_wrong = np.where(is_within, ~np.isin(array[escaped], allowed), np.isin(array[escaped], special))
        else:
            is_wrong = ~np.isin(array[escaped], special)
        if is_wrong.any():
            position = int(escaped[is_wrong.argmax()])
            message = (
                f"the escape character stands before {chr(array[position])!r}, which can be read in two ways; write "
                "the file with doubled quotes, or as Parquet"
            )
            self._fail(message, data, position, structure)
        if not self._quote:
            return data
        escaped = escaped[is_within]
        is_quote = array[escaped] == _QUOTE
        doubled = array.copy()
        doubled[escaped[is_quote] - 1] = _QUOTE
        return np.delete(doubled, escaped[~is_quote]).tobytes()

    def _fail(self, message: str, data: bytes, position: int, structure: np.ndarray | None = None) -> NoReturn:
        """Raises the error for the value that holds a byte of the rows in `data`."""
        if not self._names:
            raise InputError(f"in the header, {message}", source=self._source, value=_shown(data[: position + 80]))
        quotes = np.zeros(0, dtype=np.int64) if structure is None else structure
        array = np.frombuffer(data, dtype=np.uint8)[:position]

        def outside(byte: int) -> np.ndarray:
            found = np.flatnonzero(array == byte)
            free: np.ndarray = found[np.searchsorted(quotes, found) % 2 == 0]
            return free

        starts = np.concatenate([[0], outside(_NEWLINE) + 1])
        lines = (data[start : end - 1] for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        row = self._rows_read + sum(line not in (b"", b"\r") for line in lines)
        before = outside(self._delimiter_byte)
        before = before[before >= starts[-1]]
        field = self._names[min(len(before), len(self._names) - 1)]
        begin = int(before[-1]) + 1 if len(before) else int(starts[-1])
        value = _shown(data[begin : begin + 400])
        if not self._quote:
            value = value.split(self._delimiter)[0]
        raise InputError(message, source=self._source, field=field, row=row, value=value)


def _shown(data: bytes) -> str:
    return data.split(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace")
