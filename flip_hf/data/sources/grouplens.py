"""Shared code of GroupLens' MovieLens datasets (Harper and Konstan 2015, https://doi.org/10.1145/2827872)."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.sources.base import HistoryField
from flip_hf.fields import FieldConfig

FIELDS = (
    FieldConfig("user_id", show_oov=False),
    FieldConfig("gender"),
    FieldConfig("age"),
    FieldConfig("occupation"),
    FieldConfig("zipcode"),
    FieldConfig("movie_id", show_oov=False),
    FieldConfig("title"),
    FieldConfig("genre"),
)

HISTORIES = (
    HistoryField(
        FieldConfig("liked_titles", kind="sequence", share_embedding="title", target="title", text_values=5),
        user="user_id",
        item="title",
        words={1: ""},
    ),
    # The average of this history also shows how often the user likes the titles that they rate.
    HistoryField(
        FieldConfig("rated_titles", kind="sequence", max_values=50, text_values=3),
        user="user_id",
        item="title",
        words={0: "disliked ", 1: "liked "},
    ),
)

LICENCE = (
    "GroupLens' own terms: research use with acknowledgement; no redistribution and no commercial use without "
    "permission from GroupLens; no claim of endorsement by the University of Minnesota or GroupLens. flip_hf "
    "does not distribute the data."
)

CITATION = (
    "@article{harper2015movielens,\n"
    "  author  = {Harper, F. Maxwell and Konstan, Joseph A.},\n"
    "  title   = {The {MovieLens} Datasets: History and Context},\n"
    "  journal = {ACM Transactions on Interactive Intelligent Systems},\n"
    "  volume  = {5},\n"
    "  number  = {4},\n"
    "  year    = {2015},\n"
    "  doi     = {10.1145/2827872}\n"
    "}"
)


class RawTables(NamedTuple):
    """The three raw tables, with rows in the files' order.

    Attributes:
        ratings: `user_id`, `movie_id`, `rating` (1 to 5), `timestamp` (seconds since 1970-01-01 UTC); int64.
        users: `user_id` as int64; `gender`, `occupation`, `zipcode` as strings; `age` in years as int64, or an age
            range as a string.
        movies: `movie_id` as int64; `title`; and `genre`, the movie's genres joined by a comma and a space.
    """

    ratings: pa.Table
    users: pa.Table
    movies: pa.Table


def integers(path: Path | zipfile.Path, name: str, column: list[str]) -> np.ndarray:
    """Parses a column of `read_columns` as int64. A wrong value raises a ValueError with the file and the line."""
    values = np.empty(len(column), dtype=np.int64)
    for i, text in enumerate(column):
        try:
            values[i] = int(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{path}, line {i + 1}: {name} is {text!r}, expected a whole number") from None
    return values


def ratings_table(path: Path | zipfile.Path, columns: list[list[str]]) -> pa.Table:
    """Builds `RawTables.ratings` from the four columns of the file at `path`."""
    names = ("user_id", "movie_id", "rating", "timestamp")
    return pa.table({name: integers(path, name, column) for name, column in zip(names, columns, strict=True)})


def check_counts(name: str, folder: Path, raw: RawTables, published: tuple[int, int, int]) -> None:
    """Raises a ValueError if the numbers of ratings, users and movies differ from the published ones."""
    counts = tuple(table.num_rows for table in raw)
    if counts != published:
        raise ValueError(
            f"{name} in {folder} has {counts[0]} ratings, {counts[1]} users and {counts[2]} movies; "
            f"expected {published[0]}, {published[1]} and {published[2]}. Delete that folder and load it again."
        )


def label_ratings(name: str, raw: RawTables, *, drops_threes: bool = True) -> pa.Table:
    """Returns one row per rating: the eight fields, `label` (int8; 1 above 3, else 0), `timestamp` (int64).

    Args:
        name: name of the dataset, for error messages.
        raw: its tables.
        drops_threes: whether to drop ratings of 3. If false, they are negative.

    Raises:
        ValueError: a rating's user or movie is missing from its table.
    """
    ratings = raw.ratings.filter(pc.not_equal(raw.ratings["rating"], 3)) if drops_threes else raw.ratings
    columns = {name: ratings[name] for name in ratings.column_names}
    for key, table in (("user_id", raw.users), ("movie_id", raw.movies)):
        rows = pc.index_in(ratings[key], table[key])
        if rows.null_count:
            missing = ratings[key].filter(pc.is_null(rows))[0]
            raise ValueError(f"{name}: a rating has {key} {missing}, which its table does not hold")
        columns |= {column: table[column].take(rows) for column in table.column_names if column != key}
    columns["label"] = pc.cast(pc.greater(ratings["rating"], 3), pa.int8())
    return pa.table({column: columns[column] for column in (*(field.name for field in FIELDS), "label", "timestamp")})
