"""Assembled texts against tokenising the whole sentence, spans, truncation."""

import copy
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flip_hf import FieldConfig
from flip_hf.data import template as template_module
from flip_hf.data.kinds import FieldValues
from flip_hf.data.template import NO_FIELD, TextTemplate

FIELDS = [FieldConfig("user_id"), FieldConfig("title"), FieldConfig("genre", text_name="kind of film")]
TOKENIZERS = ["wordpiece", "byte_bpe", "unigram"]

# Plain text, text that sits at the edges of what tokenizers do, and the spelling of special tokens.
awkward = st.text(alphabet="ab1.!?'-()[]<>/,;: \t\n\u0301\u00e9\u00a0\u4e2d\u0000\u200b\u2028\U0001f600", max_size=12)
spelled = st.sampled_from(["[SEP]", "x [MASK] y", "<mask>", "</s>", "[CLS][PAD]", "it's", "don't 's", "...", "!!", "-"])
values = st.one_of(st.none(), st.text(max_size=15), awkward, spelled, st.integers().map(str))


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return request.getfixturevalue(request.param)


def columns(rows):
    """Columns of values of rows of values."""
    stripped = [[None if v is None else v.strip() or None for v in row] for row in rows]
    flags = np.zeros(len(rows), dtype=np.uint8)
    return [FieldValues(pa.array(column, pa.string()), flags) for column in zip(*stripped, strict=True)]


def whole_sentence(tokenizer, template, row):
    return tokenizer(template.sentence(row), split_special_tokens=True)["input_ids"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(values, values, values), min_size=1, max_size=4))
def test_assembled_ids_and_spans_equal_the_tokenised_sentence(tokenizer, rows):
    template = TextTemplate(tokenizer, FIELDS, max_length=2000)
    text = template.assemble(columns(rows))
    specials = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id}
    assert text.offsets.tolist()[-1] == len(text.input_ids) == len(text.token_field_ids)
    for i, row in enumerate(rows):
        part = slice(text.offsets[i], text.offsets[i + 1])
        ids, field_ids = text.input_ids[part], text.token_field_ids[part]
        if not text.truncated[i].any():
            assert ids.tolist() == whole_sentence(tokenizer, template, row)
        for f, value in enumerate(row):
            of_field = np.flatnonzero(field_ids == f)
            assert len(of_field) >= 1, "no field vanishes"
            assert np.array_equal(of_field, np.arange(of_field[0], of_field[-1] + 1)), "a span is contiguous"
            alone = " " + " ".join((value or "").split())
            expected = tokenizer(alone, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if specials & set(expected):
                continue  # a plain piece with a special token's id: checked below, and against the sentence above
            if not value or not value.split() or not expected:
                expected = tokenizer(" missing", add_special_tokens=False)["input_ids"]
            assert ids[of_field].tolist() == expected[: FIELDS[f].max_tokens]
        assert not specials & set(ids[1:-1].tolist()), "special tokens in values are plain characters"


def test_sentence_of_a_known_row(wordpiece):
    template = TextTemplate(wordpiece, FIELDS, max_length=128)
    assert template.sentence(["196", None, "a  film"]) == "user id is 196 . title is missing . kind of film is a film ."
    text = template.assemble(columns([["196", None, "a film"]]))
    assert wordpiece.decode(text.input_ids[text.token_field_ids == 1]) == "missing"
    assert text.token_field_ids[0] == text.token_field_ids[-1] == NO_FIELD


def test_a_very_long_value_leaves_the_others_whole(tokenizer):
    template = TextTemplate(tokenizer, FIELDS, max_length=128)
    long = template.assemble(columns([["196", "film " * 20_000, "drama"]]))
    short = template.assemble(columns([["196", "film", "drama"]]))
    for f in (0, 2):
        assert np.array_equal(long.input_ids[long.token_field_ids == f], short.input_ids[short.token_field_ids == f])
    assert (long.token_field_ids == 1).sum() == FIELDS[1].max_tokens
    assert long.truncated.tolist() == [[False, True, False]]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6), room=st.integers(3, 60))
def test_truncation_is_fair(wordpiece, lengths, room):
    constant = TextTemplate(wordpiece, FIELDS, max_length=500)._num_constant_tokens
    template = TextTemplate(wordpiece, FIELDS, max_length=constant + room)
    text = template.assemble(columns([["a " * n for n in row] for row in lengths]))
    for i, full in enumerate(lengths):
        field_ids = text.token_field_ids[text.offsets[i] : text.offsets[i + 1]]
        kept = [int((field_ids == f).sum()) for f in range(3)]
        assert len(field_ids) <= constant + room
        if sum(full) <= room:
            assert kept == list(full)
            continue
        assert sum(kept) == room, "no token is given away"
        cut = [k for k, n in zip(kept, full, strict=True) if k < n]
        assert min(kept) >= 1
        assert max(kept) <= min(cut) + 1, "nothing is cut while a longer one keeps more"
        assert text.truncated[i].tolist() == [k < n for k, n in zip(kept, full, strict=True)]


def test_an_added_token_may_hold_white_space(wordpiece):
    tokenizer = copy.deepcopy(wordpiece)
    tokenizer.add_tokens(["science fiction"])
    template = TextTemplate(tokenizer, FIELDS, max_length=128)
    row = ["1", "a science  fiction film", "science fiction"]
    text = template.assemble(columns([row]))
    assert text.input_ids.tolist() == whole_sentence(tokenizer, template, row)
    assert text.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("science fiction")) == 2


def test_a_length_without_room_for_every_field_is_refused(wordpiece):
    constant = TextTemplate(wordpiece, FIELDS, max_length=500)._num_constant_tokens
    TextTemplate(wordpiece, FIELDS, max_length=constant + 3)
    with pytest.raises(ValueError, match="leaves no room for 3 values"):
        TextTemplate(wordpiece, FIELDS, max_length=constant + 2)


def test_a_cache_that_starts_afresh_changes_nothing(wordpiece, monkeypatch):
    rows = [[str(i), f"film {i}", "drama"] for i in range(50)]
    expected = TextTemplate(wordpiece, FIELDS, 128).assemble(columns(rows))
    monkeypatch.setattr(template_module, "_MAX_SEGMENTS", 10)
    small = TextTemplate(wordpiece, FIELDS, 128)
    for i, row in enumerate(rows):
        part = expected.input_ids[expected.offsets[i] : expected.offsets[i + 1]]
        assert np.array_equal(small.assemble(columns([row])).input_ids, part)
    assert len(small._segments) < 20


def test_workers_get_a_template_without_its_cache(wordpiece):
    template = TextTemplate(wordpiece, FIELDS, 128)
    expected = template.assemble(columns([["1", "film", "drama"]]))
    # What a worker process is sent; nothing is written to a file.
    other = pickle.loads(pickle.dumps(template))
    assert len(other._segments) == len(FIELDS) + 3, "the constant pieces, the comma and what is missing"
    assert np.array_equal(other.assemble(columns([["1", "film", "drama"]])).input_ids, expected.input_ids)
