"""The groups of rows that GAUC and UAUC compare within, such as those of a user."""

import hashlib

import numpy as np
import pyarrow as pa

from flip_hf.data.schema import canonical_strings

GROUP_COLUMN = "group"
"""The column of encoded rows that holds each row's group."""
NO_GROUP = -1
"""The group of a row whose value is missing; GAUC and UAUC leave such rows out."""


def group_ids(
    column: pa.Array | pa.ChunkedArray, name: str, *, first_row: int = 0, source: str | None = None
) -> np.ndarray:
    """A whole number for each row's group, int64 (rows,): `NO_GROUP` where the value is missing.

    Equal values have the same number in every table and every process, as a tensor can hold no strings. It is a hash of
    63 bits: among a million groups two share a number with a chance of 5e-8.

    Args:
        column: the values, such as ids of users.
        name: the column's name, for errors.
        first_row: number of the first row, for errors.
        source: where the rows come from, for errors.

    Raises:
        InputError: a value can't be an id.
    """
    strings, _ = canonical_strings(column, name, first_row=first_row, source=source)
    encoded = strings.dictionary_encode()
    hashes = (hashlib.blake2b(value.encode(), digest_size=8).digest() for value in encoded.dictionary.to_pylist())
    numbers = np.array([*(int.from_bytes(found, "little") >> 1 for found in hashes), NO_GROUP], np.int64)
    groups: np.ndarray = numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy()]
    return groups
