"""GoodReads, of the UCSD Book Graph (Wan and McAuley, RecSys 2018, https://doi.org/10.1145/3240323.3240369).

A row is a rating of a book, of one genre or of all genres. The user downloads the files by hand, because no hashes are
published. The files may be larger than memory, so they are read line by line and the rows are kept on disk.

FLIP's paper (arXiv 2310.19453) mentions 15 fields, but neither its repository nor any other source that we found names
them. Our fields are what the files say about the user and the book before the rating is made. These columns are left
out:

- opinions and actions of others, which include test rows: `average_rating`, `ratings_count`, `text_reviews_count`,
  `similar_books`;
- what only a reader of the book can say: `is_read`, `read_at`, the review;
- other identifiers of the book: `isbn`, `asin`, URLs;
- its long `description`.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from flip_hf.data.arrow_files import BLOCK_ROWS, rows_on_disk
from flip_hf.data.files import content_hash
from flip_hf.data.sources.base import DatasetSource
from flip_hf.data.sources.lines import OddLines
from flip_hf.fetch import FetchError, cache_dir, first_of
from flip_hf.fields import FieldConfig
from flip_hf.standard_json import measures_json

HOMEPAGE = "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html"
AUTHORS = "goodreads_book_authors.json.gz"

FIELDS = (
    FieldConfig("user_id", show_oov=False),
    FieldConfig("book_id", show_oov=False),
    FieldConfig("work_id", show_oov=False),
    FieldConfig("title"),
    FieldConfig("author"),
    FieldConfig("series"),
    FieldConfig("publisher"),
    FieldConfig("publication_year"),
    FieldConfig("language_code"),
    FieldConfig("country_code"),
    FieldConfig("format"),
    FieldConfig("edition"),
    FieldConfig("is_ebook"),
    FieldConfig("num_pages", kind="numeric"),
    FieldConfig("shelf"),
)

STATUS_SHELVES = frozenset({"to-read", "currently-reading"})
"""Shelves that nearly every book is on. The field `shelf` is the first other shelf, which is the most popular one."""

# Part of the cache key. Increase it when a change to the reader gives different rows for the same files.
_READER = 1

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Such as "Wed Jan 10 16:00:00 -0800 2018". strptime is several times slower, and only knows the locale's names.
_DATE = re.compile(r"\w{3} (\w{3}) (\d\d) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d) (\d{4})")

_BOOK = pa.schema(
    [("line", pa.int64()), ("book_id", pa.int64()), ("author_id", pa.int64())]
    + [(field.name, pa.string()) for field in FIELDS if field.name not in ("user_id", "book_id", "author")]
)
_AUTHOR = pa.schema([("author_id", pa.int64()), ("author", pa.string())])
_RATING = pa.schema(
    [
        ("line", pa.int64()),
        ("user_id", pa.string()),
        ("book_id", pa.int64()),
        ("label", pa.int8()),
        ("timestamp", pa.int64()),
    ]
)


def fetch() -> Path:
    """Returns the folder of the three files. Downloads nothing. See `DatasetSource.fetch`.

    Raises:
        FetchError: a file is missing; the message says where to get it and where to put it.
        ValueError: the folder holds files of several genres.
    """
    folder = cache_dir() / "goodreads"
    remedy = (
        f"Download, from {HOMEPAGE}, goodreads_interactions_*.json.gz and goodreads_books_*.json.gz of one genre, and "
        f"{AUTHORS}, and put them into {folder} as they are. They are not downloaded automatically, because no hashes "
        "are published to verify them."
    )
    first_of("GoodReads", [("files in the cache", lambda: _find_files(folder))], remedy)
    return folder


def load() -> Dataset:
    """Returns all labelled rows on disk, in the order of the interactions' file. See `DatasetSource.load`.

    Reads from `cache_dir()/goodreads` the only `goodreads_interactions_*.json.gz` there, the
    `goodreads_books_*.json.gz` of the same genre and `goodreads_book_authors.json.gz`. For books of all genres, reads
    `goodreads_interactions_dedup.json.gz` and `goodreads_books.json.gz` instead. The first reading logs how many lines
    give no row. The rows are then cached until the files change.

    Raises:
        FetchError: as in `fetch`.
        ValueError: the folder holds files of several genres, or a file is truncated.
    """
    paths = _find_files(fetch())
    key = ["goodreads", _READER, *map(content_hash, paths)]
    return rows_on_disk(key, lambda: read_rows(*paths), str(paths[0]))


def read_rows(interactions: Path, books: Path, authors: Path) -> Iterator[pa.Table]:
    """Yields the rows in blocks: the fields, `label` (int8; 1 for a rating above 3, 0 below) and `timestamp` (int64).

    Drops ratings of 3 and interactions without a rating. Leaves out malformed lines, and ratings with an unreadable
    date or an unknown book; the log counts them. An empty value becomes null. The author is the first one named, or
    null if the authors' file lacks them.

    Raises:
        ValueError: a file is truncated or damaged; the message names the file and the line.
    """
    table = _read_books(books, authors)
    find = _Places(table["book_id"].to_numpy())
    odd = OddLines(interactions)
    names = [*(field.name for field in FIELDS), "label", "timestamp"]
    for block in _blocks(interactions, _rating, _RATING, odd):
        places = find(block["book_id"].to_numpy())
        for line in block["line"].to_numpy()[places < 0].tolist():
            odd.add(f"left out: the book is not in {books.name}", line)
        rated = block.filter(pa.array(places >= 0))
        described = table.take(pa.array(places[places >= 0]))
        yield pa.table({name: (rated if name in _RATING.names else described)[name] for name in names})
    odd.report()


def _find_files(folder: Path) -> tuple[Path, Path, Path]:
    found = []
    for pattern in ("goodreads_interactions_*.json.gz", "goodreads_books*.json.gz", AUTHORS):
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise FetchError(f"no file {folder / pattern}")
        if len(paths) > 1:
            there = ", ".join(path.name for path in paths)
            raise ValueError(f"{folder} has {there}: keep the one to read, and move the others elsewhere")
        found.append(paths[0])
    interactions, books, authors = found
    genre = interactions.name.removeprefix("goodreads_interactions").replace("_dedup.", ".")
    if books.name != f"goodreads_books{genre}":
        raise ValueError(f"{folder}: {interactions.name} needs goodreads_books{genre}, but {books.name} is there")
    return interactions, books, authors


def _read_books(path: Path, authors: Path) -> pa.Table:
    """Returns the books' fields with their authors, `line` and `author_id`, one row per line that is a book."""
    odd = OddLines(authors)
    names = pa.concat_tables([_AUTHOR.empty_table(), *_blocks(authors, _author, _AUTHOR, odd)])
    odd.report()
    odd = OddLines(path)
    books = pa.concat_tables([_BOOK.empty_table(), *_blocks(path, _book, _BOOK, odd)])
    lines = books["line"].to_numpy()
    # Only the first line with an id is used.
    for line in np.delete(lines, np.unique(books["book_id"].to_numpy(), return_index=True)[1]).tolist():
        odd.add("left out: an earlier line has the same book_id", line)
    places = _Places(names["author_id"].to_numpy())(books["author_id"].fill_null(-1).to_numpy())
    nameless = (places < 0) & books["author_id"].is_valid().to_numpy()
    for line in lines[nameless].tolist():
        odd.add(f"read without its author, who is not in {authors.name}", line)
    odd.report()
    author = names["author"].take(pa.array(places, mask=places < 0))
    # One chunk, because taking rows from it is faster.
    return books.append_column("author", author).combine_chunks()


