"""One spelling for each value, in training and in serving: the cases that were reported."""

import datetime
import logging
import math
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from flip_hf import FieldConfig, FlipProcessor
from flip_hf.data.schema import InputError, canonical_labels, canonical_lists, canonical_numbers, canonical_strings


def buckets(processor, column):
    return processor.encode(pa.table({"price": column}))["feature_ids"].to_pylist()


def ids(column):
    return canonical_strings(column, "id")[0].to_pylist()


def texts(column):
    return canonical_numbers(column, "price")[1].to_pylist()


@pytest.fixture
def prices(wordpiece):
    """Fitted on float32 numbers, four buckets."""
    log = pa.table({"price": pa.array([0.1, 0.2, 0.3, 0.4], pa.float32())})
    return FlipProcessor.fit(log, [FieldConfig("price", kind="numeric", num_buckets=4)], wordpiece)


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([0.1, 0.2, 0.3, 0.4]), id="float64"),
        pytest.param(pa.array(["0.1", "0.2", "0.3", "0.4"]), id="string"),
        pytest.param(pa.array([Decimal("0.1"), Decimal("0.2"), Decimal("0.3"), Decimal("0.4")]), id="decimal"),
        pytest.param(pa.array(np.float16([0.1, 0.2, 0.3, 0.4])), id="float16"),
    ],
)
def test_numbers_fitted_as_float32_have_the_same_buckets_in_every_type(prices, column):
    own = pa.array([0.1, 0.2, 0.3, 0.4], pa.float32())
    assert buckets(prices, column) == buckets(prices, own) == [[4], [5], [6], [7]]


def test_float32_in_training_and_python_numbers_in_serving_rank_alike(wordpiece):
    random = np.random.default_rng(0)
    shown = np.round(random.uniform(0, 1, 2000), 1)
    rates = {price: i % 2 for i, price in enumerate(np.unique(shown).tolist())}
    clicks = np.array([rates[price] for price in shown.tolist()])
    fields = [FieldConfig("price", kind="numeric", num_buckets=32)]
    processor = FlipProcessor.fit(pa.table({"price": pa.array(shown, pa.float32())}), fields, wordpiece)
    trained = np.array(buckets(processor, pa.array(shown, pa.float32())))[:, 0]
    rate_of_bucket = {bucket: clicks[trained == bucket].mean() for bucket in np.unique(trained).tolist()}
    served = processor.encode([{"price": price} for price in shown.tolist()])["feature_ids"].to_pylist()
    scores = [rate_of_bucket.get(bucket, 0.5) for (bucket,) in served]
    assert roc_auc_score(clicks, scores) == 1.0


def test_a_decimal_is_the_number_that_it_spells():
    numbers, _, _ = canonical_numbers(pa.array([Decimal("0.3"), Decimal("4.6")], pa.decimal128(10, 1)), "price")
    assert numbers.tolist() == [0.3, 4.6]


def test_a_large_whole_number_has_one_text():
    columns = pa.array([1700000000000]), pa.array([1700000000000.0]), pa.array(["1700000000000"])
    assert [texts(column) for column in columns] == [["1700000000000"]] * 3


def test_five_as_a_decimal_has_the_text_of_five():
    assert texts(pa.array([Decimal("5.00")])) == texts(pa.array([5])) == ["5"]


def test_ids_of_every_type_have_one_spelling():
    assert ids(pa.array([True, False])) == ["true", "false"]
    assert ids(pa.array([196.0, math.nan])) == ["196", None]
    assert ids(pa.array([Decimal("5.00")])) == ids(pa.array([5])) == ["5"]
    time = datetime.datetime(2024, 1, 2, 3, 4, 5)
    assert {ids(pa.array([time], pa.timestamp(unit)))[0] for unit in ("s", "ms", "us", "ns")} == {"2024-01-02 03:04:05"}
    assert (
        ids(pa.array([datetime.date(2024, 1, 2)])) == ids(pa.array([datetime.datetime(2024, 1, 2)])) == ["2024-01-02"]
    )
    assert ids(pa.array(["e\u0301"])) == ids(pa.array(["\u00e9"]))


def test_words_for_nothing_are_values_and_nothing_is_missing(wordpiece):
    log = pd.DataFrame({"id": ["NA", "null", None, np.nan, "", pd.NaT]})
    processor = FlipProcessor.fit(log, ["id"], wordpiece)
    assert processor.vocabulary.values[0].to_pylist() == ["NA", "null"]
    assert processor.vocabulary.counts[3] == 4


def test_a_number_that_a_float_can_not_tell_apart_is_an_error():
    with pytest.raises(InputError, match=r"field 'id', row 0, value 9007199254740992.0: too large to be exact"):
        canonical_strings(pa.array([2.0**53]), "id")


