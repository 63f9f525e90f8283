"""Finds the ends of a CSV file's rows and the meaning of its quotes. Ambiguous files raise an error."""

from typing import NoReturn

import numpy as np

from flip_hf.data.schema import InputError

_MOST_HEADER_LINES = 64
_QUOTE, _BACKSLASH, _NEWLINE, _RETURN = b'"\\\n\r'
_ON_OR_OFF = "set csv.quote: true if quotes enclose values, or csv.quote: false if they are part of the values"
_ESCAPED = (
    "a backslash stands before a quote; set csv.escape: '\\' if it escapes the quote, as in Spark's files, or "
    "csv.escape: '' if it is part of the value"
)


class RowCutter:
    """Cuts the bytes of a CSV file into whole rows. Replaces escaped quotes by doubled quotes.

    Args:
        source: name of the file, for error messages.
        delimiter: the character between values.
        quote: whether quotes may enclose values; None if unknown.
        escape: the character that escapes quotes; an empty string if there is none, None if unknown.
        is_quote_given: whether the user set `quote`.

    Attributes:
        names: the column names; the caller sets them after reading the header.
        rows_read: number of rows before the bytes given to `rows`; the caller updates it.
        has_line_breaks: whether values in the rows that `rows` returned last may hold line breaks.
    """

    def __init__(
        self, source: str, delimiter: str, quote: bool | None, escape: str | None, *, is_quote_given: bool
    ) -> None:
        self._source = source
        self._delimiter = delimiter
        self._delimiter_byte = ord(delimiter)
        self._quote = quote
        self._is_quote_given = is_quote_given
        self._escape = escape
        # Indexed by the byte before a quote, and by the byte after it.
        self._may_open, self._may_close = np.zeros((2, 256), dtype=bool)
        self._may_open[[self._delimiter_byte, _NEWLINE]] = True
        self._may_close[[self._delimiter_byte, _NEWLINE, _RETURN]] = True
        self.names: list[str] = []
        self.rows_read = 0
        self.has_line_breaks = False

    def first_row(self, data: bytes, *, is_last: bool) -> tuple[int, bytes]:
        """Returns the first row's size in bytes (0 if more bytes are needed) and the row as `rows` returns it."""
        end = 0
        for _ in range(_MOST_HEADER_LINES):
            end = data.find(b"\n", end) + 1
            if end == 0:
                return self.rows(data, is_last=True) if is_last else (0, b"")
            size, row = self.rows(data[:end], is_last=False)
            if size:
                return size, row
        message = f"a quote in the header is not closed within {_MOST_HEADER_LINES} lines; correct the header"
        raise InputError(message, source=self._source)

    def rows(self, data: bytes, *, is_last: bool) -> tuple[int, bytes]:
        """Returns the number of bytes of the whole rows in the data, and these rows in the format of RFC 4180."""
        has_quotes = self._quote is not False and b'"' in data
        has_escapes = bool(self._escape) and str(self._escape).encode() in data
        structure = no_positions = np.zeros(0, dtype=np.int64)
        array = np.frombuffer(data, dtype=np.uint8)
        self.has_line_breaks = False
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
                self.fail("a quote is never closed; correct the file", data, int(opening), structure)
        if b"\r" in data and data.count(b"\r", 0, end) != data.count(b"\r\n", 0, end):
            self._refuse_bare_returns(data, array[:end], structure, escaped, is_last)
        if len(structure):
            within = newlines[is_within & (newlines < end)]
            self.has_line_breaks = bool(len(within))
            if self.has_line_breaks and self.names and not self._is_quote_given:
                self._refuse_swallowed_rows(data[:end], array[:end], structure[structure < end], newlines)
        elif not self._quote and len(escaped):
            self.has_line_breaks = True
        block = data[:end]
        if len(escaped):
            block = self._unescaped(block, array[:end], structure, escaped[escaped < end])
        return end, block

    def _escaped(self, array: np.ndarray) -> np.ndarray:
        """Returns the positions of bytes that follow an escape character, int64 (bytes,)."""
        escapes = np.flatnonzero(array == ord(str(self._escape)))
        is_first = np.concatenate([[True], np.diff(escapes) > 1])
        place = np.arange(len(escapes))
        in_run = place - np.maximum.accumulate(np.where(is_first, place, 0))
        escaped: np.ndarray = escapes[in_run % 2 == 0] + 1
        return escaped[escaped < len(array)]

    def _opens(self, array: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Returns whether a value starts at each quote, bool (quotes,)."""
        is_start = self._may_open[array[quotes - 1]]
        is_start[:1] |= quotes[:1] == 0
        return is_start

    def _structure(self, data: bytes, array: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Returns the quotes that enclose values or are doubled in them, int64 (quotes,); every other one opens."""
        if not len(quotes):
            return quotes
        opens = self._opens(array, quotes)
        after_backslash = np.zeros(len(quotes), dtype=bool)
        if self._escape is None and b"\\" in data:
            after_backslash = (array[quotes - 1] == _BACKSLASH) & (quotes > 0)
        if self._quote is None:
            if opens.any():
                self.fail(f"the value starts with a quote; {_ON_OR_OFF}", data, int(quotes[opens.argmax()]))
            if after_backslash.any():
                self.fail(_ESCAPED, data, int(quotes[after_backslash.argmax()]))
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
            self.fail(_ESCAPED, data, int(quotes[first]), structure)
        return structure

    def _walked(
        self, data: bytes, quotes: np.ndarray, opens: np.ndarray, closes: np.ndarray, leads: np.ndarray
    ) -> np.ndarray:
        """Computes `_structure` quote by quote, for a block with quotes inside values that are not quoted."""
        kept: list[int] = []
        i, count = 0, len(quotes)
        while i < count:
            position = int(quotes[i])
            if not opens[i]:
                before = data[:position].rstrip(b" ")
                if len(before) < position and (not before or before[-1] in (self._delimiter_byte, _NEWLINE)):
                    message = "spaces stand before the quote; remove them, or set csv.quote: false"
                    self.fail(message, data, position, quotes[kept])
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
                self.fail(message, data, position, quotes[kept[:-1]])
            kept.append(i)
            i += 1
        structure: np.ndarray = quotes[kept]
        return structure

    def _refuse_bare_returns(
        self, data: bytes, array: np.ndarray, structure: np.ndarray, escaped: np.ndarray, is_last: bool
    ) -> None:
        """Raises on a carriage return without a line feed: it may be part of a value, or other programs' line break."""
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
            self.fail(message, data, int(returns[is_bare.argmax()]), structure)

    def _refuse_swallowed_rows(
        self, data: bytes, array: np.ndarray, structure: np.ndarray, newlines: np.ndarray
    ) -> None:
        """Raises if a quoted value with line breaks may instead be several rows, with the quotes part of the values.

        Several rows are likely if a line within the value has as many delimiters as the header. They are also likely if
        both its first and its last line have as many.
        """
        newlines = newlines[newlines < len(array)]
        is_opening = np.concatenate([[True], structure[2::2] - structure[1:-1:2] > 1])
        # Doubled quotes split a value into several parts between quotes.
        value_of_part = np.cumsum(is_opening) - 1
        place = np.searchsorted(structure, newlines)
        (within,) = np.nonzero(place % 2)
        values = value_of_part[place[within] // 2]
        has_break = np.zeros(len(value_of_part), dtype=bool)
        has_break[values] = True
        delimiters = np.flatnonzero(array == self._delimiter_byte)
        place = np.searchsorted(structure, delimiters)
        # Delimiters within a quoted value that ends on the same line don't count.
        counted = place % 2 == 0
        counted[~counted] = has_break[value_of_part[place[~counted] // 2]]
        numbers = np.bincount(np.searchsorted(newlines, delimiters[counted]), minlength=len(newlines) + 1)
        is_like_row = numbers == len(self.names) - 1
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
            self.fail(message, data, position, structure)

    def _unescaped(self, data: bytes, array: np.ndarray, structure: np.ndarray, escaped: np.ndarray) -> bytes:
        """Removes escape characters if quotes enclose values; otherwise Arrow interprets them.

        Programs that enclose values in quotes escape two characters within them: quotes and the escape character. In
        unquoted values, Python escapes too, but Spark does not. Characters that the two write differently therefore
        raise an error.
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
                f"the escape character before {chr(array[position])!r} can be read in two ways; write the file with "
                "doubled quotes, or as Parquet"
            )
            self.fail(message, data, position, structure)
        if not self._quote:
            return data
        escaped = escaped[is_within]
        is_quote = array[escaped] == _QUOTE
        doubled = array.copy()
        doubled[escaped[is_quote] - 1] = _QUOTE
        return np.delete(doubled, escaped[~is_quote]).tobytes()

    def fail(self, message: str, data: bytes, position: int, structure: np.ndarray | None = None) -> NoReturn:
        """Raises an InputError for the value at a position of `data`. Finds the value's row and field."""
        if not self.names:
            raise InputError(f"in the header, {message}", source=self._source, value=_shown(data[: position + 80]))
        quotes = np.zeros(0, dtype=np.int64) if structure is None else structure
        array = np.frombuffer(data, dtype=np.uint8)[:position]

        def outside(byte: int) -> np.ndarray:
            found = np.flatnonzero(array == byte)
            free: np.ndarray = found[np.searchsorted(quotes, found) % 2 == 0]
            return free

        starts = np.concatenate([[0], outside(_NEWLINE) + 1])
        lines = (data[start : end - 1] for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        row = self.rows_read + sum(line not in (b"", b"\r") for line in lines)
        before = outside(self._delimiter_byte)
        before = before[before >= starts[-1]]
        field = self.names[min(len(before), len(self.names) - 1)]
        begin = int(before[-1]) + 1 if len(before) else int(starts[-1])
        value = _shown(data[begin : begin + 400])
        if not self._quote:
            value = value.split(self._delimiter)[0]
        raise InputError(message, source=self._source, field=field, row=row, value=value)


def _shown(data: bytes) -> str:
    return data.split(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace")
