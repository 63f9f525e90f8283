"""From rows in any form to both views, and back from disk."""

import json
import re

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor, BertConfig

from flip_hf import FieldConfig, FlipConfig, FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data import dataset_encoding, row_batches
from flip_hf.data.encoded_rows import value_tokens
from flip_hf.data.fallbacks import count_fallbacks
from flip_hf.data.groups import NO_GROUP
from flip_hf.data.schema import Fallback, InputError


def as_dicts(columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def forms(columns, folder):
    """The same rows in every form that users hold them."""
    table = pa.table(columns)
    pq.write_table(table, folder / "rows.parquet")
    pv.write_csv(table, folder / "rows.csv")
    return {
        "dict": columns,
        "dicts": as_dicts(columns),
        "pandas": pd.DataFrame(columns),
        "pandas of objects": pd.DataFrame(columns).astype(object),
        "arrow": table,
        "reordered": table.select(table.column_names[::-1]),
        "dataset": datasets.Dataset.from_dict(columns),
        "parquet": folder / "rows.parquet",
        "csv": folder / "rows.csv",
    }


def test_every_form_of_the_rows_gives_the_same(processor, click_rows, field_names, wordpiece, tmp_path):
    expected = processor.encode(click_rows, with_label=True)
    for name, rows in forms(click_rows, tmp_path).items():
        fitted = FlipProcessor.fit(rows, field_names, wordpiece, label="label")
        assert fitted.content_hash() == processor.content_hash(), name
        if name not in ("parquet", "csv"):
            assert fitted.encode(rows, with_label=True).equals(expected), name


def test_encoded_rows_have_the_documented_columns(processor, click_rows):
    encoded = processor.encode(click_rows, first_row=1000, with_label=True)
    num_fields = len(processor.fields)
    assert encoded.schema == pa.schema(
        {
            "row": pa.int64(),
            "feature_ids": pa.list_(pa.int64(), num_fields),
            "input_ids": pa.list_(pa.int32()),
            "token_field_ids": pa.list_(pa.int16()),
            "fallbacks": pa.list_(pa.uint8(), num_fields),
            "label": pa.float32(),
        }
    )
    assert encoded["row"].to_pylist() == list(range(1000, 1300))
    assert encoded["label"].to_pylist() == [float(v) for v in click_rows["label"]]
    for i, (ids, row) in enumerate(zip(encoded["feature_ids"].to_pylist(), as_dicts(click_rows), strict=True)):
        for feature, field in zip(ids, processor.fields, strict=True):
            value = row[field.name]
            shown = "<missing>" if value is None else str(value)
            assert processor.vocabulary.describe(feature) == (field.name, shown), i


def test_round_trip_through_a_folder(processor, click_rows, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = FlipProcessor.from_pretrained(tmp_path)
    assert loaded.content_hash() == processor.content_hash()
    assert loaded.fields == processor.fields
    assert loaded.vocabulary == processor.vocabulary
    assert loaded.encode(click_rows, with_label=True).equals(processor.encode(click_rows, with_label=True))
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "FlipProcessor"
    assert not any(path.suffix in {".bin", ".pkl", ".pt"} for path in tmp_path.iterdir())
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "vocabulary.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_settings_of_the_tokenizer_may_be_replaced_in_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert FlipProcessor.from_pretrained(tmp_path, sep_token="[CLS]").tokenizer.sep_token == "[CLS]"


def test_the_most_tokens_of_a_text_may_be_replaced_in_loading(processor, click_rows, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = FlipProcessor.from_pretrained(tmp_path, max_length=30)
    assert loaded.max_length == 30
    lengths = pc.list_value_length(loaded.encode(click_rows)["input_ids"]).to_pylist()
    assert max(lengths) == 30 < max(pc.list_value_length(processor.encode(click_rows)["input_ids"]).to_pylist())
    loaded.save_pretrained(tmp_path / "short")
    assert FlipProcessor.from_pretrained(tmp_path / "short").max_length == 30
    assert FlipProcessor.from_pretrained(tmp_path, max_length=None).max_length == 128


@pytest.mark.parametrize("max_length", [0, -1, 1.5, "30", True])
def test_a_length_that_is_none_is_refused(processor, click_rows, wordpiece, tmp_path, max_length):
    message = re.escape(f"max_length={max_length!r} must be a whole number of at least 1")
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        FlipProcessor.from_pretrained(tmp_path, max_length=max_length)
    with pytest.raises(ValueError, match=message):
        FlipProcessor.fit(click_rows, ["user_id"], wordpiece, max_length=max_length)
    with pytest.raises(ValueError, match="max_length=5 leaves no room for 5 values"):
        FlipProcessor.from_pretrained(tmp_path, max_length=5)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("maxlength", "'maxlength' (did you mean 'max_length'?)"),
        ("sep_tokn", "'sep_tokn' (did you mean 'sep_token'?)"),
        ("revison", "'revison' (did you mean 'revision'?)"),
        ("label", "'label' (known: max_length, revision, token, "),
    ],
)
@pytest.mark.parametrize("load", [FlipProcessor, AutoProcessor])
def test_a_setting_that_nothing_reads_is_refused_in_loading(processor, tmp_path, name, nearest, load):
    processor.save_pretrained(tmp_path)
    FlipConfig(fields=processor.fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"FlipProcessor\.from_pretrained has no setting " + re.escape(nearest)):
        load.from_pretrained(tmp_path, **{name: "x"})


def test_what_transformers_passes_on_in_loading_is_no_mistake(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    settings = {"trust_remote_code": True, "use_fast": True, "_from_auto": True, "_commit_hash": None, "token": None}
    loaded = FlipProcessor.from_pretrained(tmp_path, **settings, padding_side="left")
    assert loaded.tokenizer.padding_side == "left"
    # A pipeline passes the model's settings to both.
    assert FlipProcessor.from_pretrained(tmp_path, _from_pipeline="ctr-prediction", mode="id").max_length == 128


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.pop("fields"),
        lambda s: s["fields"][0].update(num_features=7),
        lambda s: s["fields"][0].update(kind="no such kind"),
        lambda s: s["fields"].append(s["fields"][0]),
    ],
)
def test_an_edited_processor_is_refused(processor, tmp_path, edit):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"processor_config\.json|vocabulary\.parquet"):
        FlipProcessor.from_pretrained(tmp_path)


