"""Kinds of field: numbers, bags, sequences, text; and what grows later."""

import logging
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig

from flip_hf import (
    FieldConfig,
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
)
from flip_hf.data.kinds import KINDS
from flip_hf.data.schema import Fallback, InputError, canonical_lists, canonical_numbers
from flip_hf.fields import FIELD_KINDS, PADDING_ID
from flip_hf.growth import FeatureGrowth
from flip_hf.nn.bags import FieldPooling
from flip_hf.nn.ridge import ridge_predictions

FIELDS = [
    FieldConfig("user"),
    FieldConfig("title"),
    FieldConfig("price", kind="numeric", num_buckets=4),
    FieldConfig("genres", kind="multi_categorical", separator="|", max_values=3),
    FieldConfig("liked", kind="sequence", share_embedding="title", target="title", max_values=4, text_values=2),
    FieldConfig("device", hash_buckets=5),
    FieldConfig("about", kind="text"),
]


def rows(count=60):
    titles = ["kolya", "fargo", "heat", "a film", "the film"]
    return [
        {
            "user": i % 7,
            "title": titles[i % 5],
            "price": None if i % 11 == 0 else i * 0.5,
            "genres": ["drama", "drama|comedy", "", "comedy|drama|war|new"][i % 4],
            "liked": [titles[j % 5] for j in range(i % 6)],
            "device": f"phone {i % 9}",
            "about": f"film number {i}",
            "label": i % 2,
        }
        for i in range(count)
    ]


@pytest.fixture
def fitted(wordpiece):
    return FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label")


@pytest.fixture(scope="module")
def kept(wordpiece):
    """For tests that leave it as it is."""
    return FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label")


def config(processor, **options):
    text = BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return FlipConfig(text_config=text, fields=processor.fields, embedding_dim=8, projection_dim=8, **options)


def test_both_registries_hold_the_same_kinds():
    assert list(KINDS) == list(FIELD_KINDS)


@pytest.mark.parametrize(
    ("column", "numbers", "strings", "flags"),
    [
        (pa.array([1, None, -3]), [1, math.nan, -3], ["1", None, "-3"], [0, Fallback.MISSING, 0]),
        (pa.array([0.5, math.nan, 3.0, -0.0]), [0.5, math.nan, 3, 0], ["0.5", None, "3", "0"], [0, 2, 0, 0]),
        (pa.array(["2e3", " 1.50 ", ""]), [2000, 1.5, math.nan], ["2000", "1.5", None], [0, 4, Fallback.MISSING]),
        (pa.array([True, False]), [1, 0], ["1", "0"], [8, 8]),
        (pa.array([1e308]), [1e308], ["1e+308"], [0]),
    ],
)
def test_canonical_numbers(column, numbers, strings, flags):
    found, shown, found_flags = canonical_numbers(column, "price")
    np.testing.assert_array_equal(found, numbers)
    assert shown.to_pylist() == strings
    assert found_flags.tolist() == flags


@pytest.mark.parametrize(
    ("column", "row"),
    [
        (pa.array([1.0, math.inf]), 1),
        (pa.array(["1", "1,234"]), 1),
        (pa.array(["-inf"]), 0),
        (pa.array([b"1"]), 0),
        (pa.array([[1.0]]), 0),
    ],
)
def test_what_is_no_number_is_named(column, row):
    with pytest.raises(InputError, match=f"a.csv, field 'price', row {row + 10}, value"):
        canonical_numbers(column, "price", first_row=10, source="a.csv")


def test_lists_and_strings_with_a_separator_are_the_same():
    expected = (["a", "b", "c"], [0, 2, 2, 2, 3])
    for column in (pa.array([["a", " b "], [], None, [None, "c"]]), pa.array(["a| b ", "", None, "|c"])):
        strings, offsets, flags = canonical_lists(column, "genres", "|")
        assert (strings.to_pylist(), offsets.tolist()) == expected
        assert flags.tolist() == [Fallback.STRIPPED, Fallback.MISSING, Fallback.MISSING, Fallback.MISSING]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1.0], [2.5]]), "row 1, value 2.5"),
        (pa.array(["a,b"]), "need a separator"),
        (pa.array([3]), "must be a list"),
    ],
)
def test_what_is_no_list_of_ids_is_named(column, message):
    with pytest.raises(InputError, match=message):
        canonical_lists(column, "genres", None)


def test_buckets_hold_equally_many_rows_and_any_number(wordpiece):
    fields = [FieldConfig("n", kind="numeric", num_buckets=4), FieldConfig("m", kind="numeric", bucketing="log")]
    values = list(range(100))
    processor = FlipProcessor.fit({"n": values, "m": values}, fields, wordpiece)
    assert processor.feature_counts[4:8].tolist() == [25, 25, 25, 25]
    ids = processor({"n": [-1e308, 1e308, None], "m": [0, 99, None]}, return_tensors="np")["feature_ids"]
    assert ids[:, 0].tolist() == [4, 7, 3], "first bucket, last bucket, MISSING"
    assert ids[1, 1] == processor.vocabulary.ranges[1][0][1] - 1


