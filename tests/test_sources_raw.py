"""Readers of raw files that no test fetches, on small files in their formats, with what is odd in the real ones."""

import hashlib
import json
import urllib.error
import urllib.request
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from raw_files import (
    BOOKCROSSING,
    BOOKCROSSING_CORE,
    GOODREADS,
    MOVIELENS_1M,
    goodreads_author,
    goodreads_book,
    goodreads_rating,
    quoted,
    write,
    write_bookcrossing_core,
    write_movielens_1m,
)
from transformers import BertConfig

from flip_hf import FlipConfig, FlipForCTR
from flip_hf.data import arrow_files
from flip_hf.data.schema import InputError
from flip_hf.data.sources import DATASETS, bookcrossing, bookcrossing_core, goodreads, movielens_1m
from flip_hf.data.sources.bookcrossing import BOOKS, RATINGS, USERS
from flip_hf.data.splits import load_splits
from flip_hf.fetch import FetchError
from flip_hf.runs.data import load_click_log
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import DataSettings, FinetuneSettings

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
INTERACTIONS, BOOKS_OF_POETRY = "goodreads_interactions_poetry.json.gz", "goodreads_books_poetry.json.gz"
AUTHORS = "goodreads_book_authors.json.gz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return tmp_path / "cache"


# MovieLens-1M


def test_movielens_1m(tmp_path):
    raw = movielens_1m.parse_grouplens(write(tmp_path, MOVIELENS_1M))
    assert raw.users.to_pylist() == [
        {"user_id": 1, "gender": "F", "age": "Under 18", "occupation": "K-12 student", "zipcode": "48067"},
        {"user_id": 2, "gender": "M", "age": "56+", "occupation": "self-employed", "zipcode": "02138-1234"},
    ]
    assert raw.movies.to_pylist() == [
        {"movie_id": 1, "title": "Toy Story (1995)", "genre": "Animation, Children's, Comedy"},
        {"movie_id": 2, "title": "Misérables, Les (1995)", "genre": "Drama"},
        {"movie_id": 3, "title": "2001: A Space Odyssey:\x85 (1968):", "genre": "Drama, Sci-Fi"},
        {"movie_id": 3952, "title": "Who::What::Where (1999)", "genre": "Film-Noir"},
    ]
    assert raw.ratings.num_rows == 14
    assert raw.ratings.to_pylist()[3] == {"user_id": 1, "movie_id": 3952, "rating": 4, "timestamp": 978300763}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("users.dat", "1::F::1::10\n", r"users\.dat, line 1: 4 columns, expected 5"),
        (
            "users.dat",
            "1::F::1::10::1\n2::F::17::10::1\n",
            r"users\.dat, line 2: age is '17', expected one of 1, 18, 25",
        ),
        ("users.dat", "1::F::1::21::1\n", r"users\.dat, line 1: occupation is '21', expected one of 0, 1, 2"),
        ("movies.dat", "1::Toy Story\n", r"movies\.dat, line 1: 2 columns, expected 3"),
        ("movies.dat", "Toy Story\n", r"movies\.dat, line 1: 1 columns, expected 3"),
        ("movies.dat", "one::Toy Story::Comedy\n", r"movies\.dat, line 1: movie id is 'one', expected a whole number"),
        ("ratings.dat", "1::1::5::978300760\n1::1::5\n", r"ratings\.dat, line 2: 3 columns, expected 4"),
        ("ratings.dat", "1::1::good::1\n", r"ratings\.dat, line 1: rating is 'good', expected a whole number"),
        ("ratings.dat", f"1::1::5::{10**20}\n", r"ratings\.dat, line 1: timestamp is '10+', expected a whole number"),
    ],
)
def test_movielens_1m_names_file_and_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        movielens_1m.parse_grouplens(write(tmp_path, {**MOVIELENS_1M, name: text}))


