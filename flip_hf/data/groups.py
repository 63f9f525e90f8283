"""The groups within which GAUC and UAUC compare rows, such as the rows of one user."""

import hashlib

import numpy as np
import pyarrow as pa

from flip_hf.data.schema import canonical_strings

GROUP_COLUMN = "group"
"""The column of encoded rows that holds each row's group."""
NO_GROUP = -1
"""The group of a row whose value is missing; GAUC and UAUC ignore such rows."""


def group_ids(
    column: pa.Array | pa.ChunkedArray, name: str, *, first_row: int = 0, source: str | None = None
) -> np.ndarray:
    """Returns a whole number for each row's group, int64 (rows,); `NO_GROUP` where the value is missing.

    Equal values get the same number in every table and every process. Numbers are used because a tensor can't hold
    strings. The number is a 63-bit hash: the probability that any two of a million groups share one is 5e-8.

    Args:
        column: the values, such as user ids.
        name: name of the column, for error messages.
        first_row: row number of the first value, for error messages.
        source: name of the file or dataset, for error messages.

    Raises:
        InputError: a value can't be an id.
    """
    strings, _ = canonical_strings(column, name, first_row=first_row, source=source)
    encoded = strings.dictionary_encode()
    hashes = (hashlib.blake2b(value.encode(), digest_size=8).digest() for value in encoded.dictionary.to_pylist())
    numbers = np.array([*(int.from_bytes(found, "little") >> 1 for found in hashes), NO_GROUP], np.int64)
    groups: np.ndarray = numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy()]
    return groups
