"""A dense subset of BookCrossing: users with 20 or more and books with 10 or more interactions.

The authors of Case Recommender selected it. The fields and the label rule are those of
`flip_hf.data.sources.bookcrossing`; rows have no time here either. The archive's makers replaced every semicolon of the
original files by a tab, even within values. This module restores those semicolons. Other damage stays: some letters
were encoded twice, and some quotes became backslashes.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from flip_hf.data.sources.base import DatasetSource
from flip_hf.data.sources.bookcrossing import CITATION, FIELDS, LICENCE, labelled_rows, plain_text
from flip_hf.data.sources.lines import read_columns
from flip_hf.fetch import cache_dir, check_file, download, first_of

HOMEPAGE = "https://github.com/caserec/Datasets-for-Recommender-Systems"
URL = (
    "https://raw.githubusercontent.com/caserec/Datasets-for-Recommender-Systems/"
    "82b08c787a6b50d78129b9df842285b89bc05b85/Processed%20Datasets/BookCrossing/book_crossing.zip"
)
SHA256 = "a796eb89e3200a91eb48161079a9abbba0a8e89e1df27bfbd63d8f6b2f7927d8"
"""SHA-256 of the archive, computed by this package's authors from their copy. The archive's makers publish none."""

HISTORY, RATINGS, USERS, BOOKS = "book_history.dat", "book_ratings.dat", "users_info.dat", "items_info.dat"
COLUMNS = {
    HISTORY: "user item accessed",
    RATINGS: "user item rating",
    USERS: "User-ID Location Age",
    BOOKS: "Book_ID ISBN Book-Title Book-Author Year-Of-Publication Publisher Image-URL-S Image-URL-M Image-URL-L",
}
"""The column names in the first line of each file."""

N_ROWS, N_USERS, N_BOOKS = 272_678, 2_946, 17_384


def parse_files(folder: zipfile.Path | Path) -> pa.Table:
    """Reads the rows of the four files in `folder`, in the order of book_history.dat.

    NULL, an empty value and the year 0 become null. HTML entities are decoded.

    Returns:
        The eight fields as strings, and `label` (int8): 1 for a rating of 5 or more; 0 for a lower rating, and for a
        book that the user did not rate.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a line is malformed; the message names the file and the line.
    """
    user_ids, *user_columns = _columns(folder / USERS, _values)
    book_ids, *book_columns = _columns(folder / BOOKS, _book_values)
    for line, year in enumerate(book_columns[3], start=2):
        if not year.isdecimal():
            raise ValueError(f"{folder / BOOKS}, line {line}: the year is {year!r}, expected a whole number")
    ratings = {
        (user, book): float(rating) for user, book, rating in zip(*_columns(folder / RATINGS, _values), strict=True)
    }
    users, books, _ = _columns(folder / HISTORY, _values)
    labels = [int(ratings.get(pair, 0) >= 5) for pair in zip(users, books, strict=True)]
    user_rows = _rows_of(users, user_ids, folder / HISTORY, USERS)
    book_rows = _rows_of(books, book_ids, folder / HISTORY, BOOKS)
    # The columns after the publisher are URLs of pictures.
    values = [_texts(column).take(user_rows) for column in (user_ids, *user_columns)]
    values += [_texts(column).take(book_rows) for column in book_columns[:5]]
    return labelled_rows(values, labels)


def fetch() -> Path:
    """Returns the archive in `cache_dir()/bookcrossing-core`, or downloads it. See `DatasetSource.fetch`."""
    archive = cache_dir() / "bookcrossing-core" / "book_crossing.zip"
    return first_of(
        "BookCrossing (core)",
        [
            ("archive in the cache", lambda: check_file(archive, "sha256", SHA256)),
            ("GitHub", lambda: download(URL, archive, "sha256", SHA256)),
        ],
        f"Download {URL} by hand, put it at {archive} as it is, and try again.",
    )


def load() -> Dataset:
    """Returns all rows, without `timestamp`. See `DatasetSource.load`.

    Raises:
        FetchError: as in `fetch`.
        ValueError: a file is damaged, or the numbers of rows, users and books differ from the expected ones.
    """
    archive = fetch()
    table = parse_files(zipfile.Path(archive, "book_crossing/"))
    found = (table.num_rows, *(len(table[name].unique()) for name in ("user_id", "isbn")))
    if found != (N_ROWS, N_USERS, N_BOOKS):
        raise ValueError(
            f"{archive} has {found[0]} rows, {found[1]} users and {found[2]} books; expected {N_ROWS}, {N_USERS} and "
            f"{N_BOOKS}. Delete it and load it again."
        )
    return Dataset(table)


def _columns(path: zipfile.Path | Path, split: Callable[[str], list[str]]) -> list[list[str]]:
    names = COLUMNS[path.name].split()
    columns = read_columns(path, len(names), split, "utf-8")
    if (found := [column[0] for column in columns]) != names:
        raise ValueError(f"{path}, line 1: the columns are {', '.join(found)}; expected {', '.join(names)}")
    return [column[1:] for column in columns]


def _values(line: str) -> list[str]:
    # Lines of some files end with a tab.
    return line.removesuffix("\t").split("\t")


def _book_values(line: str) -> list[str]:
    # &amp; is the only entity in this file.
    values = _values(line.replace("&amp\t", "&amp;"))
    if len(values) < len(COLUMNS[BOOKS].split()):
        return values
    # Only titles hold other semicolons, so the columns are counted from the picture URLs at the end.
    return [*values[:2], ";".join(values[2:-6]), *values[-6:]]


def _rows_of(ids: list[str], known: list[str], path: zipfile.Path | Path, known_from: str) -> pa.Array:
    places = {value: place for place, value in enumerate(known)}
    for line, value in enumerate(ids, start=2):
        if value not in places:
            raise ValueError(f"{path}, line {line}: {known_from} does not have {value!r}")
    return pa.array([places[value] for value in ids])


def _texts(column: list[str]) -> pa.Array:
    return pa.array([None if text == "NULL" else plain_text(text) for text in column], pa.string())


BOOKCROSSING_CORE = DatasetSource(
    name="bookcrossing-core",
    fetch=fetch,
    load=load,
    fields=FIELDS,
    item="isbn",
    histories=(),
    description=(
        "BookCrossing (core): interactions gathered in August and September 2004. The authors of Case Recommender kept "
        "users with 20 and books with 10 interactions or more: 272,678 interactions of 2,946 users with 17,384 books. "
        "62,656 of them are ratings of 1 to 10. A row is one interaction with the user's and the book's fields. "
        "Ratings of 5 or more are positive; lower ratings and interactions without a rating are negative. The data "
        "does not say when a book was rated."
    ),
    homepage=HOMEPAGE,
    licence=LICENCE,
    citation=CITATION,
)