def test_movielens_1m_is_read_from_its_archive(cache, monkeypatch):
    archive = cache / "movielens-1m" / "ml-1m.zip"
    with pytest.raises(FetchError) as caught:
        movielens_1m.load()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["  - archive in the cache", "  - GroupLens"]
    assert str(archive) in lines[-1]

    write_movielens_1m(cache, monkeypatch)
    rows = movielens_1m.load()
    assert rows["label"][:] == [1, 0, 1, 0, 1, 0] * 2
    assert rows[1] == {
        "user_id": 2,
        "gender": "M",
        "age": "56+",
        "occupation": "self-employed",
        "zipcode": "02138-1234",
        "movie_id": 3,
        "title": "2001: A Space Odyssey:\x85 (1968):",
        "genre": "Drama, Sci-Fi",
        "label": 0,
        "timestamp": 978300762,
    }
    monkeypatch.setattr(movielens_1m, "N_USERS", 3)
    with pytest.raises(ValueError, match="has 14 ratings, 2 users and 4 movies; expected 14, 3 and 4"):
        movielens_1m.load()
    monkeypatch.setattr(movielens_1m, "MD5", "0" * 32)
    with pytest.raises(FetchError, match=r"ml-1m\.zip has md5"):
        movielens_1m.load()


def test_movielens_1m_names_a_rating_of_nothing(cache, monkeypatch):
    write_movielens_1m(cache, monkeypatch, {**MOVIELENS_1M, "ratings.dat": "1::7::5::1\n"})
    with pytest.raises(ValueError, match="MovieLens-1M: a rating has movie_id 7, which its table does not hold"):
        movielens_1m.load()


def test_movielens_1m_has_histories(cache, monkeypatch):
    write_movielens_1m(cache, monkeypatch)
    parts = load_splits("movielens-1m", "time", 0, DATASETS["movielens-1m"].histories)
    last = parts["test"][0]
    assert last["timestamp"] == 978300773
    # The user's earlier rows, 978300760 on, of which that of rating 2 at 978300764 was not liked.
    assert last["liked_titles"] == ["Misérables, Les (1995)", "Who::What::Where (1999)"] * 2
    assert last["rated_titles"][2] == "disliked 2001: A Space Odyssey:\x85 (1968):"


def write_dated_movielens_1m(cache, monkeypatch, ratings):
    """An archive of these ratings: user, movie, rating, time in UTC."""
    seconds = [int(datetime.fromisoformat(f"{time}+00:00").timestamp()) for _, _, _, time in ratings]
    lines = [
        f"{user}::{movie}::{rating}::{at}\n" for (user, movie, rating, _), at in zip(ratings, seconds, strict=True)
    ]
    write_movielens_1m(cache, monkeypatch, {**MOVIELENS_1M, "ratings.dat": "".join(lines)})


DATED = [
    # Not in the order of time.
    (1, 1, 4, "2003-01-31 23:59:59"),
    (1, 2, 5, "2001-05-31 23:59:59"),
    (1, 3, 4, "2001-06-01 00:00:00"),
    (2, 3, 5, "2002-03-31 23:59:59"),
    (1, 1, 3, "2002-03-31 23:59:59"),
    (1, 2, 5, "2002-04-01 00:00:00"),
    (1, 3952, 5, "2002-04-01 00:00:00"),
    (2, 3, 2, "2002-08-31 23:59:59"),
    (1, 3, 1, "2002-09-01 00:00:00"),
    (1, 3, 5, "2003-02-01 00:00:00"),
    (2, 1, 4, "2000-09-01 00:00:00"),
]


def test_movielens_1m_split_by_months_keeps_threes_and_the_edges_of_months(cache, monkeypatch):
    write_dated_movielens_1m(cache, monkeypatch, DATED)
    parts = load_splits("movielens-1m", "months", 0)
    found = {
        part: [(row["user_id"], row["movie_id"], row["label"], str(datetime.fromtimestamp(row["timestamp"], UTC))[:19])
               for row in rows]
        for part, rows in parts.items()
    }  # fmt: skip
    assert found == {
        "train": [
            (1, 3, 1, "2001-06-01 00:00:00"),
            (2, 3, 1, "2002-03-31 23:59:59"),
            (1, 1, 0, "2002-03-31 23:59:59"),
        ],
        "validation": [
            (1, 2, 1, "2002-04-01 00:00:00"),
            (1, 3952, 1, "2002-04-01 00:00:00"),
            (2, 3, 0, "2002-08-31 23:59:59"),
        ],
        "test": [(1, 3, 0, "2002-09-01 00:00:00"), (1, 1, 1, "2003-01-31 23:59:59")],
    }
    # The other splits drop ratings of 3.
    assert sum(map(len, load_splits("movielens-1m", "random", 0).values())) == len(DATED) - 1