def test_ids_that_serving_spells_otherwise_are_warned_of(wordpiece, caplog):
    train = pd.DataFrame({"user_id": [str(196 + i % 5) for i in range(100)]})
    processor = FlipProcessor.fit(train, ["user_id"], wordpiece)
    served = datasets.Dataset.from_dict({"user_id": ["196", *["196.0"] * 99]})
    with caplog.at_level(logging.WARNING, "flip_hf"):
        processor.encode_dataset(served, source="validation.csv")
    assert caplog.messages == [
        "validation.csv: fallbacks in 100 rows: user_id 99 oov",
        "validation.csv, field 'user_id': 99% of the rows unseen (0% in training); "
        "seen in training: '196'; here: '196.0'",
    ]


def test_lists_that_are_written_as_text_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "flip_hf"):
        canonical_lists(pa.array(["a,b", "[11, 12]"]), "liked", ",", source="lists.csv")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("lists.csv, field 'liked', row 1, value '[11, 12]': looks like a list")


def test_decimal_labels_are_read():
    assert canonical_labels(pa.array([Decimal("1.00"), Decimal("0.00")]), "label").tolist() == [1, 0]


def test_list_views_and_dictionaries_of_string_views_are_read():
    assert canonical_lists(pa.array([[1], [2, 3]], pa.list_view(pa.int64())), "f", None)[0].to_pylist() == [
        "1",
        "2",
        "3",
    ]
    column = pa.DictionaryArray.from_arrays(pa.array([1, 0]), pa.array(["a", "b"], pa.string_view()))
    assert ids(column) == ["b", "a"]


class HandsOverArrow:
    """What polars, DuckDB and others are to Arrow."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


LOG = {"user_id": [196, 22, 196, 7], "label": [1, 0, 1, 0]}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(HandsOverArrow(pa.table(LOG)), id="stream"),
        pytest.param(pa.RecordBatchReader.from_batches(pa.table(LOG).schema, pa.table(LOG).to_batches()), id="reader"),
        pytest.param(pd.DataFrame(LOG), id="pandas"),
        pytest.param(LOG, id="columns"),
        pytest.param([dict(zip(LOG, row, strict=True)) for row in zip(*LOG.values(), strict=True)], id="dicts"),
        pytest.param(datasets.Dataset.from_dict(LOG).to_iterable_dataset(), id="streaming dataset"),
    ],
)
def test_a_dataset_in_every_form_is_encoded(rows, wordpiece):
    processor = FlipProcessor.fit(LOG, ["user_id"], wordpiece, label="label")
    expected = processor.encode(LOG, with_label=True).to_pylist()
    found = [{k: np.asarray(v).tolist() for k, v in row.items()} for row in processor.encode_dataset(rows)]
    assert found == expected


def test_a_polars_frame_is_fitted_and_encoded(wordpiece):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(LOG, schema_overrides={"user_id": polars.Int32})
    processor = FlipProcessor.fit(frame, ["user_id"], wordpiece, label="label")
    assert processor.vocabulary == FlipProcessor.fit(LOG, ["user_id"], wordpiece, label="label").vocabulary
    assert processor.encode(frame)["feature_ids"].to_pylist() == processor.encode(LOG)["feature_ids"].to_pylist()


def test_splits_are_encoded_each(wordpiece):
    processor = FlipProcessor.fit(LOG, ["user_id"], wordpiece)
    rows = datasets.Dataset.from_dict(LOG)
    encoded = processor.encode_dataset(datasets.DatasetDict(train=rows, test=rows.select([1])))
    assert {name: len(part) for name, part in encoded.items()} == {"train": 4, "test": 1}


def test_a_stream_is_encoded_when_it_is_read(wordpiece):
    processor = FlipProcessor.fit(LOG, ["user_id"], wordpiece)
    taken = []

    def rows():
        for i in range(10_000):
            taken.append(i)
            yield {"user_id": 196 + i}

    encoded = processor.encode_dataset(datasets.IterableDataset.from_generator(rows))
    first = next(iter(encoded))
    assert first["row"] == 0
    assert len(taken) < 5000


def test_files_are_encoded_as_they_are_fitted(wordpiece, tmp_path):
    pd.DataFrame(LOG).to_csv(tmp_path / "log.csv", index=False)
    processor = FlipProcessor.fit(tmp_path / "log.csv", ["user_id"], wordpiece, label="label")
    expected = processor.encode(LOG, with_label=True).to_pydict()
    encoded = processor.encode_dataset(tmp_path / "log.csv").with_format("arrow")[:].to_pydict()
    assert encoded == expected
