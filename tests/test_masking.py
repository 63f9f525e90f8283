"""Which fields are masked, what a batch holds, and in which order rows are read."""

import inspect

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from flip_hf import FlipCTRCollator, FlipForCTR, FlipForPreTraining, FlipPretrainingCollator
from flip_hf.data import collators, masking
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.data.masking import masked_fields, uniform
from flip_hf.data.sampling import LengthGroupedBatchSampler
from flip_hf.data.template import NO_FIELD
from flip_hf.fields import IGNORED_LABEL, MASK_ID


@pytest.fixture
def encoded(processor, click_rows):
    table = processor.encode(click_rows, with_label=True)
    return [
        dict(zip(table.column_names, row, strict=True))
        for row in zip(*(c.to_pylist() for c in table.columns), strict=True)
    ]


def test_all_tokens_of_a_masked_field_are_masked_and_no_others(processor, encoded):
    batch = FlipPretrainingCollator(processor, seed=3, text_mask_ratio=0.4)(encoded)
    mask_token = processor.tokenizer.mask_token_id
    for i, row in enumerate(encoded):
        length = len(row["input_ids"])
        field_ids, ids = np.array(row["token_field_ids"]), np.array(row["input_ids"])
        masked = batch["masked_input_ids"][i, :length].numpy() == mask_token
        fields = set(field_ids[masked].tolist())
        assert fields, "at least one field"
        assert -1 not in fields, "the template is never masked"
        assert np.array_equal(masked, np.isin(field_ids, list(fields)))
        labels = batch["mlm_labels"][i]
        assert np.array_equal(labels[:length][masked], ids[masked])
        assert (labels[:length][~masked] == IGNORED_LABEL).all()
        assert (labels[length:] == IGNORED_LABEL).all()
        assert np.array_equal(batch["masked_input_ids"][i, :length][~masked], ids[~masked])
        assert np.array_equal(batch["input_ids"][i, :length], ids)

        table_masked = batch["masked_feature_ids"][i].numpy() == MASK_ID
        assert table_masked.any()
        assert np.array_equal(batch["mtm_labels"][i].numpy()[table_masked], np.array(row["feature_ids"])[table_masked])
        assert (batch["mtm_labels"][i].numpy()[~table_masked] == IGNORED_LABEL).all()


def test_single_tokens_are_masked_whatever_their_fields(processor, encoded):
    rows = encoded * 40
    for i, row in enumerate(rows):
        rows[i] = {**row, "row": i}
    for ratio in (0.3, 1e-9):
        batch = FlipPretrainingCollator(processor, text_mask_ratio=ratio, text_mask_unit="token")(rows)
        masked = (batch["mlm_labels"] != -100).numpy()
        assert masked.any(axis=1).all(), "at least one of each row"
        of_fields = np.zeros_like(masked)
        for i, row in enumerate(rows):
            of_fields[i, : len(row["token_field_ids"])] = np.array(row["token_field_ids"]) != NO_FIELD
        assert not (masked & ~of_fields).any(), "no token that is not part of a value"
        assert (batch["masked_input_ids"].numpy()[masked] == processor.tokenizer.mask_token_id).all()
        if ratio == 0.3:
            assert abs(masked[of_fields].mean() - ratio) < 4 * (ratio * (1 - ratio) / of_fields.sum()) ** 0.5 + 0.01
        else:
            assert (masked.sum(axis=1) == 1).all()


def test_masks_depend_on_seed_epoch_and_row_alone(processor, encoded):
    def masks(rows, seed=0, epoch=0):
        collator = FlipPretrainingCollator(processor, seed=seed)
        collator.set_epoch(epoch)
        batch = collator(rows)
        return {
            r["row"]: (tuple(m.tolist()), tuple(t[t != IGNORED_LABEL].tolist()))
            for r, m, t in zip(rows, batch["mtm_labels"], batch["mlm_labels"], strict=True)
        }

    whole = masks(encoded)
    shuffled = masks(encoded[::-1])
    assert shuffled == whole
    for start in range(0, 300, 70):
        part = masks(encoded[start : start + 70])
        assert part == {row: whole[row] for row in part}
    assert masks(encoded, epoch=1) != whole
    assert masks(encoded, seed=1) != whole


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    first=st.integers(0, 2**40),
    num_fields=st.integers(1, 40),
    ratio=st.floats(0.01, 1.0),
)
def test_the_number_of_masked_fields(seed, epoch, first, num_fields, ratio):
    rows = np.arange(first, first + 50)
    chosen = masked_fields(seed, epoch, rows, num_fields, ratio, stream=0)
    numbers = chosen.sum(axis=1)
    assert numbers.min() >= 1
    assert (numbers >= np.floor(ratio * num_fields)).all()
    assert (numbers <= max(1, np.ceil(ratio * num_fields + 1e-9))).all()
    assert np.array_equal(masked_fields(seed, epoch, rows[10:20], num_fields, ratio, stream=0), chosen[10:20])