def test_histories_of_a_split_by_months_hold_what_was_liked_earlier_in_these_months(cache, monkeypatch):
    write_dated_movielens_1m(cache, monkeypatch, DATED)
    source = DATASETS["movielens-1m"]
    parts = load_splits("movielens-1m", "months", 0, source.histories)
    first, *_ = parts["train"]
    assert (first["liked_titles"], first["rated_titles"]) == ([], [])
    space = "2001: A Space Odyssey:\x85 (1968):"
    # Both at the same second: neither is in the other's.
    assert [row["liked_titles"] for row in parts["validation"]][:2] == [[space], [space]]
    assert parts["test"]["liked_titles"][1] == [space, "Misérables, Les (1995)", "Who::What::Where (1999)"]
    assert parts["test"]["rated_titles"][1][1] == "disliked Toy Story (1995)"


def test_what_can_not_be_split_by_months_says_so(cache, monkeypatch):
    write_dated_movielens_1m(
        cache, monkeypatch, [row for row in DATED if not row[3].startswith(("2002-09", "2003-01"))]
    )
    with pytest.raises(ValueError, match="movielens-1m has no rows in the months from 2002-09 on, which its"):
        load_splits("movielens-1m", "months", 0)
    write(cache / "bookcrossing", BOOKCROSSING)
    with pytest.raises(ValueError, match="bookcrossing can't be split by months; choose another split"):
        load_splits("bookcrossing", "months", 0)


def test_the_record_of_a_run_says_which_labels_a_split_has(cache, monkeypatch):
    write_dated_movielens_1m(cache, monkeypatch, DATED * 2)
    described = {
        split: load_click_log(DataSettings(source="movielens-1m", split=split)).description["dataset"]["description"]
        for split in ("random", "months")
    }
    assert "ratings of 3 are dropped" in described["random"]
    assert "ratings of 1, 2 and 3 are negative" in described["months"]


def test_a_history_is_as_long_as_its_field_says(cache, monkeypatch):
    write_movielens_1m(cache, monkeypatch)
    settings = {"source": "movielens-1m", "split": "time", "histories": ["liked_titles"]}
    longest = {}
    for most in (20, 1):
        fields = ["title", {"name": "liked_titles", "max_values": most}]
        parts = load_click_log(DataSettings(**settings, fields=fields)).splits
        longest[most] = max(len(titles) for rows in parts.values() for titles in rows["liked_titles"][:])
    assert longest == {20: 4, 1: 1}


def test_the_configuration_for_movielens_1m_is_one_that_a_model_takes(tmp_path):
    config = CONFIGS / "ml-1m" / "dcnv2.yaml"
    run = parse_run(FinetuneSettings, ["--config", str(config), "--output_dir", str(tmp_path)])
    assert (run.data.source, run.data.split, run.mode) == ("movielens-1m", "random", "id")
    text_config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    fields = [{"name": field.name, "num_features": 3} for field in DATASETS[run.data.source].fields]
    model = FlipForCTR(FlipConfig(text_config=text_config, fields=fields, mode=run.mode, **run.model.options))
    assert model.config.embedding_dim == 16


# BookCrossing