def test_a_constant_number_is_warned_of(wordpiece, caplog):
    with caplog.at_level(logging.WARNING):
        FlipProcessor.fit({"n": [3, 3]}, [FieldConfig("n", kind="numeric")], wordpiece)
    assert "'n' holds the number 3.0 in every training row" in caplog.text


@settings(max_examples=50, deadline=None)
@given(bag=st.lists(st.sampled_from(["drama", "comedy", "war", "unseen", "other"]), max_size=6), data=st.data())
def test_bags_are_free_of_order(kept, bag, data):
    shuffled = data.draw(st.permutations(bag))
    ids = [kept(dict(rows(1)[0], genres="|".join(b)), return_tensors="np")["feature_ids"] for b in (bag, shuffled)]
    np.testing.assert_array_equal(*ids)


def test_both_views_show_the_most_recent_first(fitted):
    row = dict(rows(1)[0], liked=["heat", "kolya", "fargo"])
    encoded = fitted.encode([row])
    ids = encoded["feature_ids"][0].as_py()
    assert [fitted.vocabulary.describe(i)[1] for i in ids[6:10]] == ["fargo", "kolya", "heat", "<padding>"]
    assert "liked is fargo, kolya. device" in fitted.tokenizer.decode(encoded["input_ids"][0].as_py())


def test_padding_never_leaks():
    torch.manual_seed(0)
    pooling = FieldPooling([1, 3, 3], [None, None, 0], 4)
    ids = torch.tensor([[5, 6, 7, PADDING_ID, 8, PADDING_ID, PADDING_ID]])
    vectors = torch.randn(1, 7, 5)
    expected = pooling(vectors, ids)
    changed = torch.where((ids == PADDING_ID).unsqueeze(-1), 1e3, vectors)
    torch.testing.assert_close(pooling(changed, ids), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected[:, 1], vectors[:, 1:3].mean(dim=1))


def test_every_kind_is_masked_and_trained(fitted):
    encoded = fitted.encode(rows(), with_label=True).to_pylist()
    batch = FlipPretrainingCollator(fitted, text_mask_ratio=0.5, tabular_mask_ratio=0.5)(encoded)
    assert batch["mtm_labels"].shape == (60, 6), "text has nothing to mask in the table"
    assert (batch["mtm_labels"] != -100).any(dim=0).all()
    sequence, label = batch["masked_feature_ids"][:, 6:10], batch["mtm_labels"][:, 4]
    masked = label != -100
    assert (sequence[masked] == torch.tensor([1, 0, 0, 0])).all()
    assert (batch["feature_ids"][masked, 6:10] == label[masked, None]).any(dim=1).all()
    model = FlipForPreTraining(config(fitted))
    model.set_feature_counts(fitted.feature_counts)
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_new_features_come_behind_and_training_continues(fitted, tmp_path):
    before = fitted(rows(), return_tensors="pt")
    model = FlipForPreTraining(config(fitted)).eval()
    old = model.flip.feature_embeddings.weight.detach().clone()
    model.save_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)

    processor, model = FlipProcessor.from_pretrained(tmp_path), FlipForPreTraining.from_pretrained(tmp_path)
    new_rows = [dict(r, title=f"new film {i % 2}", user=100 + i) for i, r in enumerate(rows(4))]
    model.resize_feature_embeddings(processor.extend(new_rows), init="text")
    assert torch.equal(processor(rows(), return_tensors="pt")["feature_ids"], before["feature_ids"])
    table = model.flip.feature_embeddings.weight
    assert torch.equal(table[: len(old)], old)
    assert len(table) == len(old) + 4 + 2 == len(processor.vocabulary)
    ids = processor(new_rows, return_tensors="pt")["feature_ids"]
    assert (ids[:, :2] >= len(old)).all()

    model.save_pretrained(tmp_path / "grown")
    processor.save_pretrained(tmp_path / "grown")
    again, grown = FlipProcessor.from_pretrained(tmp_path / "grown"), FlipForCTR.from_pretrained(tmp_path / "grown")
    assert again.vocabulary == processor.vocabulary
    assert torch.equal(grown.flip.feature_embeddings.weight, table)
    grown(**again(new_rows, return_tensors="pt"), labels=torch.ones(4)).loss.backward()
    assert (grown.flip.feature_embeddings.weight.grad[ids[:, 1]] != 0).any(dim=1).all()
    with pytest.raises(ValueError, match="growth belongs to another processor"):
        model.resize_feature_embeddings(FeatureGrowth(FIELDS, again.feature_counts, list))


