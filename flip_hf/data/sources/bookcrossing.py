"""BookCrossing (Ziegler et al., WWW 2005, https://doi.org/10.1145/1060745.1060754).

A row is a rating whose user and book are known. Implicit ratings, which the files store as 0, are rows too. FLIP's
paper (arXiv 2310.19453) reports 1,031,171 samples; without the implicit ratings there are fewer than half as many.

A rating of 5 or more is positive and any other is negative. We could not verify this rule for FLIP, because its
released code does not contain it. It is the rule in the released code of ReLLa (Lin et al., WWW 2024, arXiv
2308.11131), a paper that shares six of FLIP's authors.

The files do not say when a book was rated, so rows have no time and can't be split by time.
"""

import html.entities
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from flip_hf.data.sources.base import DatasetSource
from flip_hf.data.sources.lines import OddLines
from flip_hf.fetch import FetchError, cache_dir, check_file, download, first_of
from flip_hf.fields import FieldConfig

logger = logging.getLogger(__name__)

URL = "http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip"
MD5 = "37d647ee9e18ba134ea6d78ee4fe5292"
"""MD5 of the archive, as the Book Data Tools (https://bookdata.piret.info) recorded it when they downloaded `URL`. The
archive's authors publish none."""

USERS, BOOKS, RATINGS = "BX-Users.csv", "BX-Books.csv", "BX-Book-Ratings.csv"
COLUMNS = {
    USERS: "User-ID Location Age",
    BOOKS: "ISBN Book-Title Book-Author Year-Of-Publication Publisher Image-URL-S Image-URL-M Image-URL-L",
    RATINGS: "User-ID ISBN Book-Rating",
}
"""The column names in the first line of each file."""
PUBLISHED = {USERS: 278_858, BOOKS: 271_379, RATINGS: 1_149_780}
"""The numbers of users, books and ratings on the authors' page."""

FIELDS = (
    FieldConfig("user_id", show_oov=False),
    FieldConfig("location"),
    FieldConfig("age"),
    FieldConfig("isbn", show_oov=False),
    FieldConfig("title"),
    FieldConfig("author"),
    FieldConfig("year"),
    FieldConfig("publisher"),
)

LABELS = {str(rating): int(rating >= 5) for rating in range(11)}
"""The label of each rating."""

# NULL, or a quoted value in which a backslash escapes the next character, such as a quote.
_VALUE = r'("[^"\\]*(?:\\.[^"\\]*)*"|NULL)'
_ESCAPED = re.compile(r"\\(.)")
_ENTITY = re.compile(r"&(#\d+;|\w+;)")

_AnyPath = Path | zipfile.Path


def parse_files(folder: _AnyPath) -> pa.Table:
    """Reads the rows of the three files in `folder`, in the order of BX-Book-Ratings.csv.

    Leaves out malformed lines, repeated users and books, and ratings of unknown users or books; the log counts them.
    NULL, an empty value and the year 0 become null. HTML entities are decoded.

    Returns:
        The eight fields as strings, and `label` (int8).

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file's first line does not name the expected columns, or there are no users or books.
    """
    user_places, users = _table(folder / USERS)
    book_places, books = _table(folder / BOOKS)
    odd = OddLines(folder / RATINGS)
    user_rows, book_rows, labels = [], [], []
    for line, (user_id, isbn, rating) in _records(folder / RATINGS, odd):
        if rating not in LABELS:
            odd.add("left out: the rating is not one of 0 to 10", line)
        elif user_id not in user_places:
            odd.add(f"left out: the user is not in {USERS}", line)
        elif isbn not in book_places:
            odd.add(f"left out: the book is not in {BOOKS}", line)
        else:
            user_rows.append(user_places[user_id])
            book_rows.append(book_places[isbn])
            labels.append(LABELS[rating])
    odd.report()
    taken = [column.take(pa.array(user_rows, pa.int64())) for column in users]
    taken += [column.take(pa.array(book_rows, pa.int64())) for column in books]
    return labelled_rows(taken, labels)


def labelled_rows(values: Sequence[pa.Array], labels: Sequence[int]) -> pa.Table:
    """Builds a table from columns in the order of `FIELDS`, and adds `label` (int8). The year 0 becomes null."""
    columns = dict(zip((field.name for field in FIELDS), values, strict=True))
    columns["year"] = pc.if_else(pc.equal(columns["year"], "0"), pa.scalar(None, pa.string()), columns["year"])
    return pa.table({**columns, "label": pa.array(labels, pa.int8())})


def fetch() -> Path:
    """Returns the folder of the three files, or the archive. See `DatasetSource.fetch`.

    Tries, in this order: the three files in `cache_dir()/bookcrossing`, the archive there, the archive from Freiburg.
    """
    folder = cache_dir() / "bookcrossing"
    archive = folder / "BX-CSV-Dump.zip"
    steps: list[tuple[str, Callable[[], Path]]] = [
        ("files in the cache", lambda: _unpacked(folder)),
        ("archive in the cache", lambda: check_file(archive, "md5", MD5)),
        ("Freiburg", lambda: download(URL, archive, "md5", MD5)),
    ]
    remedy = (
        f"Download {URL} by hand and put it at {archive} as it is. If you can only get another copy, which no known "
        f"hash confirms, put its files {USERS}, {BOOKS} and {RATINGS} into {folder}."
    )
    return first_of("BookCrossing", steps, remedy)