def test_bookcrossing(tmp_path, caplog):
    table = bookcrossing.parse_files(write(tmp_path, BOOKCROSSING))
    assert table.schema.field("label").type == pa.int8()
    rows = table.to_pylist()
    assert len(rows) == 11
    assert rows[0] == {
        "user_id": "1",
        "location": "nyc, new york, usa",
        "age": None,
        "isbn": "034545104X",
        "title": "Flesh Tones: A Novel",
        "author": "M. J. Rose",
        "year": "2002",
        "publisher": "Ballantine Books",
        "label": 0,
    }
    assert rows[1]["location"] == 'a coruña, 郑州, "españa"'
    assert (rows[1]["age"], rows[1]["label"]) == ("18", 1)
    assert rows[2] == {
        "user_id": "3",
        "location": None,
        "age": "0",
        "isbn": "0001",
        "title": 'R&D & "A";"B" \\',
        "author": "Simon &nothing; Schuster",
        "year": None,
        "publisher": "Köln\x85am Rhein",
        "label": 1,
    }
    # A rating of 4.
    assert rows[3]["label"] == 0
    # Only that there are fewer lines than in the real files.
    assert [message.split(": ")[1] for message in caplog.messages] == [
        "3 lines, but BookCrossing has 278858; the file may be incomplete",
        "2 lines, but BookCrossing has 271379; the file may be incomplete",
        "11 lines, but BookCrossing has 1149780; the file may be incomplete",
    ]


def test_bookcrossing_counts_what_it_leaves_out(tmp_path, monkeypatch, caplog):
    added = {
        USERS: quoted(None, "nowhere", "1") + quoted("1", "elsewhere", "99") + '"4";"no third value"\n',
        BOOKS: '"0002";"an "open" quote";"a";"1";"p";"u";"u";"u"\n"0003";"short"\n'
        + '"0004";"open;"a";"1";"p";"u";"u";"u"\n',
        RATINGS: quoted("1", "0002", "9")
        + quoted("4", "0001", "9")
        + quoted("1", "0001", "11")
        + quoted("1", "0001", "9.0")
        + quoted("1", "0001", None)
        + quoted("2", "0003", "9")
        + "1;0001;9\n",
    }
    files = {name: text + added[name] for name, text in BOOKCROSSING.items()}
    monkeypatch.setattr(bookcrossing, "PUBLISHED", {name: text.count("\n") - 1 for name, text in files.items()})
    assert bookcrossing.parse_files(write(tmp_path, files)).num_rows == 11
    lines = "lines are left out:"
    assert caplog.messages == [
        f"{tmp_path / USERS}: 1 line is left out: it has no id; the first is line 5",
        f"{tmp_path / USERS}: 1 line is left out: an earlier line has the same id; the first is line 6",
        f"{tmp_path / USERS}: 1 line is left out: not 3 quoted values separated by semicolons; the first is line 7",
        f"{tmp_path / BOOKS}: 3 {lines} not 8 quoted values separated by semicolons; the first is line 4",
        f"{tmp_path / RATINGS}: 2 {lines} the book is not in BX-Books.csv; the first is line 13",
        f"{tmp_path / RATINGS}: 1 line is left out: the user is not in BX-Users.csv; the first is line 14",
        f"{tmp_path / RATINGS}: 3 {lines} the rating is not one of 0 to 10; the first is line 15",
        f"{tmp_path / RATINGS}: 1 line is left out: not 3 quoted values separated by semicolons; the first is line 19",
    ]


def test_bookcrossing_reads_a_hostile_line_in_no_time(tmp_path, caplog):
    endless = '"5";"' + "aaaa\\a" * 50_000 + "\n"
    table = bookcrossing.parse_files(write(tmp_path, {**BOOKCROSSING, USERS: BOOKCROSSING[USERS] + endless}))
    assert table.num_rows == 11
    assert "the first is line 5" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            USERS,
            "User-ID,Location,Age\n1,here,2\n",
            r"BX-Users\.csv, line 1: 'User-ID,Location,Age' is not '\"User-ID\";",
        ),
        (BOOKS, BOOKCROSSING[RATINGS], r"BX-Books\.csv, line 1: .* is not '\"ISBN\";\"Book-Title\";"),
        (BOOKS, BOOKCROSSING[BOOKS].split("\n")[0] + "\n", r"BX-Books\.csv: there are no records"),
        (RATINGS, "", r"BX-Book-Ratings\.csv, line 1: '' is not"),
    ],
)
def test_bookcrossing_refuses_other_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        bookcrossing.parse_files(write(tmp_path, {**BOOKCROSSING, name: text}))


