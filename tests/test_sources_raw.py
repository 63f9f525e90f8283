"""Readers of raw files that no test fetches, on small files in their formats, with what is odd in the real ones."""

import hashlib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from raw_files import (
    BOOKCROSSING,
    MOVIELENS_1M,
    quoted,
    write,
    write_movielens_1m,
)
from transformers import BertConfig

from flip_hf import FlipConfig, FlipForCTR
from flip_hf.data.sources import DATASETS, bookcrossing, movielens_1m
from flip_hf.data.sources.bookcrossing import BOOKS, RATINGS, USERS
from flip_hf.data.splits import load_splits
from flip_hf.fetch import FetchError
from flip_hf.training.run_config import FinetuneRun, parse_run

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


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


def test_the_configuration_for_movielens_1m_is_one_that_a_model_takes(tmp_path):
    config = CONFIGS / "ml-1m" / "dcnv2_alone.yaml"
    run = parse_run(FinetuneRun, ["--config", str(config), "--output_dir", str(tmp_path)])
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
        "3 lines, but BookCrossing has 278858; the file may not be whole",
        "2 lines, but BookCrossing has 271379; the file may not be whole",
        "11 lines, but BookCrossing has 1149780; the file may not be whole",
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
        f"{tmp_path / USERS}: 1 line is left out: a line before has the same id; the first is line 6",
        f"{tmp_path / USERS}: 1 line is left out: not 3 quoted values with a semicolon between; the first is line 7",
        f"{tmp_path / BOOKS}: 3 {lines} not 8 quoted values with a semicolon between; the first is line 4",
        f"{tmp_path / RATINGS}: 2 {lines} the book is not in BX-Books.csv; the first is line 13",
        f"{tmp_path / RATINGS}: 1 line is left out: the user is not in BX-Users.csv; the first is line 14",
        f"{tmp_path / RATINGS}: 3 {lines} the rating is not one of 0 to 10; the first is line 15",
        f"{tmp_path / RATINGS}: 1 line is left out: not 3 quoted values with a semicolon between; the first is line 19",
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


def test_rows_without_a_time_are_split_at_random_only(cache):
    write(cache / "bookcrossing", BOOKCROSSING)
    with pytest.raises(ValueError, match="bookcrossing can't be split by time, as its rows have none"):
        load_splits("bookcrossing", "time", seed=0)
    parts = load_splits("bookcrossing", "random", seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 9, "validation": 1, "test": 1}
    assert sorted(label for rows in parts.values() for label in rows["label"][:]) == [*[0] * 9, 1, 1]
    with pytest.raises(ValueError, match="unknown split 'user': choose one of random, time"):
        load_splits("bookcrossing", "user", seed=0)