def test_new_features_start_from_the_mean_of_their_field(fitted):
    model = FlipForCTR(config(fitted, mode="id"))
    old = model.flip.feature_embeddings.weight.detach().clone()
    titles, _ = fitted.vocabulary.valued(1)
    model.resize_feature_embeddings(fitted.extend([dict(rows(1)[0], title="new")]))
    torch.testing.assert_close(model.flip.feature_embeddings.weight[-1], old[titles].mean(dim=0))


def test_ridge_recovers_what_is_linear_and_else_gives_the_mean():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(200, 8, generator=generator), torch.randn(8, 3, generator=generator)
    torch.testing.assert_close(
        ridge_predictions(x, x @ weights, x[:5]), (x[:5] @ weights).double(), rtol=1e-3, atol=1e-3
    )
    one = ridge_predictions(torch.zeros(4, 8), torch.arange(4.0).unsqueeze(1), torch.ones(1, 8))
    torch.testing.assert_close(one, torch.tensor([[1.5]], dtype=torch.float64))


def test_the_gate_sees_which_fields_are_oov(fitted):
    model = FlipForCTR(config(fitted, fusion="gated")).eval()
    with torch.no_grad():
        model.fusion.oov_weights[0] = -50.0
        seen, unseen = rows(2)[1], dict(rows(2)[1], user="never seen")
        output = model(**fitted([seen, unseen], return_tensors="pt"))
    torch.testing.assert_close(output.logits[0], (output.id_logits[0] + output.text_logits[0]) / 2)
    torch.testing.assert_close(output.logits[1], output.text_logits[1])


def test_features_are_dropped_to_oov_by_row_and_epoch_alone(fitted):
    encoded = fitted.encode(rows()).to_pylist()
    collator = FlipCTRCollator(fitted, oov_dropout=0.5, seed=1)
    plain, dropped = FlipCTRCollator(fitted)(encoded)["feature_ids"], collator(encoded)["feature_ids"]
    changed = plain != dropped
    assert 0.35 < changed[:, :2].float().mean() < 0.65
    assert not changed[:, 2].any(), "a number is never OOV"
    assert not changed[:, -1].any(), "nor is a hashed value"
    assert set(dropped[:, 0][changed[:, 0]].tolist()) == {fitted.vocabulary.ranges[0][0][0]}
    torch.testing.assert_close(collator(encoded[10:20])["feature_ids"], dropped[10:20])
    collator.set_epoch(1)
    assert not torch.equal(collator(encoded)["feature_ids"], dropped)
    users_only = FlipCTRCollator(fitted, oov_dropout={"user": 0.5})(encoded)["feature_ids"] != plain
    assert 0.35 < users_only[:, 0].float().mean() < 0.65
    assert not users_only[:, 1:].any()


HIDING = [
    FieldConfig("user", show_oov=False),
    FieldConfig("title"),
    FieldConfig("about", kind="text"),
    FieldConfig("genres", kind="multi_categorical", separator="|", max_values=3, show_oov=False),
    FieldConfig("device", show_oov=False),
]


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_a_dropped_feature_is_read_like_a_value_that_was_never_seen(wordpiece, mode):
    processor = FlipProcessor.fit(rows(), HIDING, wordpiece)
    encoded = processor.encode(rows())
    shares = dict.fromkeys(["user", "title", "device"], 0.5)
    dropping = FlipCTRCollator(processor, mode, oov_dropout=shares, seed=3)
    found = dropping(encoded)
    before, after = FlipCTRCollator(processor), FlipCTRCollator(processor, oov_dropout=shares, seed=3)
    changed = (before(encoded)["feature_ids"] != after(encoded)["feature_ids"]).numpy()
    assert changed[:, [0, 1, -1]].mean(axis=0) == pytest.approx(0.5, abs=0.25)
    unseen = [
        row | {name: "never seen" for name, place in (("user", 0), ("device", -1)) if changed[i, place]}
        for i, row in enumerate(rows())
    ]
    wanted = FlipCTRCollator(processor, mode)(processor.encode(unseen))
    for name in ("input_ids", "attention_mask"):
        torch.testing.assert_close(found[name], wanted[name])
    texts = wordpiece.batch_decode(found["input_ids"], skip_special_tokens=True)
    assert {"user is missing" in text for text in texts} == {True, False}
    assert not any("title is missing" in text for text in texts), "its show_oov is on"
    # A list of rows and their Arrow table are read alike.
    torch.testing.assert_close(dropping(encoded.to_pylist())["input_ids"], found["input_ids"])