def test_a_processor_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"processor_config\.json"):
        FlipProcessor.from_pretrained(tmp_path)


def test_threads_encode_as_one_does(processor, click_rows, monkeypatch):
    many = {name: values * 50 for name, values in click_rows.items()}
    expected = processor.encode(many, with_label=True)
    monkeypatch.setattr(dataset_encoding, "BATCH_ROWS", 3)
    monkeypatch.setattr(row_batches, "BATCH_ROWS", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    fresh = FlipProcessor(processor.tokenizer, processor.vocabulary, processor.label, processor.max_length)
    encoded = fresh.encode_dataset(datasets.Dataset.from_dict(many))
    assert encoded.with_format("arrow")[:].combine_chunks().equals(expected.combine_chunks())
    refitted = FlipProcessor.fit(datasets.Dataset.from_dict(many), processor.fields, processor.tokenizer, label="label")
    again = FlipProcessor.fit(many, processor.fields, processor.tokenizer, label="label")
    assert refitted.vocabulary == again.vocabulary


def test_a_bad_row_is_named_by_its_place_in_the_whole(processor, click_rows, monkeypatch):
    monkeypatch.setattr(dataset_encoding, "BATCH_ROWS", 2)
    many = {name: values * 9 for name, values in click_rows.items()}
    many["label"] = [*many["label"][:-1], 7]
    with pytest.raises(InputError, match=rf"field 'label', row {len(many['label']) - 1}, value 7"):
        processor.encode_dataset(datasets.Dataset.from_dict(many))


def test_value_tokens_are_those_of_values_alone(processor, click_rows):
    encoded = processor.encode_dataset(datasets.Dataset.from_dict(click_rows))
    wanted = set()
    for row in encoded:
        wanted |= {int(t) for t, f in zip(row["input_ids"], row["token_field_ids"], strict=True) if f != -1}
    assert value_tokens(encoded).tolist() == sorted(wanted)
    assert processor.tokenizer.cls_token_id not in wanted


def test_a_dataset_is_encoded_as_its_rows_are_and_once(processor, click_rows, tmp_path, monkeypatch):
    datasets.Dataset.from_dict(click_rows).save_to_disk(tmp_path)
    dataset = datasets.load_from_disk(tmp_path)
    first = processor.encode_dataset(dataset)
    assert first.with_format("arrow")[:].equals(processor.encode(click_rows, with_label=True))
    assert isinstance(first[0]["feature_ids"], np.ndarray)

    calls = []
    real = FlipProcessor.encode
    monkeypatch.setattr(FlipProcessor, "encode", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    second = processor.encode_dataset(datasets.load_from_disk(tmp_path))
    assert calls == [], "what was encoded before is read from the cache"
    assert second.with_format("arrow")[:].equals(first.with_format("arrow")[:])

    other = FlipProcessor(processor.tokenizer, processor.vocabulary, processor.label, max_length=40)
    other.encode_dataset(datasets.load_from_disk(tmp_path))
    assert calls, "another processor's cache is not taken"


def test_calling_it_gives_what_the_model_takes(processor, click_rows):
    rows = as_dicts(click_rows)[:5]
    inputs = processor(rows, return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names) == {"feature_ids", "input_ids", "attention_mask"}
    assert all(value.dtype == torch.int64 for value in inputs.values())
    encoded = processor.encode(rows)["input_ids"].to_pylist()
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], encoded, strict=True):
        assert ids[mask.bool()].tolist() == expected
        assert set(ids[~mask.bool()].tolist()) <= {processor.tokenizer.pad_token_id}
    assert processor(rows)["feature_ids"] == inputs["feature_ids"].tolist()
    assert isinstance(processor(rows, return_tensors="np")["input_ids"], np.ndarray)

    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    text.vocab_size = len(processor.tokenizer)
    model = FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, embedding_dim=4)).eval()
    assert model(**inputs).logits.shape == (5,)


