"""Converts Arrow arrays of numbers, times and text to Arrow strings in canonical spelling."""

from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EXACT_BELOW = 2.0**53
"""From this value on, neighbouring whole numbers may round to the same float64."""

# Whole numbers from this value on are shown with an exponent.
_DIGITS_BELOW = 1e21


def spelled_decimals(column: pa.Array) -> pa.Array:
    """Spells decimals without leading or trailing zeros, independent of precision and scale."""
    return _of_distinct(column.cast(pa.string()), _shortest)


def spelled_times(column: pa.Array) -> pa.Array:
    """Spells timestamps and times of day, independent of unit and time zone."""
    kind = column.type
    has_zone = pa.types.is_timestamp(kind) and kind.tz is not None
    strings = (column.cast(pa.timestamp(kind.unit, "UTC")) if has_zone else column).cast(pa.string())
    if kind.unit != "s":
        strings = pc.replace_substring_regex(strings, r"\.?0*(Z?)$", r"\1")
    # Libraries without a date type store dates as timestamps at midnight.
    if pa.types.is_timestamp(kind) and not has_zone:
        strings = pc.replace_substring_regex(strings, " 00:00:00$", "")
    return strings


def composed(texts: pa.Array) -> pa.Array:
    """Converts texts to Unicode normal form C (NFC)."""
    is_ascii = pc.all(pc.string_is_ascii(texts)).as_py()
    return texts if is_ascii or is_ascii is None else pc.utf8_normalize(texts, form="NFC")


def spelled_floats(column: pa.Array) -> pa.Array:
    """Spells each number as the shortest decimal that reads back to it in the column's precision."""
    if not pa.types.is_float16(column.type):
        return column.cast(pa.string())
    # Arrow would spell the float64 value of each float16.
    numbers = column.cast(pa.float32()).fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float16)
    distinct, places = np.unique(numbers, return_inverse=True)
    return pa.array([str(number) for number in distinct], pa.string()).take(pa.array(places))


def shown_numbers(numbers: pa.Array, spelled: pa.Array | None) -> pa.Array:
    """Converts numbers to the strings that the text shows.

    Args:
        numbers: float64 array, finite or null.
        spelled: the integers or strings from which the numbers were read, if any.
    """
    shown = numbers.cast(pa.string())
    sizes = pc.abs(numbers)
    small = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less(sizes, EXACT_BELOW))
    if pc.any(small).as_py():
        shown = pc.if_else(small, pc.if_else(small, numbers, 0.0).cast(pa.int64()).cast(pa.string()), shown)
    large = pc.fill_null(pc.and_(pc.greater_equal(sizes, EXACT_BELOW), pc.less(sizes, _DIGITS_BELOW)), False)
    if pc.any(large).as_py():
        digits = (shown if spelled is None else spelled).filter(large).cast(pa.string())
        shown = pc.replace_with_mask(shown, large, _of_distinct(digits, _digits))
    return shown


def _of_distinct(strings: pa.Array, spell: Callable[[str], str]) -> pa.Array:
    """Applies `spell` to each distinct string once."""
    encoded = strings.dictionary_encode()
    return pa.array(map(spell, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)


def _shortest(decimal: str) -> str:
    """Removes trailing zeros after the decimal point, and the sign of zero."""
    digits = format(Decimal(decimal), "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def _digits(spelled: str) -> str:
    """Writes out a whole number that may have an exponent or a fraction of zeros."""
    return f"{Decimal(spelled):.0f}"