def test_of_several_features_the_text_hides_none_until_all_are_dropped(wordpiece):
    processor = FlipProcessor.fit(rows(), HIDING, wordpiece)
    encoded = processor.encode(rows())
    plain, collator = FlipCTRCollator(processor), FlipCTRCollator(processor, oov_dropout={"genres": 0.5}, seed=3)
    batch, before = collator(encoded), plain(encoded)
    genres = slice(2, 5)
    kept = ((batch["feature_ids"] == before["feature_ids"]) & (before["feature_ids"] != PADDING_ID))[:, genres].any(1)
    dropped = (batch["feature_ids"] != before["feature_ids"])[:, genres].any(1)
    assert {(True, True), (True, False), (False, True)} <= set(zip(kept.tolist(), dropped.tolist(), strict=True))
    say_missing = [
        ["genres is missing" in text for text in wordpiece.batch_decode(b["input_ids"], skip_special_tokens=True)]
        for b in (before, batch)
    ]
    assert say_missing[1] == [said or not left for said, left in zip(say_missing[0], kept.tolist(), strict=True)]


def test_no_text_grows_when_a_feature_is_dropped(wordpiece, monkeypatch):
    processor = FlipProcessor.fit(rows(), HIDING, wordpiece)
    encoded = processor.encode(rows())
    monkeypatch.setattr(type(processor.template), "missing_tokens", [5, 6, 7])
    before = FlipCTRCollator(processor)(encoded)
    after = FlipCTRCollator(processor, oov_dropout={"user": 0.9}, seed=3)(encoded)
    assert (after["attention_mask"].sum(1) <= before["attention_mask"].sum(1)).all()
    user_tokens = (np.stack(encoded["token_field_ids"].to_pylist()[0]) == 0).sum()
    assert user_tokens == 1
    assert (after["input_ids"] == 5).any(), "its first token stands for all"
    assert not (after["input_ids"] == 6).any()


def test_only_fields_with_an_oov_feature_drop_to_it(fitted):
    with pytest.raises(ValueError, match="'price' is not a field with an OOV feature: 'user'"):
        FlipCTRCollator(fitted, oov_dropout={"price": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "numbers"}, "kind='numbers' is not one of"),
        ({"separator": ","}, "separator is a setting of the kinds multi_categorical, sequence"),
        ({"kind": "numeric", "num_buckets": 1}, "num_buckets=1 must be a whole number of at least 2"),
        ({"kind": "numeric", "bucketing": "even"}, "bucketing='even' is not one of quantile, log"),
        ({"hash_buckets": 5, "min_count": 2}, "min_count has no effect with hash_buckets"),
        ({"hash_buckets": 5, "show_oov": False}, "show_oov has no effect with hash_buckets"),
        ({"kind": "text", "show_oov": False}, "show_oov is a setting of the kinds categorical, multi_categorical, seq"),
        ({"show_oov": "no"}, "show_oov='no' must be true or false"),
        ({"share_embedding": "b", "min_count": 2}, "uses the features of 'b'; set min_count there"),
    ],
)
def test_settings_that_can_not_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FieldConfig("a", **settings)


@pytest.mark.parametrize("kind", ["categorical", "multi_categorical"])
def test_a_hashed_field_may_be_empty_in_a_whole_batch(kind):
    field = FieldConfig("device", kind=kind, hash_buckets=5)
    empty = [None] * 20 if kind == "categorical" else [[]] * 20
    some = ["a"] if kind == "categorical" else [["a"]]
    found = KINDS[kind]
    counter = found.counter(field)
    for values in (empty, some, empty):
        counter.add(found.read(pa.chunked_array([pa.array(values, pa.array(some).type)]), field, 0, None))
    counted = counter.result()
    assert (counted.num_missing, counted.counts.sum()) == (40, 1)
    index = found.index(field, counted.values)
    places = index.feature_offsets(found.read(pa.chunked_array([pa.array(empty, pa.array(some).type)]), field, 0, None))
    assert places.dtype == np.int64


def test_attention_that_is_normalised_by_length_is_din_over_the_number_of_values(kept):
    torch.manual_seed(0)
    plain = FlipForCTR(config(kept, mode="id")).eval()
    other = FlipForCTR(config(kept, mode="id", attention_normalization="length")).eval()
    other.load_state_dict(plain.state_dict())
    batch = FlipCTRCollator.from_model(kept, plain)(kept.encode(rows(12)))
    summed, mean = (m.flip.encode_tabular(**batch).field_embeddings for m in (plain, other))
    place = [f.name for f in kept.fields if f.traits.has_features].index("liked")
    lengths = torch.tensor([[max(1, min(len(row["liked"]), 4))] for row in rows(12)])
    torch.testing.assert_close(mean[:, place], summed[:, place] / lengths)
    others = [i for i in range(mean.shape[1]) if i != place]
    torch.testing.assert_close(mean[:, others], summed[:, others])
    with pytest.raises(StrictDataclassError, match="attention_normalization"):
        config(kept, attention_normalization="softmax")
