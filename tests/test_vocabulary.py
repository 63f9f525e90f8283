"""Which values get which ids, and what a saved vocabulary promises."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_hf import FieldConfig
from flip_hf.data.kinds import FieldValues, categorical
from flip_hf.data.schema import InputError
from flip_hf.data.vocabulary import FeatureVocabulary, value_hash
from flip_hf.fields import feature_ranges, missing_id, oov_id

FIELDS = [FieldConfig("user"), FieldConfig("item")]
rows = st.lists(st.tuples(st.sampled_from("abcde") | st.none(), st.sampled_from("vwxyz") | st.none()), min_size=1)


def strings(values):
    return FieldValues(pa.array(values, pa.string()), np.zeros(len(values), dtype=np.uint8))


def batch(pairs):
    return {name: strings([p[i] for p in pairs]) for i, name in enumerate(("user", "item"))}


@settings(max_examples=100, deadline=None)
@given(pairs=rows, cut=st.integers(0, 50), min_count=st.integers(1, 3))
def test_ids_and_counts_follow_the_data(pairs, cut, min_count):
    fields = [FieldConfig("user", min_count=min_count), FieldConfig("item")]
    vocabulary = FeatureVocabulary.fit([batch(pairs)], fields)
    position = 2
    for i, field in enumerate(vocabulary.fields):
        counted = Counter(p[i] for p in pairs)
        num_missing = counted.pop(None, 0)
        kept = sorted((v for v, n in counted.items() if n >= field.min_count), key=lambda v: (-counted[v], v))
        rare = sum(n for v, n in counted.items() if v not in kept)
        expected = [rare, num_missing, *(counted[v] for v in kept)]
        assert vocabulary.counts[position : position + len(expected)].tolist() == expected
        ids = vocabulary.lookup(i, strings([*kept, "never seen", None]))
        assert ids.tolist() == [*range(position + 2, position + 2 + len(kept)), position, position + 1]
        assert ids.dtype == np.int64
        assert [vocabulary.describe(n) for n in ids] == [(field.name, v) for v in [*kept, "<oov>", "<missing>"]]
        position += len(expected)
    assert len(vocabulary) == position == len(vocabulary.counts)

    # Neither the order of the rows nor how they come in batches matters.
    parts = [part for part in (pairs[::-1][:cut], pairs[::-1][cut:]) if part]
    assert FeatureVocabulary.fit([batch(part) for part in parts], fields) == vocabulary


def test_the_reserved_features_of_a_field_are_found_from_its_ranges():
    fields = [FieldConfig("user"), FieldConfig("item"), FieldConfig("other", share_embedding="item")]
    some = {name: strings(["a", None]) for name in ("user", "item", "other")}
    vocabulary = FeatureVocabulary.fit([some], fields).extended([{name: strings(["b"]) for name in some}])
    for i, ranges in enumerate(feature_ranges(vocabulary.fields)):
        assert len(ranges) == 2, "the field was extended"
        expected = [oov_id(ranges), missing_id(ranges)]
        assert vocabulary.lookup(i, strings(["never seen", None])).tolist() == expected
        owner = vocabulary.fields[vocabulary.owner(i)].name
        assert [vocabulary.describe(n) for n in expected] == [(owner, "<oov>"), (owner, "<missing>")]


@settings(max_examples=100, deadline=None)
@given(
    kept=st.lists(st.text(max_size=4), unique=True, max_size=30),
    asked=st.lists(st.text(max_size=4) | st.none(), max_size=60),
    num_hashes=st.integers(1, 40),
)
def test_strings_of_one_hash_are_told_apart(kept, asked, num_hashes):
    expected = {None: 1, **{value: 2 + i for i, value in enumerate(kept)}}
    asked = [*asked, *kept]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categorical, "_HASHED_AT_ONCE", 7)
        patch.setattr(categorical, "_hashes", lambda texts: np.array([len(t) % num_hashes for t in texts], np.int64))
        index = categorical.ValueIndex(pa.array(kept, pa.string()))
        for part in (asked, asked[:3]):
            assert index.feature_offsets(strings(part)).tolist() == [expected.get(value, 0) for value in part]


def test_merging_often_changes_nothing(monkeypatch):
    pairs = [(str(i % 97), str(i % 31)) for i in range(1000)]
    expected = FeatureVocabulary.fit([batch(pairs)], FIELDS)
    monkeypatch.setattr(categorical, "_MERGE_AT", 20)
    assert FeatureVocabulary.fit([batch(pairs[i : i + 10]) for i in range(0, 1000, 10)], FIELDS) == expected


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        FeatureVocabulary.fit([], FIELDS)
    with pytest.raises(InputError, match="no rows"):
        FeatureVocabulary.fit([batch([])], FIELDS)


@pytest.fixture
def fitted():
    return FeatureVocabulary.fit([batch([("a", "x"), ("a", None), ("b", "y"), ("ü", "x")])], FIELDS)


def test_saving_and_loading_is_exact(fitted, tmp_path):
    fitted.save(tmp_path / "v.parquet")
    loaded = FeatureVocabulary.load(tmp_path / "v.parquet", fitted.fields)
    assert loaded == fitted
    assert loaded.counts.dtype == np.int64
    assert loaded.describe(0) == (None, "<padding>")
    assert loaded.describe(1) == (None, "<mask>")


def edited(table, column, row, value):
    values = table[column].cast(pa.string()).to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.slice(0, len(t) - 1), "holds 10 features, but the fields beside it have 11"),
        (lambda t: edited(t, "value", 4, "b"), "field 'user'.* not the features of this field"),
        (lambda t: edited(t, "value", 4, None), "field 'user'.* not the features of this field"),
        (lambda t: edited(t, "field", 8, "user"), "field 'item'.* not the features of this field"),
        (lambda t: edited(t, "reserved", 2, None), "field 'user'.* not the features of this field"),
        (lambda t: t.drop_columns(["count"]), "not a readable vocabulary"),
    ],
)
def test_a_vocabulary_that_was_edited_is_refused(fitted, tmp_path, edit, message):
    path = tmp_path / "v.parquet"
    pq.write_table(edit(fitted.to_table()), path)
    with pytest.raises(InputError, match=message) as caught:
        FeatureVocabulary.load(path, fitted.fields)
    assert str(path) in str(caught.value)


def test_a_truncated_vocabulary_is_refused(fitted, tmp_path):
    path = tmp_path / "v.parquet"
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable vocabulary"):
        FeatureVocabulary.load(path, fitted.fields)


def test_a_vocabulary_of_other_fields_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "v.parquet")
    with pytest.raises(InputError, match="field 'item'"):
        FeatureVocabulary.load(tmp_path / "v.parquet", [f.fitted(f.num_features) for f in fitted.fields[::-1]])


def test_a_vocabulary_is_known_by_its_values(tmp_path):
    def fitted(values):
        return FeatureVocabulary.fit([{"a": strings(values)}], [FieldConfig("a")])

    own, other = fitted(["x", "y"]), fitted(["x", "z"])
    assert own.fields != other.fields
    assert own.fields == fitted(["y", "x"]).fields
    assert fitted(["xy", "z"]).fields != fitted(["x", "yz"]).fields
    grown = own.extended([{"a": strings(["x", "w"])}])
    assert grown.fields[0].value_hashes == (*own.fields[0].value_hashes, value_hash(pa.array(["w"])))
    for vocabulary in (own, grown):
        vocabulary.save(tmp_path / "v.parquet")
        assert FeatureVocabulary.load(tmp_path / "v.parquet", vocabulary.fields) == vocabulary
    other.save(tmp_path / "v.parquet")
    with pytest.raises(InputError, match="field 'a': the values differ from those that the field was fitted on"):
        FeatureVocabulary.load(tmp_path / "v.parquet", own.fields)


def test_a_vocabulary_of_an_earlier_version_grows_without_fingerprints(tmp_path):
    field = FieldConfig("a", num_features=4)
    own = FeatureVocabulary([field], [pa.array(["x", "y"])], np.ones(6, dtype=np.int64))
    assert own.extended([{"a": strings(["w"])}]).fields[0].value_hashes == ()