def test_a_column_groups_the_encoded_rows(processor, click_rows, tmp_path):
    sessions = [None if i % 7 == 3 else f"s{i * i % 11}" for i in range(300)]
    log = click_rows | {"session": sessions}
    encoded = processor.encode(log, with_label=True, group_field="session")
    groups = encoded["group"].to_pylist()
    assert encoded.drop_columns(["group"]).equals(processor.encode(click_rows, with_label=True))
    assert encoded["group"].type == pa.int64()
    assert [group == NO_GROUP for group in groups] == [session is None for session in sessions]
    assert len(set(zip(groups, sessions, strict=True))) == len(set(groups)) == len(set(sessions)), "one to one"
    assert min(group for group in groups if group != NO_GROUP) >= 0

    # The same value has the same number in every table, of whatever type and whether it is a field's or not.
    last = processor.encode(pa.table(log).slice(250), first_row=250, group_field="session")
    assert last["group"].to_pylist() == groups[250:]
    users = processor.encode(click_rows, group_field="user_id")["group"].to_pylist()
    as_strings = click_rows | {"user_id": [str(user) for user in click_rows["user_id"]]}
    assert processor.encode(as_strings, group_field="user_id")["group"].to_pylist() == users
    assert len(set(users)) == len(set(click_rows["user_id"]))

    dataset = datasets.Dataset.from_dict(log)
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    for rows in (log, dataset, str(tmp_path / "log.parquet"), datasets.DatasetDict(train=dataset)):
        found = processor.encode_dataset(rows, group_field="session")
        found = found["train"] if isinstance(rows, datasets.DatasetDict) else found
        assert found.with_format("arrow")[:].drop_columns(["label"]).equals(encoded.drop_columns(["label"]))
    stream = processor.encode_dataset(dataset.to_iterable_dataset(), group_field="session")
    assert [row["group"] for row in stream] == groups
    dataset.save_to_disk(tmp_path / "kept")
    for field, expected in ((None, None), ("session", groups), ("user_id", users)):
        found = processor.encode_dataset(datasets.load_from_disk(tmp_path / "kept"), group_field=field)
        assert ("group" in found.column_names) == (field is not None), "each is cached by itself"
        assert field is None or found["group"][:].tolist() == expected


def test_a_column_that_can_not_group_the_rows_is_refused(processor, click_rows, tmp_path):
    with pytest.raises(InputError, match="field 'session': the column is missing"):
        processor.encode(click_rows, group_field="session")
    with pytest.raises(ValueError, match="group_field: 'label' is the label; name a column such as user_id"):
        processor.encode_dataset(click_rows, group_field="label")
    pq.write_table(pa.table(click_rows | {"score": [0.5] * 300}), tmp_path / "log.parquet")
    with pytest.raises(InputError, match=r"log.parquet, field 'score', row 0, value 0.5: an id must be a whole number"):
        processor.encode_dataset(str(tmp_path / "log.parquet"), group_field="score")


def test_the_label_is_no_field(wordpiece, click_rows):
    message = "^fields names 'label', which is the label: the model would read the answer. .* or set label$"
    with pytest.raises(ValueError, match=message):
        FlipProcessor.fit(click_rows, ["user_id", "label"], wordpiece, label="label")


