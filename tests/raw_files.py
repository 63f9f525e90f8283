"""Small files in the raw formats of the named datasets, with what is odd in the real ones."""

import gzip
import hashlib
import json
import zipfile

from flip_hf.data.sources import bookcrossing_core, movielens_1m
from flip_hf.data.sources.bookcrossing import BOOKS, COLUMNS, RATINGS, USERS

# Latin-1 throughout; U+0085 ends a line for str.splitlines.
MOVIELENS_1M = {
    "users.dat": "1::F::1::10::48067\n2::M::56::16::02138-1234\n",
    "movies.dat": (
        "1::Toy Story (1995)::Animation|Children's|Comedy\n"
        "2::Misérables, Les (1995)::Drama\r\n"
        "3:: 2001: A Space Odyssey:\x85 (1968):::Drama|Sci-Fi\n"
        "3952::Who::What::Where (1999)::Film-Noir\n"
    ),
    "ratings.dat": "".join(
        f"{user}::{movie}::{rating}::{978300760 + second}\n"
        for second, (user, movie, rating) in enumerate(
            [(1, 2, 5), (2, 3, 3), (2, 3, 1), (1, 3952, 4), (1, 3, 2), (2, 1, 4), (1, 1, 2)] * 2
        )
    ),
}


def quoted(*values):
    """A line of BookCrossing's files; values are written as they are, and None as NULL."""
    return ";".join("NULL" if value is None else f'"{value}"' for value in values) + "\n"


def _book(*values):
    return quoted(*values, *(f"http://images.amazon.com/images/P/{values[0]}.01.{size}.jpg" for size in "SML"))


BOOKCROSSING = {
    USERS: quoted(*COLUMNS[USERS].split())
    + quoted("1", "nyc, new york, usa", None)
    + quoted("2", 'a coruña, &#37073;&#24030;, \\"españa\\"', "18")
    + quoted("3", "", "0"),
    BOOKS: quoted(*COLUMNS[BOOKS].split())
    + _book("034545104X", "Flesh Tones: A Novel", "M. J. Rose", "2002", "Ballantine Books")
    + _book("0001", 'R&D &amp; \\"A\\";\\"B\\" \\\\', "Simon &nothing; Schuster", "0", "K&ouml;ln\x85am Rhein"),
    RATINGS: quoted(*COLUMNS[RATINGS].split())
    + quoted("1", "034545104X", "0")
    + quoted("2", "034545104X", "5")
    + quoted("3", "0001", "10")
    + quoted("2", "0001", "4") * 8,
}


def _core_book(*values):
    pictures = (f"http://images.amazon.com/images/P/{values[1]}.01.{size}.jpg" for size in ("THUMBZZZ", "MZ", "LZ"))
    return "\t".join([*values, *pictures]) + "\t\n"


# UTF-8. Semicolons became tabs, within values too.
BOOKCROSSING_CORE = {
    bookcrossing_core.USERS: "User-ID\tLocation\tAge\n"
    + "1\tminneapolis, minnesota, usa\t24\t\n"
    + "2\tvitoria, álava, spain\tNULL\t\n",
    bookcrossing_core.BOOKS: "\t".join(bookcrossing_core.COLUMNS[bookcrossing_core.BOOKS].split())
    + "\n"
    + _core_book("1", "0060973129", "1984", "George Orwell", "1980", "HarperPerennial")
    + _core_book(
        "2", "0393045218", "Ben &amp", " Jerry's Ice Cream &amp", " Book", "E. J. Barber", "0", "Norton &amp", " Co"
    )
    + _core_book(
        "3", "0762102543", "5 Novels : Mars", " Slaves", " The Guru", "Scott Turow", "1999", "Merchandise &amp", ""
    ),
    bookcrossing_core.RATINGS: "user\titem\trating\n1\t1\t5.000000\n2\t2\t4.000000\n",
    bookcrossing_core.HISTORY: "user\titem\taccessed\n"
    + "".join(f"{user}\t{book}\t1\n" for user, book in [(1, 1), (1, 3), (2, 2), (2, 1), (1, 2), (2, 3)] * 2),
}


def goodreads_book(number, **changed):
    """A book's record, all of whose values are strings."""
    record = {
        "isbn": "0151686564",
        "series": [],
        "country_code": "US",
        "language_code": "en-US",
        "popular_shelves": [{"count": "9", "name": "to-read"}, {"count": "2", "name": "poetry"}],
        "is_ebook": "false",
        "average_rating": "4.00",
        "format": "Paperback",
        "authors": [{"author_id": "7", "role": ""}, {"author_id": "8", "role": "Illustrator"}],
        "publisher": "",
        "num_pages": "56",
        "edition_information": "Illustrated Edition",
        "publication_year": "1982",
        "book_id": str(number),
        "work_id": "372536",
        "title": "Old Possum's Book",
    }
    return json.dumps({**record, **changed}) + "\n"


def goodreads_rating(user, book, rating, date="Fri Apr 19 08:15:15 -0700 2013", **changed):
    record = {"user_id": user, "book_id": str(book), "is_read": True, "rating": rating, "date_added": date}
    return json.dumps({**record, "review_text_incomplete": "", "read_at": "", **changed}) + "\n"


def goodreads_author(number, name):
    return json.dumps({"author_id": str(number), "name": name, "average_rating": "4.00"}) + "\n"


GOODREADS = {
    "goodreads_book_authors.json.gz": goodreads_author(8, "Edward Gorey") + goodreads_author(7, "T. S. Éliot"),
    "goodreads_books_poetry.json.gz": goodreads_book(402128) + goodreads_book(5, series=["144"], title="Cats 😀"),
    "goodreads_interactions_poetry.json.gz": "".join(
        goodreads_rating(f"{user:032x}", book, rating, f"Wed Jan 10 16:00:{user:02} +0000 2018")
        for user, (book, rating) in enumerate([(5, 4), (5, 3), (402128, 1), (5, 0), (402128, 5)] * 5)
    ),
}


def write(folder, files):
    """Writes the files, gzipped where their names end in .gz, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # GoodReads' are UTF-8, which JSON's escapes make ASCII here; the others Latin-1.
        data = text.encode("latin-1")
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def write_movielens_1m(cache, monkeypatch, files=MOVIELENS_1M):
    """The archive in the cache, with its own hash and counts in place of the real ones."""
    folder = cache / "movielens-1m"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in files.items():
            file.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    monkeypatch.setattr(movielens_1m, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for name, table in (("N_RATINGS", "ratings.dat"), ("N_USERS", "users.dat"), ("N_MOVIES", "movies.dat")):
        monkeypatch.setattr(movielens_1m, name, files[table].count("\n"))


def write_bookcrossing_core(cache, monkeypatch, files=BOOKCROSSING_CORE):
    """The archive in the cache, with its own hash and counts in place of the real ones."""
    folder = cache / "bookcrossing-core"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "book_crossing.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in files.items():
            file.writestr(f"book_crossing/{name}", text.encode())
    monkeypatch.setattr(bookcrossing_core, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    for name, count in (("N_ROWS", 12), ("N_USERS", 2), ("N_BOOKS", 3)):
        monkeypatch.setattr(bookcrossing_core, name, count)


WRITERS = {
    "movielens-1m": write_movielens_1m,
    "bookcrossing-core": write_bookcrossing_core,
    "bookcrossing": lambda cache, monkeypatch: write(cache / "bookcrossing", BOOKCROSSING),
    "goodreads": lambda cache, monkeypatch: write(cache / "goodreads", GOODREADS),
}
"""Puts small files into the cache, by the dataset's name."""