def test_bookcrossing_is_read_from_files_put_by_hand(cache):
    folder = cache / "bookcrossing"
    with pytest.raises(FetchError) as caught:
        bookcrossing.load()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "  - files in the cache",
        "  - archive in the cache",
        "  - Freiburg",
    ]
    assert f"put it at {folder / 'BX-CSV-Dump.zip'} as it is" in lines[-1]
    assert f"put its files BX-Users.csv, BX-Books.csv and BX-Book-Ratings.csv into {folder}." in lines[-1]

    (folder / "BX-CSV-Dump.zip").write_bytes(b"another copy")
    with pytest.raises(FetchError, match=r"BX-CSV-Dump\.zip has md5 .*, expected 37d647ee9e18ba134ea6d78ee4fe5292"):
        bookcrossing.load()
    write(folder, BOOKCROSSING)
    assert bookcrossing.load()["label"][:] == [0, 1, 1, *[0] * 8]


def test_bookcrossing_is_read_from_its_archive(cache, monkeypatch):
    write(cache / "bookcrossing", {"BX-CSV-Dump.zip": ""})
    archive = cache / "bookcrossing" / "BX-CSV-Dump.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in BOOKCROSSING.items():
            file.writestr(name, text.encode("latin-1"))
    monkeypatch.setattr(bookcrossing, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert bookcrossing.load()["title"][1:3] == ["Flesh Tones: A Novel", 'R&D & "A";"B" \\']


def test_rows_without_a_time_are_not_split_by_it(cache):
    write(cache / "bookcrossing", BOOKCROSSING)
    with pytest.raises(ValueError, match="bookcrossing has no timestamps, so it can't be split by time"):
        load_splits("bookcrossing", "time", seed=0)
    parts = load_splits("bookcrossing", "random", seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 9, "validation": 1, "test": 1}
    assert sorted(label for rows in parts.values() for label in rows["label"][:]) == [*[0] * 9, 1, 1]
    with pytest.raises(ValueError, match="unknown split 'user': choose one of random, time, item, months"):
        load_splits("bookcrossing", "user", seed=0)


# BookCrossing, core


def test_bookcrossing_core(cache, monkeypatch):
    write_bookcrossing_core(cache, monkeypatch)
    rows = bookcrossing_core.load()
    assert rows["label"][:] == [1, 0, 0, 0, 0, 0] * 2
    assert rows[0] == {
        "user_id": "1",
        "location": "minneapolis, minnesota, usa",
        "age": "24",
        "isbn": "0060973129",
        "title": "1984",
        "author": "George Orwell",
        "year": "1980",
        "publisher": "HarperPerennial",
        "label": 1,
    }
    # The user rated this book 4.
    assert rows[2] == {
        "user_id": "2",
        "location": "vitoria, álava, spain",
        "age": None,
        "isbn": "0393045218",
        "title": "Ben & Jerry's Ice Cream & Book",
        "author": "E. J. Barber",
        "year": None,
        "publisher": "Norton & Co",
        "label": 0,
    }
    third = rows[1]
    assert third["title"] == "5 Novels : Mars; Slaves; The Guru"
    assert (third["author"], third["year"], third["publisher"]) == ("Scott Turow", "1999", "Merchandise &")
    monkeypatch.setattr(bookcrossing_core, "N_BOOKS", 4)
    with pytest.raises(ValueError, match="has 12 rows, 2 users and 3 books; expected 12, 2 and 4"):
        bookcrossing_core.load()


def test_bookcrossing_core_is_fetched_or_put_by_hand(cache):
    with pytest.raises(FetchError) as caught:
        bookcrossing_core.load()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["  - archive in the cache", "  - GitHub"]
    archive = cache / "bookcrossing-core" / "book_crossing.zip"
    assert f"put it at {archive} as it is" in lines[-1]
    write(archive.parent, {archive.name: "another archive"})
    with pytest.raises(FetchError, match=r"book_crossing\.zip has sha256 .*, expected a796eb89"):
        bookcrossing_core.load()


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        (
            bookcrossing_core.USERS,
            "Location",
            "Place",
            r"users_info\.dat, line 1: the columns are User-ID, Place, Age; expected",
        ),
        (bookcrossing_core.USERS, "\t24", "", r"users_info\.dat, line 2: 2 columns, expected 3"),
        (
            bookcrossing_core.BOOKS,
            "1984\tGeorge Orwell\t1980",
            "1984\t1980",
            r"items_info\.dat, line 2: 8 columns, expected 9",
        ),
        (
            bookcrossing_core.BOOKS,
            "1984\tGeorge Orwell\t1980",
            "1984\tOrwell\t1980\tOne",
            r"items_info\.dat, line 2: the year is 'One'",
        ),
        (
            bookcrossing_core.HISTORY,
            "1\t3\t1",
            "1\t4\t1",
            r"book_history\.dat, line 3: items_info\.dat does not have '4'",
        ),
        (
            bookcrossing_core.HISTORY,
            "1\t3\t1",
            "9\t3\t1",
            r"book_history\.dat, line 3: users_info\.dat does not have '9'",
        ),
    ],
)
def test_bookcrossing_core_refuses_other_lines(cache, monkeypatch, name, before, after, message):
    changed = {**BOOKCROSSING_CORE, name: BOOKCROSSING_CORE[name].replace(before, after, 1)}
    write_bookcrossing_core(cache, monkeypatch, changed)
    with pytest.raises(ValueError, match=message):
        bookcrossing_core.load()