@pytest.mark.parametrize(("available", "multiple"), [(True, 8), (False, 2)])
def test_calling_it_pads_as_the_collators_do(processor, click_rows, monkeypatch, available, multiple):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    rows = as_dicts(click_rows)[:5]
    encoded = processor.encode(rows)
    longest = max(map(len, encoded["input_ids"].to_pylist()))
    assert longest % multiple, "else nothing is rounded up"
    inputs = processor(rows, return_tensors="pt")
    assert inputs["input_ids"].shape == (5, -(-longest // multiple) * multiple)
    assert torch.equal(inputs["input_ids"], FlipCTRCollator(processor)(encoded)["input_ids"])
    assert processor(rows, return_tensors="pt", pad_to_multiple_of=64)["input_ids"].shape[1] % 64 == 0


def test_the_text_can_be_left_out(processor, click_rows, monkeypatch):
    both = processor.encode(click_rows, with_label=True)
    monkeypatch.setattr(type(processor.template), "assemble", lambda *_: pytest.fail("no text was asked for"))
    ids = processor.encode(click_rows, with_label=True, with_text=False)
    assert ids.equals(both.drop_columns(["input_ids", "token_field_ids"]))


def test_fallbacks_are_used_and_counted(processor):
    rows = {
        "user_id": [10**30, -1, " 3 ", 3],
        "gender": [None, "M", " ", "X"],
        "age": [20.0, float("nan"), 21, 22],
        "title": ["never seen [SEP] before", "", "Kolya (1996)", "42"],
        "genre": [True, "drama", "drama", " ".join(["film"] * 200)],
    }
    encoded = processor.encode(rows)
    assert count_fallbacks(encoded, processor.fields) == {
        "user_id": {"oov": 2, "stripped": 1},
        "gender": {"missing": 2, "stripped": 1, "oov": 1},
        "age": {"missing": 1},
        "title": {"oov": 1, "missing": 1},
        "genre": {"oov": 2, "truncated": 1},
    }
    flags = np.array(encoded["fallbacks"].to_pylist())
    assert flags[0, 0] == Fallback.OOV
    text = processor.tokenizer.decode(encoded["input_ids"][0].as_py())
    assert "never seen [ sep ] before" in text, "the text shows a value whose feature is OOV"
    assert "gender is missing" in text
    ids = np.array(encoded["feature_ids"].to_pylist())
    assert ids[2, 0] == ids[3, 0]
    dataset = datasets.Dataset(encoded)
    assert count_fallbacks(dataset, processor.fields) == count_fallbacks(encoded, processor.fields)


def test_no_rows(processor, click_rows, field_names, wordpiece):
    none = {name: [] for name in click_rows}
    with pytest.raises(InputError, match="no rows"):
        FlipProcessor.fit(none, field_names, wordpiece)
    with pytest.raises(InputError, match="no rows"):
        processor.encode_dataset(datasets.Dataset.from_dict(none))
    assert len(processor.encode(none)) == 0
    inputs = processor([], return_tensors="pt")
    assert inputs["feature_ids"].shape == (0, len(field_names))
    assert len(inputs["input_ids"]) == 0


def test_errors_name_what_is_wrong(processor, click_rows, field_names, wordpiece):
    with pytest.raises(InputError, match=r"'age'.*missing"):
        processor.encode({name: values for name, values in click_rows.items() if name != "age"})
    with pytest.raises(InputError, match=r"log\.csv, field 'age', row 1003, value 20\.5"):
        processor.encode(
            {**{name: values[:5] for name, values in click_rows.items()}, "age": [20.0, 21.0, 22.0, 20.5, 1.0]},
            first_row=1000,
            source="log.csv",
        )
    bad = {**{name: values[:3] for name, values in click_rows.items()}, "label": [0.0, 1.0, 0.5]}
    with pytest.raises(InputError, match=r"field 'label', row 2, value 0\.5"):
        processor.encode(bad, with_label=True)
    with pytest.raises(ValueError, match="at least one field"):
        FlipProcessor.fit(click_rows, [], wordpiece)
    with pytest.raises(ValueError, match="without a label column"):
        FlipProcessor.fit(click_rows, field_names, wordpiece).encode(click_rows, with_label=True)
    with pytest.raises(ValueError, match=r"FlipProcessor\.fit"):
        FlipProcessor(wordpiece)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "needs a column name"),
        ({"name": 3}, "needs a column name"),
        ({"name": "a", "kind": "picture"}, "kind='picture' is not one of categorical"),
        ({"name": "a", "min_count": 0}, "min_count=0"),
        ({"name": "a", "max_tokens": 1.5}, "max_tokens=1.5"),
        ({"name": "a", "num_features": 1}, "num_features=1"),
    ],
)
def test_a_field_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FieldConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode='both' is not one of joint, id, text"),
        ({"text_pooling": "max"}, "text_pooling='max'"),
        ({"mtm_loss": "hinge"}, "mtm_loss='hinge'"),
        ({"mtm_negatives": "batch"}, "mtm_negatives='batch'"),
        ({"embedding_dim": 0}, "embedding_dim=0"),
        ({"contrastive_temperature": 0}, "contrastive_temperature=0"),
        ({"head_dropout": 1.0}, "head_dropout=1.0"),
        ({"objectives": {"mlm": 0.0}}, "one of them positive"),
        ({"fields": ["a", "a"]}, "fields named twice: 'a'"),
        ({"fields": [{"name": "a", "sise": 3}]}, "field 'a': unknown settings 'sise'"),
        ({"text_layers": 13}, "text_layers=13, but the text encoder has 12 layers"),
        ({"embedding_dim": "8"}, "embedding_dim"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings, message):
    with pytest.raises(Exception, match=message):
        FlipConfig(**settings)