class _Places:
    """Finds the index of an id in `ids`: -1 if it is missing, the first index if it is repeated."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._places = np.unique(ids, return_index=True)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        if len(self._ids) == 0:
            return np.full(len(ids), -1)
        near = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[near] == ids, self._places[near], -1)


class _Unusable(ValueError):
    """Describes what is wrong with a line that is a valid record."""


def _blocks(
    path: Path, parse: Callable[[dict[str, Any], int], tuple[Any, ...] | None], schema: pa.Schema, odd: OddLines
) -> Iterator[pa.Table]:
    """Parses a file's records with `parse`, and yields tables of at most `BLOCK_ROWS` rows."""
    records = _records(path, parse, odd)
    while block := list(islice(records, BLOCK_ROWS)):
        arrays = [pa.array(column, kind) for column, kind in zip(zip(*block, strict=True), schema.types, strict=True)]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _records(
    path: Path, parse: Callable[[dict[str, Any], int], tuple[Any, ...] | None], odd: OddLines
) -> Iterator[tuple[Any, ...]]:
    number = 0
    try:
        with gzip.open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    if b"\\ud" in line or b"\\uD" in line:
                        # Arrow can't hold half of a surrogate pair, so encoding must fail here.
                        measures_json(record, ensure_ascii=False).encode()
                    parsed = parse(record, number)
                except _Unusable as error:
                    odd.add(f"left out: {error}", number)
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                    odd.add("left out: not a JSON record with all that a row needs", number)
                else:
                    if parsed is not None:
                        yield parsed
    except (OSError, EOFError, zlib.error) as error:
        message = f"{path}: truncated or damaged after line {number} ({error}); download it again"
        raise ValueError(message) from error