# GoodReads


def read_goodreads(folder, **changed):
    names = {"interactions": INTERACTIONS, "books": BOOKS_OF_POETRY, "authors": AUTHORS}
    write(folder, {**GOODREADS, **{names[key]: text for key, text in changed.items()}})
    return pa.concat_tables(goodreads.read_rows(*(folder / name for name in names.values())))


def test_goodreads(tmp_path, caplog):
    table = read_goodreads(tmp_path)
    assert table["label"].to_pylist() == [1, 0, 1] * 5
    assert [table.schema.field(name).type for name in ("label", "timestamp")] == [pa.int8(), pa.int64()]
    assert table.slice(0, 2).to_pylist() == [
        {
            "user_id": "0" * 32,
            "book_id": 5,
            "work_id": "372536",
            "title": "Cats 😀",
            "author": "T. S. Éliot",
            "series": "144",
            "publisher": None,
            "publication_year": "1982",
            "language_code": "en-US",
            "country_code": "US",
            "format": "Paperback",
            "edition": "Illustrated Edition",
            "is_ebook": "false",
            "num_pages": "56",
            "shelf": "poetry",
            "label": 1,
            "timestamp": 1515600000,
        },
        {
            "user_id": "0" * 31 + "2",
            "book_id": 402128,
            "work_id": "372536",
            "title": "Old Possum's Book",
            "author": "T. S. Éliot",
            "series": None,
            "publisher": None,
            "publication_year": "1982",
            "language_code": "en-US",
            "country_code": "US",
            "format": "Paperback",
            "edition": "Illustrated Edition",
            "is_ebook": "false",
            "num_pages": "56",
            "shelf": "poetry",
            "label": 0,
            "timestamp": 1515600002,
        },
    ]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        ("Wed Jan 10 16:00:00 -0800 2018", 1515628800),
        ("Fri Apr 19 08:15:15 -0700 2013", 1366384515),
        ("Thu Jan 01 05:30:01 +0530 1970", 1),
        ("Wed Dec 31 23:59:59 +0000 1969", -1),
    ],
)
def test_goodreads_dates(tmp_path, date, seconds):
    assert read_goodreads(tmp_path, interactions=goodreads_rating("u", 5, 4, date))["timestamp"].to_pylist() == [
        seconds
    ]


