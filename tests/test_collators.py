"""What collators check of rows, models and settings, which columns they read, and what they drop."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig

from flip_hf import FieldConfig, FlipConfig, FlipCTRCollator, FlipForCTR, FlipForPreTraining, FlipPretrainingCollator
from flip_hf.data import collators, encoded_rows
from flip_hf.data.collator_checks import check_collator, check_training_rows
from flip_hf.data.encoded_rows import EncodedRows, check_stream
from flip_hf.field_checks import check_fields
from flip_hf.fields import feature_ranges
from flip_hf.processing_flip import FlipProcessor

USER, ITEM = ["user_id", "gender", "age"], ["title", "genre"]


def message_of(call, *args, **kwargs):
    with pytest.raises(ValueError, match=r"\w") as caught:
        call(*args, **kwargs)
    return str(caught.value)


def model_of(cls, processor, **settings):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertConfig(**size, vocab_size=len(processor.tokenizer))
    return cls(FlipConfig(text_config=text, fields=processor.fields, embedding_dim=4, projection_dim=8, **settings))


# Columns


@pytest.fixture
def hiding(click_rows, wordpiece):
    """A processor whose field `title` is shown as missing if it is dropped."""
    fields = ["user_id", "gender", "age", FieldConfig("title", show_oov=False), "genre"]
    return FlipProcessor.fit(click_rows, fields, wordpiece, label="label")


TEXT, OWNERS, FEATURES = ["input_ids", "attention_mask"], "token_field_ids", "feature_ids"


@pytest.mark.parametrize(
    ("settings", "read", "optional", "reads_numbers"),
    [
        ({}, [*TEXT, FEATURES], {"row"}, False),
        ({"mode": "id"}, [FEATURES], {"row"}, False),
        ({"mode": "text"}, TEXT, {"row"}, False),
        ({"mode": "text", "text_towers": [USER, ITEM]}, [*TEXT, OWNERS], {"row"}, False),
        ({"oov_dropout": {"user_id": 0.5}}, [*TEXT, FEATURES], set(), True),
        ({"oov_dropout": {"user_id": 0.0}}, [*TEXT, FEATURES], {"row"}, False),
        ({"oov_dropout": 0.5}, [*TEXT, OWNERS, FEATURES], set(), True),
        ({"oov_dropout": 0.5, "mode": "id"}, [FEATURES], set(), True),
        ({"oov_dropout": 0.5, "mode": "text"}, [*TEXT, OWNERS, FEATURES], set(), True),
        # No text depends on the user's feature.
        ({"oov_dropout": {"user_id": 0.5}, "mode": "text"}, TEXT, {"row"}, False),
    ],
    ids=str,
)
def test_the_columns_that_are_read_depend_on_the_mode_and_on_what_is_dropped(
    hiding, settings, read, optional, reads_numbers
):
    collator = FlipCTRCollator(hiding, **settings)
    assert collator.columns == [*read, "row", "label", "teacher_logit"]
    unneeded = optional | {"attention_mask", "label", "teacher_logit"}
    assert collator.needed_columns == [name for name in collator.columns if name not in unneeded]
    assert collator.reads_numbers is reads_numbers


def test_pretraining_reads_numbers_features_and_texts(processor):
    collator = FlipPretrainingCollator(processor)
    assert collator.columns == ["row", "feature_ids", "input_ids", "token_field_ids", "attention_mask"]
    assert collator.needed_columns == collator.columns[:-1]
    assert collator.fields == processor.fields


def test_a_data_loader_reads_the_columns_that_there_are():
    rows = EncodedRows(Dataset.from_dict({"row": [0, 1, 2], "label": [1, 0, 1], "other": [7, 8, 9]}), ["label", "row"])
    assert len(rows) == 3
    assert rows.__getitems__([2, 0]).to_pydict() == {"label": [1, 1], "row": [2, 0]}
    assert EncodedRows(Dataset.from_dict({"row": [0]}), ["label", "row"]).__getitems__([0]).column_names == ["row"]


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("row", ", on which masks and dropped features depend"),
        ("token_field_ids", ", which says what field each token belongs to"),
    ],
)
def test_a_column_that_is_missing_is_named_with_its_purpose(processor, click_rows, name, purpose, as_list):
    rows = processor.encode(click_rows).drop_columns([name]).slice(0, 3)
    expected = (
        f"the encoded rows lack the column {name!r}{purpose}. FlipProcessor.encode and encode_dataset create it; "
        "calling the processor does not. To keep it, set TrainingArguments(remove_unused_columns=False) for "
        "transformers.Trainer, or row_column for flip_hf.integrations.ray.BatchEncoder"
    )
    collator = FlipPretrainingCollator(processor)
    assert message_of(collator, rows.to_pylist() if as_list else rows) == expected
    assert message_of(check_training_rows, Dataset(rows), collator) == expected
    without = Dataset(rows).remove_columns("feature_ids")
    assert message_of(check_training_rows, without, FlipCTRCollator(processor)) == (
        "the encoded rows lack the column 'feature_ids'. FlipProcessor.encode and encode_dataset create it. "
        "To keep it, set TrainingArguments(remove_unused_columns=False) for transformers.Trainer, or row_column for "
        "flip_hf.integrations.ray.BatchEncoder"
    )


def test_row_numbers_are_whole(processor, click_rows):
    rows = processor.encode(click_rows).slice(0, 2)
    rows = rows.set_column(rows.column_names.index("row"), "row", pa.array([1.5, 2.0]))
    expected = "the column 'row' must hold whole numbers, but it holds float64, such as 1.5"
    assert message_of(FlipPretrainingCollator(processor), rows) == expected
    assert message_of(check_training_rows, Dataset(rows), FlipPretrainingCollator(processor)) == expected


# Rows that are not encoded, or by another processor


@pytest.mark.parametrize("make", [FlipCTRCollator, FlipPretrainingCollator])
def test_what_is_no_batch_of_encoded_rows_says_what_it_takes(processor, click_rows, make):
    collator, table = make(processor), pa.table(click_rows).slice(0, 4)
    encoded = processor.encode(table, with_label=True)
    columns = encoded.to_pydict()
    takes = "a collator takes encoded rows as a list of dicts or a pyarrow.Table, not a "
    for rows, kind in (
        (columns, "dict"),
        (encoded.slice(0, 1).to_pylist()[0], "dict"),
        (encoded.to_batches()[0], "RecordBatch"),
        (encoded.to_pandas(), "DataFrame"),
        ([1, 2], "list of int"),
        ("rows", "str"),
        (None, "NoneType"),
    ):
        assert message_of(collator, rows).startswith(takes + kind), kind
    for rows in ([], encoded.slice(0, 0)):
        assert message_of(collator, rows).startswith("the batch has no rows")
    for rows in (table, table.to_pylist()):
        assert message_of(collator, rows).startswith("the encoded rows lack the column ")
    collator(Dataset(encoded))


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_rows_that_were_mapped_one_by_one_say_how_to_map_them(processor, click_rows, mode, as_list):
    table = pa.table(click_rows).slice(0, 3)
    mapped = Dataset(table).map(processor, remove_columns=table.column_names)
    rows = [mapped[i] for i in range(3)] if as_list else mapped.with_format("arrow")[:]
    found = message_of(FlipCTRCollator(processor, mode), rows)
    name = "input_ids" if mode == "text" else "feature_ids"
    assert found.startswith(f"row 0 of the batch must have a list of whole numbers in '{name}', not ")
    assert found.endswith("If you map the processor, use dataset.map(processor, batched=True)")


def test_a_row_that_lacks_what_the_others_have_is_named(processor, click_rows):
    rows = processor.encode(pa.table(click_rows).slice(0, 3), with_label=True).to_pylist()
    for name in ("feature_ids", "input_ids", "label"):
        wrong = [*rows[:2], {key: value for key, value in rows[2].items() if key != name}]
        assert message_of(FlipCTRCollator(processor), wrong) == (
            f"row 2 of the batch has no {name!r}, but other rows have one; encode all rows in the same way"
        )
    halves = [rows[0], {**rows[1], "feature_ids": [2.5] * 5}]
    assert message_of(FlipCTRCollator(processor), halves).startswith("row 1 of the batch must have a list of whole")


def test_unlabelled_rows_are_refused_before_training(processor, click_rows):
    rows = processor.encode_dataset(click_rows, with_label=False)
    assert "encode_dataset(dataset, with_label=True)" in message_of(
        check_training_rows, rows, FlipCTRCollator(processor)
    )
    check_training_rows(rows, FlipPretrainingCollator(processor))
    collator, model = FlipCTRCollator(processor), model_of(FlipForCTR, processor)
    batch = collator([rows[0]])
    assert "encode_dataset(dataset, with_label=True)" in message_of(model.num_items, batch)
    assert model(**batch).logits.shape == (1,)


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("make", [FlipCTRCollator, FlipPretrainingCollator])
def test_rows_of_another_processor_are_refused(processor, click_rows, field_names, wordpiece, make, as_list):
    fewer = {name: values[:30] for name, values in click_rows.items()}
    for fields in (field_names, field_names[::-1], field_names[:3]):
        other = FlipProcessor.fit(fewer, fields, wordpiece, label="label")
        rows = other.encode(click_rows)
        found = message_of(make(processor), rows.to_pylist() if as_list else rows)
        assert "another processor encoded the rows; encode them with this collator's" in found
    three = message_of(make(processor), rows)
    assert three.startswith("row 0 of the batch has 3 feature_ids, but the fields of the collator's processor have 5")
    first, end = feature_ranges(processor.fields)[1][0]
    rows = processor.encode(click_rows).slice(0, 3).to_pylist()
    for wrong in (first - 1, end, 1, -1):
        rows[2]["feature_ids"][1] = wrong
        assert message_of(make(processor), rows).startswith(
            f"row 2 of the batch holds feature id {wrong} at a position of field 'gender', which has no such feature"
        )
    for right in (first, end - 1):
        rows[2]["feature_ids"][1] = right
        make(processor)(rows)


def test_features_of_shared_extended_and_several_valued_fields_are_their_own(wordpiece):
    fields = [
        FieldConfig("item"),
        FieldConfig("seen", kind="sequence", share_embedding="item", max_values=3),
        FieldConfig("user"),
    ]
    rows = [{"item": i, "seen": [0, i], "user": i} for i in range(3)]
    processor = FlipProcessor.fit(rows, fields, wordpiece)
    processor.extend([{"item": 7, "seen": [8], "user": 9}])
    processor.extend([{"item": 17, "seen": [18], "user": 9}])
    more = [*rows, {"item": 7, "seen": [8, 17], "user": 9}, {"item": 99, "seen": [], "user": None}]
    encoded = processor.encode(more).to_pylist()
    assert FlipCTRCollator(processor)(encoded)["feature_ids"].tolist() == [row["feature_ids"] for row in encoded]
    encoded[0]["feature_ids"][4] = encoded[3]["feature_ids"][0]  # an item's, added later, in the place of the user's
    assert "at a position of field 'user'" in message_of(FlipCTRCollator(processor), encoded)


# Streams


def test_workers_do_not_share_a_stream_whose_numbers_count(processor, click_rows):
    shards = Dataset.from_dict(click_rows).to_iterable_dataset(num_shards=4)
    stream = processor.encode_dataset(shards)
    collator, plain = FlipPretrainingCollator(processor), FlipCTRCollator(processor)
    message = "2 workers would read one stream, and each would number its rows from 0"
    for numbered in (collator, FlipCTRCollator(processor, oov_dropout=0.5)):
        assert message_of(check_stream, stream, 2, numbered).startswith(message)
    for rows, workers, right in ((stream, 1, collator), (stream, 2, plain), (Dataset.from_dict({}), 2, collator)):
        check_stream(rows, workers, right)
    with pytest.raises(ValueError, match=message):
        next(iter(DataLoader(stream, 8, collate_fn=collator, num_workers=2)))
    for num_workers in (0, 1):
        alone = DataLoader(stream, 8, collate_fn=collator, num_workers=num_workers)
        assert sum(len(batch["feature_ids"]) for batch in alone) == 300


# Rows that share a number


def unseen(processor):
    """The features of a row of which all values are unseen."""
    return [ranges[0][0] for ranges in feature_ranges(processor.fields)]


def numbered(numbers, feature_ids, input_ids, **more):
    columns = {"row": numbers, "feature_ids": feature_ids, "input_ids": input_ids, "token_field_ids": input_ids}
    return Dataset.from_dict(columns | more)


SAME = [[2, 3]] * 5
ONE_TEXT = [[5, 6]] * 5


@pytest.mark.parametrize("compared", [1, 2, 4096])
@pytest.mark.parametrize(
    ("rows", "number", "count"),
    [
        (numbered([0, 1, 2, 3, 4], SAME, ONE_TEXT), None, 0),
        (numbered([4, 1, 3, 0, 2], SAME, ONE_TEXT), None, 0),
        (numbered([4, 1, 4, 0, 4], SAME, ONE_TEXT), None, 0),
        (numbered([4, 1, 4, 0, 4], [[2, 3]] * 4 + [[2, 4]], ONE_TEXT), 4, 3),
        (numbered([7, 7, 2, 2, 1], [[2, 3], [2, 4], [2, 3], [2, 3], [2, 3]], ONE_TEXT), 7, 2),
        (numbered([0, 0, 1, 1, 2], [[2, 3], [2, 3], [2, 3], [9, 3], [2, 3]], ONE_TEXT), 1, 2),
        (numbered([0, 1, 2, 3, 3], SAME, [[5, 6]] * 4 + [[5, 7]]), 3, 2),
        # One text is the beginning of the other.
        (numbered([0, 1, 2, 3, 3], SAME, [[5, 6]] * 4 + [[5, 6, 1]]), 3, 2),
        (numbered([0, 1, 2, 3, 3], SAME, [[5, 6]] * 4 + [[5, 6, 0]]), 3, 2),
        # Padding is no text.
        (
            numbered([0, 1, 2, 3, 3], SAME, [[5, 6]] * 4 + [[5, 6, 0]], attention_mask=[[1, 1]] * 4 + [[1, 1, 0]]),
            None,
            0,
        ),
    ],
)
def test_training_rows_share_a_number_only_if_they_are_the_same(processor, monkeypatch, rows, number, count, compared):
    monkeypatch.setattr(encoded_rows, "_COMPARED_ROWS", compared)
    collator = FlipPretrainingCollator(processor)
    if number is None:
        check_training_rows(rows, collator)
    else:
        assert message_of(check_training_rows, rows, collator) == (
            f"{count} different rows share row number {number}, so all of them would get the same masks "
            "and dropped features, which depend on the number. Encode all rows at once with "
            "processor.encode_dataset(dataset), or each part with processor.encode(rows, first_row=...), or renumber "
            "the rows: rows.remove_columns('row').add_column('row', list(range(len(rows))))"
        )


def test_only_what_a_collator_reads_is_compared(processor):
    rows = numbered([3, 3], [[2, 3]] * 2, [[5, 6], [5, 7]], label=[0, 1])
    check_training_rows(rows, FlipCTRCollator(processor))
    check_training_rows(rows.remove_columns("row"), FlipCTRCollator(processor))
    by_features = FlipCTRCollator(processor, "id", oov_dropout=0.5)
    check_training_rows(rows, by_features)
    check_training_rows(rows.remove_columns(["input_ids", "token_field_ids"]), by_features)
    assert "share row number 3" in message_of(check_training_rows, rows, FlipCTRCollator(processor, oov_dropout=0.5))
    check_training_rows(rows.remove_columns("row"), lambda rows: rows)


# Fields and models


def test_fields_of_another_order_or_setting_are_named(processor):
    check_fields(processor.fields, list(processor.fields))
    advice = "Load both from the same folder. After processor.extend, resize the model and save both"
    two = [FieldConfig("a", num_features=4), FieldConfig("b", num_features=5, max_tokens=7)]
    assert message_of(check_fields, two, two[::-1]) == (
        "the processor's fields are not the model's: the processor has 'a', 'b' and the model 'b', 'a'. " + advice
    )
    other = [two[0], FieldConfig("b", num_features=5, max_tokens=8)]
    assert message_of(check_fields, two, other) == (
        "the processor's fields are not the model's: field 'b' has max_tokens=7 in the processor and 8 in the model. "
        + advice
    )


def test_a_collator_belongs_to_a_kind_of_model_in_its_mode(processor):
    joint, ids = model_of(FlipForCTR, processor), model_of(FlipForCTR, processor, mode="id")
    towers = [USER, ITEM]
    cut = model_of(FlipForCTR, processor, mode="text", text_towers=towers)
    pretrained = model_of(FlipForPreTraining, processor)
    right = [
        (FlipCTRCollator(processor), joint),
        (FlipCTRCollator(processor), ids),  # which reads one of the views of a joint batch
        (FlipCTRCollator(processor, "id"), ids),
        (FlipCTRCollator(processor, "text", text_towers=[tuple(tower) for tower in towers]), cut),
        (FlipCTRCollator(processor, "text", text_towers={"user": USER, "item": ITEM}), cut),
        (FlipCTRCollator(processor, text_towers=towers), cut),  # which reads one of the views of a joint batch
        (FlipCTRCollator(processor), model_of(FlipForCTR, processor, mode="id", text_towers=towers)),
        (FlipPretrainingCollator(processor), pretrained),
        (FlipCTRCollator(processor), nn.ModuleDict({"wrapped": joint})),
        (FlipCTRCollator(processor), nn.Linear(1, 1)),
        (list, joint),
    ]
    for collator, model in right:
        check_collator(collator, model)

    assert message_of(check_collator, FlipPretrainingCollator(processor), joint) == (
        "FlipPretrainingCollator makes batches for FlipForPreTraining, but the model is a FlipForCTR: use "
        "FlipCTRCollator(processor)"
    )
    assert message_of(check_collator, FlipCTRCollator(processor), nn.ModuleList([pretrained])) == (
        "FlipCTRCollator makes batches for FlipForCTR, but the model is a FlipForPreTraining: use "
        "FlipPretrainingCollator(processor)"
    )
    advice = "use FlipCTRCollator.from_model(processor, model)"
    assert message_of(check_collator, FlipCTRCollator(processor, "text"), joint) == (
        "the collator has mode='text' and text_towers=None, but the model has mode='joint' and text_towers=None: "
        + advice
    )
    assert message_of(check_collator, FlipCTRCollator(processor, "text"), cut) == (
        "the collator has mode='text' and text_towers=None, but the model has mode='text' and text_towers="
        f"{{'0': {USER}, '1': {ITEM}}}: {advice}"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "id"},
        {"mode": "text"},
        {"mode": "text", "text_towers": [USER, ITEM]},
        {"mode": "joint", "text_towers": {"user": USER, "item": ITEM}},
        {"mode": "id", "text_towers": {"user": USER, "item": ITEM}},
    ],
    ids=str,
)
def test_a_collator_from_a_model_makes_what_it_reads(processor, click_rows, settings):
    model = model_of(FlipForCTR, processor, **settings)
    collator = FlipCTRCollator.from_model(processor, model, oov_dropout=0.5, seed=3, pad_to_multiple_of=4)
    by_hand = FlipCTRCollator(processor, oov_dropout=0.5, seed=3, pad_to_multiple_of=4, **settings)
    check_collator(collator, model)
    encoded = processor.encode(click_rows, with_label=True)
    found, expected = collator(encoded), by_hand(encoded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert model(**found).loss.isfinite()


def test_a_collator_of_other_fields_than_the_models_is_refused(processor, click_rows, wordpiece):
    other = FlipProcessor.fit(click_rows, ["user_id", "title"], wordpiece, label="label")
    found = message_of(FlipCTRCollator.from_model, other, model_of(FlipForCTR, processor))
    assert found.startswith("the processor's fields are not the model's: the processor has 'user_id', 'title' and the")
    found = message_of(check_collator, FlipCTRCollator(other), model_of(FlipForCTR, processor))
    assert found.startswith("the processor's fields are not the model's: the processor has 'user_id', 'title' and the")


# Settings


def test_settings_are_refused_at_the_ends_of_their_ranges(processor):
    for ratio in (0.0, 1.01, -0.1):
        for name in ("text_mask_ratio", "tabular_mask_ratio"):
            assert (
                message_of(FlipPretrainingCollator, processor, **{name: ratio}) == f"{name}={ratio} must be in (0, 1]"
            )
    FlipPretrainingCollator(processor, text_mask_ratio=1, tabular_mask_ratio=1)
    for share in (1.0, -0.1, {"user_id": 1.0}, {"user_id": 0.5, "age": -1}):
        assert message_of(FlipCTRCollator, processor, oov_dropout=share) == f"oov_dropout={share} must be in [0, 1)"
    FlipCTRCollator(processor, oov_dropout=0.999)
    assert message_of(FlipCTRCollator, processor, mode="both") == (
        "mode='both' is not one of joint, id, text; set it to model.config.mode, or create the collator with "
        "FlipCTRCollator.from_model(processor, model)"
    )
    assert message_of(FlipCTRCollator, processor, oov_dropout={"zip": 0.5, "area": 0.5}) == (
        "oov_dropout: 'area' is not a field with an OOV feature: 'user_id', 'gender', 'age', 'title', 'genre'"
    )


@pytest.mark.parametrize(("available", "multiple"), [(True, 8), (False, 2)])
def test_padding_suits_the_machine(processor, monkeypatch, available, multiple):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    rows = [{"feature_ids": unseen(processor), "input_ids": [2, 7, 9], "token_field_ids": [-1, 0, 1], "row": 0}]
    for collator in (FlipCTRCollator(processor), FlipPretrainingCollator(processor)):
        batch = collator(rows)
        assert batch["input_ids"].shape == (1, -(-3 // multiple) * multiple)
    assert FlipCTRCollator(processor, pad_to_multiple_of=5)(rows)["input_ids"].shape == (1, 5)
    assert FlipPretrainingCollator(processor, pad_to_multiple_of=5)(rows)["mlm_labels"].shape == (1, 5)


def test_the_defaults_are_those_of_the_paper_at_the_first_epoch(processor, click_rows):
    rows = processor.encode(click_rows)
    plain = FlipPretrainingCollator(processor)
    stated = FlipPretrainingCollator(
        processor, seed=0, text_mask_ratio=0.15, tabular_mask_ratio=0.15, text_mask_unit="field"
    )
    stated.set_epoch(0)
    expected = stated(rows)
    for name, value in plain(rows).items():
        assert torch.equal(value, expected[name]), name
    dropping, at_first = (FlipCTRCollator(processor, oov_dropout=0.5, **more) for more in ({}, {"seed": 0}))
    at_first.set_epoch(0)
    assert torch.equal(dropping(rows)["feature_ids"], at_first(rows)["feature_ids"])
    other = FlipCTRCollator(processor, oov_dropout=0.5, seed=1)
    assert not torch.equal(dropping(rows)["feature_ids"], other(rows)["feature_ids"])


# Texts and labels


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ([[1, 1, 1], [1, 0, 1], [0, 1, 1]], 1),
        ([[1, 1, 0], [1, 1, 1], [0, 1, 1]], 2),
        ([[1, 1, 0], [0, 0, 0], [1, 1, 1]], 1),
        ([[1, 1, 0], [1, 1, 1], [1, 2, 0]], 2),
        ([[1, 1, 1], [1, 1], [1]], 1),
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1, 1]], 2),
    ],
)
def test_the_row_of_a_wrong_mask_is_named(processor, mask, row, as_list):
    rows = pa.table({"feature_ids": [[2] * 5] * 3, "input_ids": [[2, 7, 9]] * 3, "attention_mask": mask})
    assert message_of(FlipCTRCollator(processor, "text"), rows.to_pylist() if as_list else rows) == (
        f"the attention_mask of row {row} of the batch must be as long as its input_ids, 1 on tokens and then 0 on "
        "padding, with at least one token; encode the rows with processor.encode or encode_dataset, which do not pad"
    )


def test_the_row_whose_tokens_and_fields_differ_in_number_is_named(processor):
    rows = pa.table(
        {
            "row": [0, 1, 2],
            "feature_ids": [unseen(processor)] * 3,
            "input_ids": [[2, 7], [2, 7, 9], [2]],
            "token_field_ids": [[-1, 0], [-1, 0], [-1, 0]],
        }
    )
    assert message_of(FlipPretrainingCollator(processor), rows) == (
        "row 1 of the batch has 3 tokens in input_ids, but 2 in token_field_ids; take both from one call of "
        "processor.encode"
    )


@pytest.mark.parametrize("as_list", [True, False])
def test_labels_are_read_as_the_processor_reads_them(processor, as_list):
    collator = FlipCTRCollator(processor, "id")
    rows = pa.table({"feature_ids": [unseen(processor)] * 3, "label": ["1", "false", "1.0"]})
    batch = collator(rows.to_pylist() if as_list else rows)
    assert batch["labels"].tolist() == [1.0, 0.0, 1.0]
    assert batch["labels"].dtype == torch.float32
    assert batch["feature_ids"].dtype == torch.int64
    wrong = rows.set_column(1, "label", pa.array([1, 0, 2]))
    found = message_of(collator, wrong.to_pylist() if as_list else wrong)
    assert found.startswith("field 'label', row 2, value 2: a label must be 0 or 1")


# What is dropped


def test_a_missing_value_is_not_dropped(processor, click_rows):
    rows = processor.encode(click_rows)
    missing = np.array([value is None for value in click_rows["gender"]])
    assert 50 < missing.sum() < 150
    plain = FlipCTRCollator(processor)(rows)["feature_ids"].numpy()
    dropped = FlipCTRCollator(processor, oov_dropout=0.9)(rows)["feature_ids"].numpy() != plain
    assert not dropped[missing, 1].any()
    # A value of 90% is dropped: 4 standard deviations of a share of about 200 rows are 0.085.
    assert abs(dropped[~missing, 1].mean() - 0.9) < 0.085
    assert abs(dropped[:, 0].mean() - 0.9) < 0.07


def test_a_field_without_a_share_drops_nothing_whatever_is_drawn(processor, click_rows, monkeypatch):
    rows = processor.encode(click_rows)
    plain = FlipCTRCollator(processor)(rows)["feature_ids"]
    collator = FlipCTRCollator(processor, oov_dropout={"user_id": 0.5, "title": 0.0})
    for draw, first in ((0.0, True), (0.5, False)):
        monkeypatch.setattr(collators, "uniform", lambda *args, draw=draw: np.full((300, args[-1]), draw))
        changed = collator(rows)["feature_ids"] != plain
        assert changed[:, 0].all() if first else not changed[:, 0].any()
        assert not changed[:, 1:].any()


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_each_row_hides_what_it_drops(hiding, click_rows, mode, monkeypatch):
    rows = hiding.encode(click_rows).slice(0, 4)
    collator = FlipCTRCollator(hiding, mode, oov_dropout={"title": 0.5})
    draws = np.ones((4, 5))
    draws[2, 3] = 0.1
    monkeypatch.setattr(collators, "uniform", lambda *args: draws)
    plain = FlipCTRCollator(hiding, mode)(rows)
    batch = collator(rows)
    texts, before = (
        [t.replace(" [PAD]", "") for t in hiding.tokenizer.batch_decode(b["input_ids"])] for b in (batch, plain)
    )
    assert [a == b for a, b in zip(texts, before, strict=True)] == [True, True, False, True]
    title = hiding.tokenizer.decode(hiding.tokenizer(click_rows["title"][2], add_special_tokens=False)["input_ids"])
    assert title in before[2]
    assert texts[2] == before[2].replace(title, "missing", 1)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [len(hiding.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
