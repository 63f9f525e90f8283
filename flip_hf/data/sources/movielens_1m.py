"""MovieLens-1M (Harper and Konstan 2015, https://doi.org/10.1145/2827872).

GroupLens publishes the raw files and forbids redistribution. They are downloaded when needed and cached unchanged.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from flip_hf.data.sources import grouplens
from flip_hf.data.sources.base import DatasetSource, Months
from flip_hf.data.sources.grouplens import RawTables, integers
from flip_hf.data.sources.lines import read_columns
from flip_hf.fetch import cache_dir, check_file, download, first_of

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MD5 = "c4d9eecfca2ab87c1945afe126590906"
"""MD5 of the archive, as published beside it by GroupLens."""

AGES = {
    "1": "Under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56+",
}
"""The age ranges for the codes in users.dat, as worded in GroupLens' README."""

OCCUPATIONS = {
    "0": "other or not specified",
    "1": "academic/educator",
    "2": "artist",
    "3": "clerical/admin",
    "4": "college/grad student",
    "5": "customer service",
    "6": "doctor/health care",
    "7": "executive/managerial",
    "8": "farmer",
    "9": "homemaker",
    "10": "K-12 student",
    "11": "lawyer",
    "12": "programmer",
    "13": "retired",
    "14": "sales/marketing",
    "15": "scientist",
    "16": "self-employed",
    "17": "technician/engineer",
    "18": "tradesman/craftsman",
    "19": "unemployed",
    "20": "writer",
}
"""The occupations for the codes in users.dat, as worded in GroupLens' README."""

N_RATINGS, N_USERS, N_MOVIES = 1_000_209, 6_040, 3_883


def parse_grouplens(folder: Path | zipfile.Path) -> RawTables:
    """Reads ratings.dat, users.dat and movies.dat from GroupLens' folder `ml-1m`.

    Replaces the codes of ages and occupations by words, because codes mean nothing to the text encoder.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a line does not match GroupLens' description; the message names the file and the line.
    """
    ratings = read_columns(folder / "ratings.dat", 4, lambda line: line.split("::"))
    users = read_columns(folder / "users.dat", 5, lambda line: line.split("::"))
    movies = read_columns(folder / "movies.dat", 3, _split_movie)
    return RawTables(
        ratings=grouplens.ratings_table(folder / "ratings.dat", ratings),
        users=pa.table(
            {
                "user_id": integers(folder / "users.dat", "user id", users[0]),
                "gender": users[1],
                "age": _words(folder / "users.dat", "age", users[2], AGES),
                "occupation": _words(folder / "users.dat", "occupation", users[3], OCCUPATIONS),
                "zipcode": users[4],
            }
        ),
        movies=pa.table(
            {
                "movie_id": integers(folder / "movies.dat", "movie id", movies[0]),
                "title": [title.strip() for title in movies[1]],
                "genre": [genres.replace("|", ", ") for genres in movies[2]],
            }
        ),
    )


def fetch() -> Path:
    """Returns the archive in `cache_dir()/movielens-1m`, or downloads it from GroupLens. See `DatasetSource.fetch`."""
    archive = cache_dir() / "movielens-1m" / "ml-1m.zip"
    return first_of(
        "MovieLens-1M",
        [
            ("archive in the cache", lambda: check_file(archive, "md5", MD5)),
            ("GroupLens", lambda: download(URL, archive, "md5", MD5)),
        ],
        f"Download {URL} by hand, put it at {archive} as it is, and try again.",
    )


def load() -> Dataset:
    """Returns all labelled rows in the order of ratings.dat. See `DatasetSource.load`.

    Raises:
        FetchError: as in `fetch`.
        ValueError: the tables' numbers of rows differ from the published ones.
    """
    return Dataset(grouplens.label_ratings("MovieLens-1M", _read()))


def load_with_threes() -> Dataset:
    """Returns all rows in the order of ratings.dat, with ratings of 3 as negative rows. See `Months.load`.

    Raises:
        FetchError: as in `fetch`.
        ValueError: as in `load`.
    """
    return Dataset(grouplens.label_ratings("MovieLens-1M", _read(), drops_threes=False))


def _read() -> RawTables:
    archive = fetch()
    raw = parse_grouplens(zipfile.Path(archive, "ml-1m/"))
    grouplens.check_counts("MovieLens-1M", archive.parent, raw, (N_RATINGS, N_USERS, N_MOVIES))
    return raw


def _split_movie(line: str) -> list[str]:
    # A title may hold colons, even at its end, so only the outer separators count.
    movie_id, *rest = line.split("::", 1)
    return [movie_id, *(part for both in rest for part in both.rsplit("::", 1))]


def _words(path: Path | zipfile.Path, name: str, codes: list[str], words: Mapping[str, str]) -> list[str]:
    for i, code in enumerate(codes):
        if code not in words:
            raise ValueError(f"{path}, line {i + 1}: {name} is {code!r}, expected one of {', '.join(words)}")
    return [words[code] for code in codes]


MOVIELENS_1M = DatasetSource(
    name="movielens-1m",
    fetch=fetch,
    load=load,
    fields=grouplens.FIELDS,
    item="movie_id",
    histories=grouplens.HISTORIES,
    description=(
        "MovieLens-1M: 1,000,209 movie ratings from 6,040 users who joined MovieLens in 2000, on 3,883 movies. A row "
        "is one rating with the user's and the movie's fields. Ratings above 3 are positive, ratings below 3 negative, "
        "and ratings of 3 are dropped."
    ),
    homepage="https://grouplens.org/datasets/movielens/1m/",
    licence=grouplens.LICENCE,
    citation=grouplens.CITATION,
    months=Months(
        load=load_with_threes,
        starts=("2001-06", "2002-04", "2002-09", "2003-02"),
        description=(
            "MovieLens-1M, June 2001 to January 2003 (UTC): movie ratings from users who joined MovieLens in 2000. A "
            "row is one rating with the user's and the movie's fields. Ratings of 4 and 5 are positive, and ratings "
            "of 1, 2 and 3 are negative. The first ten months are training rows, the next five validation rows and the "
            "last five test rows, as in CoLLM (Zhang et al., arXiv 2310.19488)."
        ),
    ),
)