def test_a_configuration_survives_saving(processor, tmp_path):
    config = FlipConfig(fields=processor.fields, text_layers=2, objectives={"icl": 1, "mtm": 0.5}, mode="text")
    config.save_pretrained(tmp_path)
    loaded = FlipConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.fields == processor.fields
    assert FlipConfig.from_pretrained(tmp_path, mode="id").mode == "id"


def test_ids_that_are_not_known_are_not_shown(wordpiece):
    fields = [
        FieldConfig("user", show_oov=False, min_count=2),
        FieldConfig("rated", kind="sequence", separator="|", show_oov=False, max_values=2),
        FieldConfig("title"),
    ]
    rows = {"user": [7, 7, 8], "rated": ["a|b", "b|c", ""], "title": ["One", "Two", "Two"]}
    processor = FlipProcessor.fit(rows, fields, wordpiece)

    def texts(processor, rows):
        encoded = processor.encode(rows)
        return [wordpiece.decode(ids, skip_special_tokens=True) for ids in encoded["input_ids"].to_pylist()]

    new = {"user": [7, 8, 9, None], "rated": ["a|b", "x|c", "a|x|y", None], "title": ["One", "Three", "Two", "Two"]}
    assert texts(processor, new) == [
        "user is 7. rated is b, a. title is one.",
        # Seen once, so its feature is OOV too.
        "user is missing. rated is c. title is three.",
        "user is missing. rated is missing. title is two.",
        "user is missing. rated is missing. title is two.",
    ]
    flags = np.array(processor.encode(new)["fallbacks"].to_pylist())
    assert (flags[:, 0] & Fallback.OOV > 0).tolist() == [False, True, True, False]
    assert (flags[:, 1] & Fallback.OOV > 0).tolist() == [False, True, True, False]
    shown = FlipProcessor.fit(rows, [FieldConfig("user", min_count=2), *fields[1:]], wordpiece)
    assert texts(shown, new)[1:3] == [
        "user is 8. rated is c. title is three.",
        "user is 9. rated is missing. title is two.",
    ]
    assert shown.content_hash() != processor.content_hash()
    processor.extend({"user": [9, 9], "rated": ["x", "x"], "title": ["One", "One"]})
    assert texts(processor, new)[2] == "user is 9. rated is x. title is two."
    shared = FieldConfig("b", share_embedding="user", show_oov=False)
    with pytest.raises(
        ValueError, match="show_oov has no effect, because 'user', whose features it uses, has hash_buck"
    ):
        FlipConfig(fields=[FieldConfig("user", hash_buckets=9), shared])


@pytest.mark.parametrize("fields", ["user_id", {"user_id": "categorical"}, FieldConfig("user_id"), None, 3])
def test_fields_are_a_list(click_rows, wordpiece, fields):
    with pytest.raises(ValueError, match=r"^fields=.* must be a list of column names and FieldConfig"):
        FlipProcessor.fit(click_rows, fields, wordpiece)


def test_fields_may_be_any_iterable(click_rows, wordpiece):
    expected = FlipProcessor.fit(click_rows, ["user_id", "age"], wordpiece).fields
    for fields in (("user_id", "age"), (name for name in ("user_id", "age"))):
        assert FlipProcessor.fit(click_rows, fields, wordpiece).fields == expected