def load() -> Dataset:
    """Returns all rows, without `timestamp`. See `DatasetSource.load`.

    Raises:
        FetchError: as in `fetch`.
        ValueError: a file is not one of BookCrossing's.
    """
    place = fetch()
    return Dataset(parse_files(zipfile.Path(place) if place.is_file() else place))


def _unpacked(folder: Path) -> Path:
    for name in COLUMNS:
        if not (folder / name).is_file():
            raise FetchError(f"no file {folder / name}")
    return folder


def _table(path: _AnyPath) -> tuple[dict[str | None, int], list[pa.Array]]:
    """Returns the index of each id's record, and the columns of all records."""
    odd = OddLines(path)
    records: dict[str | None, list[str | None]] = {}
    for line, values in _records(path, odd):
        if values[0] is None:
            odd.add("left out: it has no id", line)
        elif values[0] in records:
            odd.add("left out: an earlier line has the same id", line)
        else:
            # The other columns are URLs of pictures.
            records[values[0]] = values[:5]
    odd.report()
    if not records:
        raise ValueError(f"{path}: there are no records; replace it with the complete file")
    columns = [pa.array(column, pa.string()) for column in zip(*records.values(), strict=True)]
    return {key: place for place, key in enumerate(records)}, columns


def _records(path: _AnyPath, odd: OddLines) -> Iterator[tuple[int, list[str | None]]]:
    """Yields the number and the values of each line after the first."""
    names = COLUMNS[path.name].split()
    pattern = re.compile(";".join([_VALUE] * len(names)))
    # Not splitlines, which also splits at characters that Latin-1 text may hold, such as U+0085.
    lines = path.read_bytes().decode("latin-1").removesuffix("\n").split("\n")
    header = pattern.fullmatch(lines[0].removesuffix("\r"))
    if header is None or [_value(text) for text in header.groups()] != names:
        expected = ";".join(f'"{name}"' for name in names)
        raise ValueError(f"{path}, line 1: {lines[0][:200]!r} is not {expected!r}; use the authors' file")
    if len(lines) - 1 != PUBLISHED[path.name]:
        logger.warning(
            "%s: %d lines, but BookCrossing has %d; the file may be incomplete",
            path,
            len(lines) - 1,
            PUBLISHED[path.name],
        )
    for number, line in enumerate(lines[1:], start=2):
        if match := pattern.fullmatch(line.removesuffix("\r")):
            yield number, [_value(text) for text in match.groups()]
        else:
            odd.add(f"left out: not {len(names)} quoted values separated by semicolons", number)


def _value(text: str) -> str | None:
    if text == "NULL":
        return None
    text = text[1:-1]
    return plain_text(_ESCAPED.sub(r"\1", text) if "\\" in text else text)


def plain_text(text: str) -> str | None:
    """Decodes the HTML entities in a text. Returns None if the text is blank."""
    return (_ENTITY.sub(_character, text) if "&" in text else text).strip() or None


def _character(entity: re.Match[str]) -> str:
    # Whole entities only: html.unescape alone would also decode the "&not" of "you&nothing;".
    is_entity = entity[1].startswith("#") or entity[1] in html.entities.html5
    return html.unescape(entity[0]) if is_entity else entity[0]


HOMEPAGE = "http://www2.informatik.uni-freiburg.de/~cziegler/BX/"
LICENCE = (
    "The authors' own terms: freely available for research use with acknowledgement of their paper. flip_hf "
    "does not distribute the data."
)
CITATION = (
    "@inproceedings{ziegler2005improving,\n"
    "  author    = {Ziegler, Cai-Nicolas and McNee, Sean M. and Konstan, Joseph A. and Lausen, Georg},\n"
    "  title     = {Improving Recommendation Lists Through Topic Diversification},\n"
    "  booktitle = {Proceedings of the 14th International Conference on World Wide Web},\n"
    "  pages     = {22--32},\n"
    "  year      = {2005},\n"
    "  doi       = {10.1145/1060745.1060754}\n"
    "}"
)

BOOKCROSSING = DatasetSource(
    name="bookcrossing",
    fetch=fetch,
    load=load,
    fields=FIELDS,
    item="isbn",
    histories=(),
    description=(
        "BookCrossing: 1,149,780 ratings of 271,379 books by 278,858 users of bookcrossing.com, gathered in August and "
        "September 2004; explicit, 1 to 10, or implicit, 0. A row is one rating of a known book with the user's and "
        "the book's fields. Ratings of 5 or more are positive, lower and implicit ones negative. The data "
        "does not say when a book was rated."
    ),
    homepage=HOMEPAGE,
    licence=LICENCE,
    citation=CITATION,
)