def test_goodreads_counts_what_it_leaves_out(tmp_path, caplog):
    interactions = [
        goodreads_rating("u", 5, 4),
        "{not json}\n",
        "[1, 2]\n",
        "\n",
        goodreads_rating("u", "five", 4),
        goodreads_rating("u", 5, 6),
        goodreads_rating("u", 5, "4"),
        goodreads_rating("u", 5, 4.5),
        goodreads_rating("", 5, 4),
        goodreads_rating("half of a pair: \ud800", 5, 4),
        goodreads_rating("half of a pair: \ud800", 5, 4).replace("ud8", "uD8"),
        json.dumps({"user_id": "u", "rating": 5}) + "\n",
        "[" * 100_000 + "\n",
        goodreads_rating("u", 5, 4, "Wed Foo 10 16:00:00 -0800 2018"),
        goodreads_rating("u", 5, 4, "Wed Feb 30 16:00:00 -0800 2018"),
        goodreads_rating("u", 5, 4, ""),
        goodreads_rating("u", 5, 4, None),
        goodreads_rating("u", 77, 4),
        goodreads_rating("u", 9, 4),
        goodreads_rating("v", 402128, 1),
    ]
    books = [
        goodreads_book(5, authors=[{"author_id": "99"}], num_pages="a few", popular_shelves=[{"name": "to-read"}]),
        "{\n",
        goodreads_book(5, title="again"),
        goodreads_book(402128, authors=[], series=None, popular_shelves=None, title=None),
        goodreads_book(9, title=["no", "text"]),
        goodreads_book("none"),
    ]
    table = read_goodreads(
        tmp_path,
        interactions="".join(interactions),
        books="".join(books),
        authors=goodreads_author(7, "T. S. Éliot") + "{}\n",
    )
    shown = ["user_id", "book_id", "title", "author", "num_pages", "shelf", "label"]
    assert [tuple(row.values()) for row in table.select(shown).to_pylist()] == [
        ("u", 5, "Old Possum's Book", None, None, None, 1),
        ("v", 402128, None, None, "56", None, 0),
    ]
    messages = [message.removeprefix(f"{tmp_path}/goodreads_").split(".json.gz: ", 1) for message in caplog.messages]
    no_record = "left out: not a JSON record with all that a row needs; the first is line"
    assert sorted(messages) == [
        ["book_authors", f"1 line is {no_record} 2"],
        ["books_poetry", "1 line is left out: an earlier line has the same book_id; the first is line 3"],
        ["books_poetry", f"1 line is read without its author, who is not in {AUTHORS}; the first is line 1"],
        ["books_poetry", f"3 lines are {no_record} 2"],
        ["interactions_poetry", f"12 lines are {no_record} 2"],
        ["interactions_poetry", f"2 lines are left out: the book is not in {BOOKS_OF_POETRY}; the first is line 18"],
        ["interactions_poetry", "4 lines are left out: date_added is not a date; the first is line 14"],
    ]