def splitmix64(state):
    """The next number and state, in Python's whole numbers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    x = state
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31), state


def test_the_reference_is_splitmix64():
    # The numbers for this seed that Rosetta Code lists.
    found, state = [], 1234567
    for _ in range(5):
        number, state = splitmix64(state)
        found.append(number)
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(("seed", "epoch", "stream"), [(0, 0, 0), (7, 3, 1), (-1, 0, 2), (2**64 + 5, 10**6, 3)])
def test_the_numbers_are_those_of_splitmix64(seed, epoch, stream):
    """They are the same on every machine and in every version, so a run resumes with the masks that it had."""
    key = 0
    for part in (seed, epoch, stream):
        key, _ = splitmix64((key + part) % 2**64)
    rows, expected = [0, 1, 12_345, 2**40], []
    for row in rows:
        golden = 0x9E3779B97F4A7C15
        state, _ = splitmix64((key + golden * row) % 2**64)
        numbers = []
        for _ in range(6):
            number, state = splitmix64(state)
            numbers.append((number >> 11) / 2**53)
        expected.append(numbers)
    found = uniform(seed, epoch, np.array(rows), stream, 6)
    assert found.dtype == np.float64
    assert found.tolist() == expected

    # The first number rounds how many fields are masked; the fields with the smallest of the others are.
    for ratio in (0.3, 0.5, 0.01, 1.0):
        chosen = [
            sorted(range(5), key=numbers[1:].__getitem__)[: max(int(ratio * 5 + numbers[0]), 1)] for numbers in expected
        ]
        masked = masked_fields(seed, epoch, np.array(rows), 5, ratio, stream)
        assert masked.dtype == bool
        assert [set(np.flatnonzero(row)) for row in masked] == [set(fields) for fields in chosen]


def test_fields_are_masked_alike_often_and_independently():
    rows = np.arange(40_000)
    text = masked_fields(0, 0, rows, 8, 0.15, stream=0)
    table = masked_fields(0, 0, rows, 8, 0.15, stream=1)
    assert text.mean() == pytest.approx(0.15, abs=0.003), "the ratio is met on average"
    assert stats.chisquare(text.sum(axis=0)).pvalue > 1e-4
    both = np.zeros((8, 8))
    single = (text.sum(axis=1) == 1) & (table.sum(axis=1) == 1)
    np.add.at(both, (text[single].argmax(axis=1), table[single].argmax(axis=1)), 1)
    assert stats.chi2_contingency(both).pvalue > 1e-4, "the two views are masked independently"
    numbers = uniform(5, 2, rows, stream=0, size=4)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(numbers, rowvar=False) - np.eye(4)).max() < 0.02


def test_a_collator_masks_text_and_table_independently(processor, encoded):
    rows = [{**encoded[i % 300], "row": i} for i in range(3000)]
    batch = FlipPretrainingCollator(processor, text_mask_ratio=0.2, tabular_mask_ratio=0.2)(rows)
    # A fifth of five fields is one.
    in_table = (batch["mtm_labels"] != IGNORED_LABEL).numpy()
    assert (in_table.sum(axis=1) == 1).all()
    in_text = np.zeros_like(in_table)
    for i, row in enumerate(rows):
        masked = (batch["mlm_labels"][i, : len(row["token_field_ids"])] != IGNORED_LABEL).numpy()
        in_text[i, np.array(row["token_field_ids"])[masked]] = True
    assert (in_text.sum(axis=1) == 1).all()
    both = np.zeros((5, 5))
    np.add.at(both, (in_text.argmax(axis=1), in_table.argmax(axis=1)), 1)
    assert stats.chi2_contingency(both).pvalue > 1e-4


def test_each_use_of_random_numbers_has_its_own_stream(processor, encoded, monkeypatch):
    used = []
    real = collators.uniform

    def noting(seed, epoch, rows, stream, size):
        used.append(stream)
        return real(seed, epoch, rows, stream, size)

    for module in (collators, masking):
        monkeypatch.setattr(module, "uniform", noting)
    FlipPretrainingCollator(processor)(encoded)
    FlipCTRCollator(processor, oov_dropout=0.5)(encoded)
    # The fields masked in the table and in the text, which of a field's features is to be recovered, what is dropped.
    assert len(used) == len(set(used)) == 4


def test_each_view_has_its_own_ratio(processor, encoded):
    batch = FlipPretrainingCollator(processor, text_mask_ratio=0.4, tabular_mask_ratio=0.8)(encoded)
    assert ((batch["mtm_labels"] != IGNORED_LABEL).sum(dim=1) == 4).all()
    for i, row in enumerate(encoded):
        masked = (batch["mlm_labels"][i, : len(row["token_field_ids"])] != IGNORED_LABEL).numpy()
        assert len(set(np.array(row["token_field_ids"])[masked])) == 2


def test_collators_emit_what_forward_takes(processor, encoded):
    asked = {"self", "num_items_in_batch", "output_hidden_states", "output_attentions"}
    # Of fields with vectors, teachers and cached towers alone; see their own tests.
    asked |= {"vectors", "vector_places", "teacher_logits", "tower_vectors"}
    taken = set(inspect.signature(FlipForPreTraining.forward).parameters)
    emitted = set(FlipPretrainingCollator(processor)(encoded[:4]))
    assert emitted == taken - asked
    taken = set(inspect.signature(FlipForCTR.forward).parameters)
    emitted = set(FlipCTRCollator(processor)(encoded[:4]))
    assert emitted == taken - asked
    assert set(FlipCTRCollator(processor, mode="id")(encoded[:4])) == {"feature_ids", "labels"}
    assert set(FlipCTRCollator(processor, mode="text")(encoded[:4])) == {"input_ids", "attention_mask", "labels"}
    without = [{k: v for k, v in row.items() if k != "label"} for row in encoded[:4]]
    assert "labels" not in FlipCTRCollator(processor)(without)


@pytest.mark.parametrize("make", [FlipPretrainingCollator, lambda p: FlipCTRCollator(p, oov_dropout=0.3, seed=2)])
def test_a_table_of_rows_and_a_list_of_them_make_the_same_batch(processor, click_rows, make):
    rows = processor.encode_dataset(Dataset.from_dict(click_rows))
    numbers = [7, 3, 299, 3]
    collator = make(processor)
    from_table = collator(EncodedRows(rows, collator.columns).__getitems__(numbers))
    from_list = collator([rows[i] for i in numbers])
    assert set(from_table) == set(from_list)
    for name, tensor in from_list.items():
        assert from_table[name].dtype == tensor.dtype
        assert torch.equal(from_table[name], tensor), name


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.bool_()])
def test_padding_that_rows_hold_already_is_no_text(processor, click_rows, kind):
    rows = processor.encode(pa.table(click_rows))
    collator = FlipPretrainingCollator(processor, pad_to_multiple_of=16)
    clean = FlipCTRCollator(processor, pad_to_multiple_of=16)(rows)
    padded = {name: pa.array(clean[name].tolist()) for name in ("input_ids", "attention_mask")}
    padded["attention_mask"] = padded["attention_mask"].cast(pa.list_(kind))
    held = rows.set_column(rows.column_names.index("input_ids"), "input_ids", padded["input_ids"])
    held = held.append_column("attention_mask", padded["attention_mask"])
    expected = collator(rows)
    for form in (held, held.to_pylist()):
        found = collator(form)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_padding(processor, encoded):
    batch = FlipCTRCollator(processor, pad_to_multiple_of=16)(encoded)
    longest = max(len(row["input_ids"]) for row in encoded)
    assert batch["input_ids"].shape[1] == -(-longest // 16) * 16
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row["input_ids"]) for row in encoded]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    assert batch["labels"].dtype == torch.float32


def test_settings_that_cannot_be_are_refused(processor, monkeypatch):
    with pytest.raises(ValueError, match="text_mask_ratio=0"):
        FlipPretrainingCollator(processor, text_mask_ratio=0)
    with pytest.raises(ValueError, match="text_mask_unit='word' must be 'field' or 'token'"):
        FlipPretrainingCollator(processor, text_mask_unit="word")
    with pytest.raises(ValueError, match="mode='both'"):
        FlipCTRCollator(processor, mode="both")
    monkeypatch.setattr(type(processor.tokenizer), "mask_token_id", None, raising=False)
    with pytest.raises(ValueError, match="no mask token"):
        FlipPretrainingCollator(processor)


@settings(max_examples=150, deadline=None)
@example(num_rows=3, batch_size=1, processes=2, seed=0, epoch=0)
@given(
    num_rows=st.integers(1, 700),
    batch_size=st.integers(1, 40),
    processes=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_row_is_read_once_in_an_epoch(num_rows, batch_size, processes, seed, epoch):
    lengths = np.random.RandomState(0).randint(5, 60, num_rows)
    if num_rows < processes:
        with pytest.raises(ValueError, match="can't be shared"):
            LengthGroupedBatchSampler(lengths, batch_size, seed, processes)
        return
    read = []
    for process in range(processes):
        sampler = LengthGroupedBatchSampler(lengths, batch_size, seed, processes, process)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler), "the order depends on seed and epoch alone"
        assert len(batches) == len(sampler)
        # With one row a process, a remainder can only make batches larger.
        spare = 1 if batch_size == 1 and num_rows % processes else 0
        assert all(0 < len(batch) <= batch_size + spare for batch in batches)
        read += [row for batch in batches for row in batch]
    assert sorted(read) == list(range(num_rows))


def test_batches_hold_rows_of_like_length_in_a_new_order_each_epoch():
    lengths = np.random.RandomState(0).randint(5, 60, 2000)
    sampler = LengthGroupedBatchSampler(lengths, 16, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padding(batches):
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)

    shuffled = np.random.RandomState(1).permutation(2000)
    assert padding(first) < 0.15 * padding(np.array_split(shuffled, 125))