def _rating(record: dict[str, Any], line: int) -> tuple[Any, ...] | None:
    user_id, book_id, rating = _text(record["user_id"]), _id(record["book_id"]), record["rating"]
    if user_id is None or type(rating) is not int or not 0 <= rating <= 5:
        raise ValueError
    # No rating, or neither liked nor disliked.
    if rating in (0, 3):
        return None
    return line, user_id, book_id, int(rating > 3), _seconds(record.get("date_added"))


def _book(record: dict[str, Any], line: int) -> tuple[Any, ...]:
    authors, series, shelves = (record.get(name) or [] for name in ("authors", "series", "popular_shelves"))
    names = [_text(shelf["name"]) for shelf in shelves]
    pages = _text(record.get("num_pages"))
    told = {
        "series": _text(series[0]) if series else None,
        "edition": _text(record.get("edition_information")),
        # A numeric field holds numbers only.
        "num_pages": pages if pages is not None and pages.isascii() and pages.isdecimal() else None,
        "shelf": next((name for name in names if name not in STATUS_SHELVES), None),
    }
    author_id = _id(authors[0]["author_id"]) if authors else None
    described = (told[name] if name in told else _text(record.get(name)) for name in _BOOK.names[3:])
    return line, _id(record["book_id"]), author_id, *described


def _author(record: dict[str, Any], line: int) -> tuple[Any, ...]:
    return _id(record["author_id"]), _text(record["name"])


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError
    return value.strip() or None


def _id(value: Any) -> int:
    number = int(value)
    if not 0 <= number < 1 << 63:
        raise ValueError
    return number


def _seconds(date: Any) -> int:
    """Converts a date to seconds since 1970-01-01 UTC."""
    match = _DATE.fullmatch(date) if isinstance(date, str) else None
    try:
        if match is None:
            raise ValueError
        month, day, hour, minute, second, sign, ahead_h, ahead_min, year = match.groups()
        moment = datetime(
            int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=UTC
        )
    except ValueError:
        raise _Unusable("date_added is not a date") from None
    ahead = 60 * (60 * int(ahead_h) + int(ahead_min))
    return int(moment.timestamp()) - (ahead if sign == "+" else -ahead)


GOODREADS = DatasetSource(
    name="goodreads",
    fetch=fetch,
    load=load,
    fields=FIELDS,
    item="book_id",
    histories=(),
    description=(
        "GoodReads, of the UCSD Book Graph: ratings of books from users' public shelves on goodreads.com, gathered in "
        "late 2017; those of one genre, or all. A row is one rating with its user and the book's fields. Ratings above "
        "3 are positive, ratings below 3 negative, and ratings of 3 are dropped."
    ),
    homepage=HOMEPAGE,
    licence=(
        "The authors' own terms: academic use with citation of their papers; no redistribution and no commercial use. "
        "flip_hf does not distribute the data."
    ),
    citation=(
        "@inproceedings{wan2018item,\n"
        "  author    = {Wan, Mengting and McAuley, Julian},\n"
        "  title     = {Item Recommendation on Monotonic Behavior Chains},\n"
        "  booktitle = {Proceedings of the 12th ACM Conference on Recommender Systems},\n"
        "  pages     = {86--94},\n"
        "  year      = {2018},\n"
        "  doi       = {10.1145/3240323.3240369}\n"
        "}\n"
        "@inproceedings{wan2019fine,\n"
        "  author    = {Wan, Mengting and Misra, Rishabh and Nakashole, Ndapa and McAuley, Julian},\n"
        "  title     = {Fine-Grained Spoiler Detection from Large-Scale Review Corpora},\n"
        "  booktitle = {Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},\n"
        "  pages     = {2605--2610},\n"
        "  year      = {2019},\n"
        "  doi       = {10.18653/v1/P19-1248}\n"
        "}"
    ),
)