@pytest.mark.parametrize("name", GOODREADS)
def test_goodreads_refuses_a_file_that_is_cut_short(cache, monkeypatch, name):
    monkeypatch.setattr(goodreads, "BLOCK_ROWS", 2)
    folder = write(cache / "goodreads", {**GOODREADS, INTERACTIONS: GOODREADS[INTERACTIONS] * 100})
    whole = (folder / name).read_bytes()
    for damaged, line in ((whole[: len(whole) // 2], r"\d+"), (b"not gzip", "0"), (whole[:-8] + bytes(8), r"\d+")):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}: truncated or damaged after line {line} \(.*download it again"):
            goodreads.load()
    # Nothing of it was kept.
    assert list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) == []
    assert list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.new")) == []


def test_goodreads_is_read_line_by_line(tmp_path, monkeypatch):
    whole = read_goodreads(tmp_path)
    monkeypatch.setattr(goodreads, "BLOCK_ROWS", 2)
    assert read_goodreads(tmp_path).equals(whole)
    # Rows are there before the end of a file that has none.
    interactions = "".join(goodreads_rating(f"{i}", 5, 4) for i in range(5000))
    write(tmp_path, {INTERACTIONS: interactions})
    path = tmp_path / INTERACTIONS
    path.write_bytes(path.read_bytes()[:-1000])
    blocks = goodreads.read_rows(path, tmp_path / BOOKS_OF_POETRY, tmp_path / AUTHORS)
    assert next(blocks)["user_id"].to_pylist() == ["0", "1"]
    with pytest.raises(ValueError, match="truncated"):
        list(blocks)


def test_goodreads_is_kept_on_disk_until_its_files_change(cache, monkeypatch):
    folder = write(cache / "goodreads", GOODREADS)
    rows = goodreads.load()
    (file,) = rows.cache_files
    assert Path(file["filename"]).is_relative_to(datasets.config.HF_DATASETS_CACHE)
    with monkeypatch.context() as patched:
        patched.setattr(goodreads, "read_rows", None)
        again = goodreads.load()
    assert (again._fingerprint, again.cache_files) == (rows._fingerprint, rows.cache_files)
    write(folder, {BOOKS_OF_POETRY: GOODREADS[BOOKS_OF_POETRY].replace("Possum", "Opossum")})
    assert goodreads.load()["title"][1] == "Old Opossum's Book"
    write(folder, {INTERACTIONS: goodreads_rating("u", 5, 3)})
    with pytest.raises(InputError, match=rf"{INTERACTIONS}: there are no rows"):
        goodreads.load()


def test_rows_on_disk_are_split_on_disk(cache, monkeypatch):
    write(cache / "goodreads", GOODREADS)
    monkeypatch.setattr("flip_hf.data.splits._PICKED_ROWS", 2)
    every = goodreads.load()
    order = np.random.RandomState(3).permutation(15)
    parts = load_splits("goodreads", "random", seed=3)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 13, "validation": 1, "test": 1}
    users = [user for rows in parts.values() for user in rows["user_id"][:]]
    assert users == [every["user_id"][row] for row in order]
    assert all(len(rows.cache_files) == 1 and rows._indices is None for rows in parts.values())
    times = [time for rows in load_splits("goodreads", "time", seed=3).values() for time in rows["timestamp"][:]]
    assert times == sorted(every["timestamp"][:])
    monkeypatch.setattr(arrow_files, "_write", None)
    assert load_splits("goodreads", "random", seed=3)["train"]._fingerprint == parts["train"]._fingerprint


def test_goodreads_wants_the_files_of_one_genre(cache):
    folder = cache / "goodreads"
    with pytest.raises(FetchError) as caught:
        goodreads.load()
    assert f"no file {folder / 'goodreads_interactions_*.json.gz'}" in str(caught.value)
    assert "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html" in str(caught.value)
    assert f"put them into {folder}" in str(caught.value)
    write(folder, {name: text for name, text in GOODREADS.items() if name != AUTHORS})
    with pytest.raises(FetchError, match=rf"no file .*{AUTHORS}"):
        goodreads.load()
    write(folder, {**GOODREADS, "goodreads_books_comics_graphic.json.gz": ""})
    with pytest.raises(ValueError, match=rf"goodreads_books_comics_graphic.json.gz, {BOOKS_OF_POETRY}: keep"):
        goodreads.load()
    (folder / BOOKS_OF_POETRY).unlink()
    with pytest.raises(ValueError, match=rf"{INTERACTIONS} needs {BOOKS_OF_POETRY}, but goodreads_books_comics"):
        goodreads.load()


def test_goodreads_of_all_genres(cache):
    write(
        cache / "goodreads",
        {
            AUTHORS: GOODREADS[AUTHORS],
            "goodreads_books.json.gz": GOODREADS[BOOKS_OF_POETRY],
            "goodreads_interactions_dedup.json.gz": GOODREADS[INTERACTIONS],
        },
    )
    assert len(goodreads.load()) == 15
