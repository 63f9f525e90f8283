"""Readers of raw files that no test fetches, on small files in their formats, with what is odd in the real ones."""

import urllib.error
import urllib.request
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from raw_files import (
    MOVIELENS_1M,
    write,
    write_movielens_1m,
)
from transformers import BertConfig

from flip_hf import FlipConfig, FlipForCTR
from flip_hf.data.sources import DATASETS, movielens_1m
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
