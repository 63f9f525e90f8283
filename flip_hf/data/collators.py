"""Encoded rows -> the tensors that the models' `forward` takes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.kinds import KINDS
from flip_hf.data.masking import masked_fields, uniform
from flip_hf.data.ragged import Ragged
from flip_hf.data.schema import canonical_labels
from flip_hf.data.template import NO_FIELD
from flip_hf.fields import (
    IGNORED_LABEL,
    MASK_ID,
    MISSING_OFFSET,
    MODES,
    OOV_OFFSET,
    PADDING_ID,
    FieldConfig,
    check_text_towers,
    feature_ranges,
    tabular_fields,
)

_TEXT_STREAM, _TABULAR_STREAM, _TARGET_STREAM, _OOV_STREAM = range(4)
# Rows of one number that are compared at a time.
_COMPARED_ROWS = 1 << 12

Row = Mapping[str, Any]


Rows: TypeAlias = Sequence[Row] | pa.Table
"""Encoded rows of a batch: a list of them, or, much faster, an Arrow table."""


class EncodedRows(TorchDataset[pa.Table]):
    """Encoded rows of which a DataLoader hands a batch to the collator as one Arrow table.

    Args:
        rows: what `FlipProcessor.encode_dataset` returned.
        columns: the columns that the collator reads, `collator.columns`; of these the ones that there are.
    """

    def __init__(self, rows: datasets.Dataset, columns: Sequence[str]) -> None:
        there = [name for name in columns if name in rows.column_names]
        self.rows = rows.select_columns(there).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> pa.Table:
        table: pa.Table = self.rows[numbers]
        return table


class FlipCTRCollator:
    """Batches encoded rows for `FlipForCTR`.

    Args:
        processor: the processor that encoded the rows.
        mode: the model's mode: which views it reads.
        oov_dropout: share of the features replaced by their field's OOV feature, for training: so the OOV feature is
            trained, and a gated fusion learns what it is worth. One number is every field's share, but fields that
            know no OOV are spared; a dict gives it for each field that it names. Which are replaced depends on the
            seed, the epoch and the row's number alone. The text says "missing" in the place of a field of which no
            feature is left, as it does of OOV ones, if the field's `show_oov` is off.
        seed: the run's seed; only read with `oov_dropout`.
        pad_to_multiple_of: the length of a batch is its longest row's, rounded up to this; by default to 8, which suits
            an accelerator's matrix units, or to 2 where there is none.
        text_towers: the model's, `model.config.text_towers`; with them texts are cut into the towers' parts. A constant
            piece such as ` . genre is` goes with the value that it names, and what ends the text with the last one.

    Returns (when called with encoded rows, a list or an Arrow table of them):
        feature_ids int64 (B, P) unless the mode is "text"; input_ids and attention_mask int64 (B, T) unless it is
        "id", and with `text_towers` (B, towers, T); labels float32 (B,) where the rows have a label. Rows may also be
        what calling the processor returns, as in `Dataset.map(processor, batched=True)`: their `attention_mask` says
        which tokens are padding.

    Raises (when called):
        ValueError: the rows are neither a list nor an Arrow table, there are none, or they are not encoded; a column is
            missing; a feature id is not one of its field's, as in most rows that another processor encoded; an
            `attention_mask` is not ones and then zeros; a label is not 0 or 1; or with `oov_dropout`, rows that differ
            have the same number, or several workers read one stream.
    """

    model_class: ClassVar[str] = "FlipForCTR"

    def __init__(
        self,
        processor: Any,
        mode: str = "joint",
        oov_dropout: float | Mapping[str, float] = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        text_towers: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}; set it to model.config.mode")
        if text_towers is not None:
            if mode != "text":
                raise ValueError(f"text_towers are for mode='text', not for mode={mode!r}")
            check_text_towers(text_towers, processor.fields)
        places = [i for i, field in enumerate(processor.fields) if field.traits.has_features]
        fields = list(_with_ranges(processor.fields))
        growing = [field.name for field, _ in fields if KINDS[field.kind].remembers(field)]
        given = oov_dropout.values() if isinstance(oov_dropout, Mapping) else [oov_dropout]
        if any(not 0 <= share < 1 for share in given):
            raise ValueError(f"oov_dropout={oov_dropout} must be in [0, 1)")
        shares = oov_dropout if isinstance(oov_dropout, Mapping) else dict.fromkeys(growing, oov_dropout)
        if unknown := sorted(set(shares) - set(growing)):
            raise ValueError(
                f"oov_dropout: {unknown[0]!r} is not a field with an OOV feature: {', '.join(map(repr, growing))}"
            )
        self.fields: list[FieldConfig] = list(processor.fields)
        self.pad_token_id: int = processor.tokenizer.pad_token_id
        self.mode = mode
        self.seed = seed
        if pad_to_multiple_of is None:
            pad_to_multiple_of = 8 if torch.accelerator.is_available() else 2
        self.pad_to_multiple_of = pad_to_multiple_of
        self.text_towers = text_towers
        self.epoch = 0
        self.num_positions = np.array([f.num_positions for f, _ in fields])
        self.first_positions = self.num_positions.cumsum() - self.num_positions
        self._position_names = [f.name for f, _ in fields for _ in range(f.num_positions)]
        # The bounds of the ids that each position may hold, (ranges, positions); fields with fewer have empty ones.
        num_ranges = max(len(ranges) for _, ranges in fields)
        bounds = np.array([ranges + [(0, 0)] * (num_ranges - len(ranges)) for _, ranges in fields], dtype=np.int64)
        self._first_ids, self._end_ids = np.repeat(bounds, self.num_positions, axis=0).transpose(2, 1, 0)
        # For each position its field's OOV feature, and how often to drop to it.
        self._oov_ids = np.repeat([r[0][0] + OOV_OFFSET for _, r in fields], self.num_positions)
        self._oov_shares = np.repeat([shares.get(f.name, 0.0) for f, _ in fields], self.num_positions)
        # The fields that the text hides where they are dropped: their places in the table, and in the text.
        self._hidden = [i for i, (f, _) in enumerate(fields) if not f.show_oov and shares.get(f.name, 0.0)]
        self._hidden_places = [places[i] for i in self._hidden]
        self._hides = mode != "id" and bool(self._hidden)
        self._num_fields = len(processor.fields)
        self._missing = np.array(processor.template.missing_tokens)

    def set_epoch(self, epoch: int) -> None:
        """What the next batches drop belongs to this epoch."""
        self.epoch = epoch

    @property
    def columns(self) -> list[str]:
        """The columns of the encoded rows that are read."""
        views = ["input_ids", "attention_mask"] if self.mode != "id" else []
        views += ["token_field_ids"] if self.text_towers is not None or self._hides else []
        return [*views, *(["feature_ids"] if self.mode != "text" or self._hides else []), "row", "label"]

    @property
    def needed_columns(self) -> list[str]:
        """Those of `columns` without which there is no batch."""
        optional = {"attention_mask", "label"} | (set() if self.reads_numbers else {"row"})
        return [name for name in self.columns if name not in optional]

    @property
    def reads_numbers(self) -> bool:
        """Whether batches depend on the rows' numbers."""
        return bool(self._oov_shares.any()) and (self.mode != "text" or self._hides)

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch = self.views(rows)
        if _has(rows, "label"):
            batch["labels"] = torch.from_numpy(canonical_labels(_arrow_column(rows, "label"), "label"))
        return batch

    def views(self, rows: Rows) -> dict[str, torch.Tensor]:
        """A batch without its labels."""
        _check_rows(rows, self)
        batch: dict[str, torch.Tensor] = {}
        hidden = None
        if self.mode != "text" or self._hides:
            feature_ids = self.feature_ids(rows)
            if self.reads_numbers:
                numbers = _numbers(rows)
                _refuse_shared_numbers(numbers, lambda places: [feature_ids[places]])
                dropped = self._dropped(feature_ids, numbers)
                hidden = self._fields_to_hide(feature_ids, dropped) if self._hides else None
                feature_ids = np.where(dropped, self._oov_ids, feature_ids)
            if self.mode != "text":
                batch["feature_ids"] = torch.from_numpy(feature_ids)
        if self.mode != "id":
            texts, towers = self._texts(rows, hidden), self.text_towers
            padded = texts.padded(self.pad_token_id, self.pad_to_multiple_of)
            for name, values in (("input_ids", padded), ("attention_mask", texts.mask(padded.shape[1]))):
                tensor = torch.from_numpy(values.astype(np.int64, copy=False))
                batch[name] = tensor if towers is None else tensor.unflatten(0, (-1, len(towers)))
        return batch

    def feature_ids(self, rows: Rows) -> np.ndarray:
        """The rows' features, int64 (rows, positions).

        Raises:
            ValueError: a row has another number of positions than the processor's fields, or a position holds a feature
                of another field. Rows of another processor pass where each of their ids is one of the right field.
        """
        lists = _ragged(rows, "feature_ids")
        width = int(self.num_positions.sum())
        advice = "another processor encoded the rows; encode them with the collator's, processor.encode_dataset"
        if (lists.lengths != width).any():
            row = int((lists.lengths != width).argmax())
            raise ValueError(
                f"row {row} of the batch has {lists.lengths[row]} feature_ids, and the fields of the collator's "
                f"processor have {width} positions: {advice}"
            )
        feature_ids: np.ndarray = lists.values.reshape(-1, width).astype(np.int64)
        known = feature_ids == PADDING_ID
        for firsts, ends in zip(self._first_ids, self._end_ids, strict=True):
            known |= (feature_ids >= firsts) & (feature_ids < ends)
        if not known.all():
            row, position = np.argwhere(~known)[0]
            field = self._position_names[position]
            raise ValueError(
                f"row {row} of the batch holds feature id {feature_ids[row, position]} in the place of field "
                f"{field!r}, which has no such feature: {advice}"
            )
        return feature_ids

    def _dropped(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The features that are replaced, bool (rows, positions)."""
        draws = uniform(self.seed, self.epoch, numbers, _OOV_STREAM, feature_ids.shape[1])
        # A value that is missing is not one that was never seen.
        droppable = (feature_ids != PADDING_ID) & (feature_ids != self._oov_ids - OOV_OFFSET + MISSING_OFFSET)
        result: np.ndarray = droppable & (draws < self._oov_shares)
        return result

    def _fields_to_hide(self, feature_ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """The fields of which the text shall show nothing, bool (rows, fields + 1); the last one is no field."""
        left = np.logical_or.reduceat((feature_ids != PADDING_ID) & ~dropped, self.first_positions, axis=1)
        result = np.zeros((len(feature_ids), self._num_fields + 1), dtype=bool)
        result[:, self._hidden_places] = ~left[:, self._hidden]
        return result

    def _texts(self, rows: Rows, hidden: np.ndarray | None) -> Ragged:
        texts = _unpadded_texts(rows)
        if hidden is None and self.text_towers is None:
            return texts
        fields = _token_fields(rows, texts)
        if hidden is not None:
            texts, fields = self._without(hidden, texts, fields)
        return texts if self.text_towers is None else _cut(texts, fields.values, self.text_towers)

    def _without(self, hidden: np.ndarray, texts: Ragged, fields: Ragged) -> tuple[Ragged, Ragged]:
        """The texts, and their tokens' fields, with "missing" in the place of what is hidden."""
        row_of_token = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
        is_hidden = hidden[row_of_token, fields.values]
        # How far each token stands behind the first one of its value; fields stand apart.
        order = np.arange(len(fields.values))
        within = order - np.maximum.accumulate(np.where(np.diff(fields.values, prepend=NO_FIELD) != 0, order, 0))
        # A text may not grow beyond what the encoder reads, so what a value's tokens leave no room for is cut.
        says_missing = is_hidden & (within < len(self._missing))
        values = texts.values.copy()
        values[says_missing] = self._missing[within[says_missing]]
        kept = ~is_hidden | says_missing
        lengths = np.bincount(row_of_token[kept], minlength=len(texts.lengths))
        return Ragged(values[kept], lengths), Ragged(fields.values[kept], lengths)


class FlipPretrainingCollator:
    """Batches encoded rows for `FlipForPreTraining`, with fields masked in both views.

    The fields masked in the text and in the table are drawn independently. All value tokens of a masked field are
    replaced by the tokenizer's mask token, and no others; with `text_mask_unit="token"` they are single tokens. What is
    masked depends on the seed, the epoch and the row's number alone (`data.masking`), so a resumed or resharded run
    masks alike.

    Args:
        processor: the processor that encoded the rows; its tokenizer must have a mask token.
        seed: the run's seed.
        text_mask_ratio: share of the fields masked in the text; at least one field is.
        tabular_mask_ratio: share of the fields masked in the table; at least one field is.
        text_mask_unit: "field", or "token": then the ratio is that of all value tokens, of which at least one is
            masked, whatever their fields.
        pad_to_multiple_of: the length of a batch is its longest row's, rounded up to this; by default to 8, which suits
            an accelerator's matrix units, or to 2 where there is none.

    Returns (when called with encoded rows, a list or an Arrow table of them):
        feature_ids, masked_feature_ids int64 (B, P); mtm_labels int64 (B, F), F the fields with features; input_ids,
        attention_mask, masked_input_ids and mlm_labels int64 (B, T). Labels are -100 where nothing was masked. Of a
        masked field that holds several features none is left, and one of them, drawn like the masks, is the label.

    Raises (when called):
        ValueError: as in `FlipCTRCollator` with `oov_dropout`: rows that share a number would be masked alike.
    """

    model_class: ClassVar[str] = "FlipForPreTraining"
    mode: ClassVar[str] = "joint"
    text_towers: ClassVar[None] = None
    reads_numbers: ClassVar[bool] = True

    def __init__(
        self,
        processor: Any,
        seed: int = 0,
        text_mask_ratio: float = 0.15,
        tabular_mask_ratio: float = 0.15,
        text_mask_unit: str = "field",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if text_mask_unit not in ("field", "token"):
            raise ValueError(f"text_mask_unit={text_mask_unit!r} is not field or token")
        for name, ratio in (("text_mask_ratio", text_mask_ratio), ("tabular_mask_ratio", tabular_mask_ratio)):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name}={ratio} must be in (0, 1]")
        if processor.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; MLM needs a text encoder that was trained with one")
        self.mask_token_id: int = processor.tokenizer.mask_token_id
        self.plain = FlipCTRCollator(processor, pad_to_multiple_of=pad_to_multiple_of)
        self.num_fields = len(processor.fields)
        num_positions = self.plain.num_positions
        self._position_fields = np.repeat(np.arange(len(num_positions)), num_positions)
        self.seed = seed
        self.text_mask_ratio = text_mask_ratio
        self.tabular_mask_ratio = tabular_mask_ratio
        self.text_mask_unit = text_mask_unit
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Masks of the next batches belong to this epoch."""
        self.epoch = epoch

    @property
    def columns(self) -> list[str]:
        """The columns of the encoded rows that are read."""
        return [*self.needed_columns, "attention_mask"]

    @property
    def needed_columns(self) -> list[str]:
        """Those of `columns` without which there is no batch."""
        return ["row", "feature_ids", "input_ids", "token_field_ids"]

    @property
    def fields(self) -> list[FieldConfig]:
        """The processor's fields."""
        return self.plain.fields

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        _check_rows(rows, self)
        batch = self.plain.views(rows)
        feature_ids, input_ids = batch["feature_ids"].numpy(), batch["input_ids"].numpy()
        numbers = _numbers(rows)
        _refuse_shared_numbers(numbers, lambda places: [feature_ids[places], input_ids[places]])
        num_tabular = len(self.plain.first_positions)

        in_table = masked_fields(self.seed, self.epoch, numbers, num_tabular, self.tabular_mask_ratio, _TABULAR_STREAM)
        masked_ids = np.where(in_table[:, self._position_fields], PADDING_ID, feature_ids)
        masked_ids[:, self.plain.first_positions] = np.where(
            in_table, MASK_ID, feature_ids[:, self.plain.first_positions]
        )
        batch["masked_feature_ids"] = torch.from_numpy(masked_ids)
        targets = np.take_along_axis(feature_ids, self._target_positions(feature_ids, numbers), axis=1)
        batch["mtm_labels"] = torch.from_numpy(np.where(in_table, targets, IGNORED_LABEL))

        token_fields = _token_fields(rows, _unpadded_texts(rows))
        token_field_ids = token_fields.padded(NO_FIELD, self.plain.pad_to_multiple_of)
        if self.text_mask_unit == "field":
            in_text = masked_fields(self.seed, self.epoch, numbers, self.num_fields, self.text_mask_ratio, _TEXT_STREAM)
            # Tokens of no field look the last place up, which is never masked.
            lookup = np.concatenate([in_text, np.zeros((len(numbers), 1), dtype=bool)], axis=1)
            masked = np.take_along_axis(lookup, token_field_ids % (self.num_fields + 1), axis=1)
        else:
            draws = uniform(self.seed, self.epoch, numbers, _TEXT_STREAM, token_field_ids.shape[1])
            draws[token_field_ids == NO_FIELD] = np.inf
            masked = draws <= np.maximum(draws.min(axis=1, keepdims=True), self.text_mask_ratio)
        batch["masked_input_ids"] = torch.from_numpy(np.where(masked, self.mask_token_id, input_ids))
        batch["mlm_labels"] = torch.from_numpy(np.where(masked, input_ids, IGNORED_LABEL))
        return batch

    def _target_positions(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Where the feature to recover stands, for each field if it is masked, int64 (rows, fields)."""
        present = np.add.reduceat(feature_ids != PADDING_ID, self.plain.first_positions, axis=1)
        draws = uniform(self.seed, self.epoch, numbers, _TARGET_STREAM, len(self.plain.first_positions))
        positions: np.ndarray = self.plain.first_positions + (draws * present).astype(np.int64)
        return positions


def _has(rows: Rows, name: str) -> bool:
    return name in (rows.column_names if isinstance(rows, pa.Table) else rows[0])


def _column(rows: Rows, name: str) -> np.ndarray:
    if isinstance(rows, pa.Table):
        column: np.ndarray = rows[name].to_numpy()
        return column
    return np.array(_values(rows, name))


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    try:
        return [row[name] for row in rows]
    except KeyError as error:
        place = next(i for i, row in enumerate(rows) if name not in row)
        raise ValueError(
            f"row {place} of the batch has no {name!r}, and other rows have one; encode all rows alike"
        ) from error


def _arrow_column(rows: Rows, name: str) -> pa.Array | pa.ChunkedArray:
    return rows[name] if isinstance(rows, pa.Table) else pa.array(_column(rows, name))


def _cut(texts: Ragged, field_ids: np.ndarray, towers: Sequence[Sequence[str]]) -> Ragged:
    """The parts of the rows' texts that the towers read, as texts of their own: as many a row as there are towers."""
    # Fields come in order and each has a token: a part ends behind its last value, the last one where the row does.
    of_values = np.flatnonzero(field_ids != NO_FIELD)
    row_of_token = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
    tower_of_field = np.repeat(np.arange(len(towers)), [len(group) for group in towers])
    parts = row_of_token[of_values] * len(towers) + tower_of_field[field_ids[of_values]]  # ascending
    lasts = np.searchsorted(parts, np.arange(len(texts.lengths) * len(towers)), side="right") - 1
    ends = of_values[lasts] + 1
    ends[len(towers) - 1 :: len(towers)] = texts.lengths.cumsum()
    return Ragged(texts.values, np.diff(ends, prepend=0))


_PURPOSES = {
    "row": ", on which masks and dropped features depend",
    "token_field_ids": ", which says what field each token belongs to",
}


def _check_column(there: bool, name: str) -> None:
    if not there:
        raise ValueError(
            f"the encoded rows lack the column {name!r}{_PURPOSES.get(name, '')}. FlipProcessor.encode and "
            f"encode_dataset make it{'; calling the processor does not' if name in _PURPOSES else ''}. "
            "transformers.Trainer keeps it with TrainingArguments(remove_unused_columns=False), "
            "flip_hf.integrations.ray.BatchEncoder with row_column"
        )


def _check_rows(rows: Any, collator: Any) -> None:
    """Raises ValueError for what a collator can't read at all."""
    if not isinstance(rows, pa.Table):
        is_list = isinstance(rows, Sequence | datasets.Dataset) and not isinstance(rows, str | bytes)
        if not is_list or (len(rows) and not isinstance(rows[0], Mapping)):
            held = f"{type(rows).__name__} of {type(rows[0]).__name__}" if is_list else type(rows).__name__
            raise ValueError(
                f"a collator takes encoded rows as a list of dicts or a pyarrow.Table, not a {held}: put one row into "
                "a list, [row], and columns into a table, pyarrow.table(columns)"
            )
    if not len(rows):
        raise ValueError("the batch has no rows; a collator needs at least one, so leave empty batches out")
    for name in collator.needed_columns:
        _check_column(_has(rows, name), name)
    if (worker := get_worker_info()) is not None:
        check_stream(worker.dataset, worker.num_workers, collator)


def check_stream(rows: Any, num_workers: int, collator: Any) -> None:
    """Raises ValueError if several workers would read a stream whose row numbers masks or dropped features depend on.

    Each worker numbers the rows that it reads from 0, so different rows would be masked alike.

    Args:
        rows: what the DataLoader reads.
        num_workers: its workers.
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`; those of another package are not checked.
    """
    is_stream = isinstance(rows, datasets.IterableDataset | IterableDataset)
    if is_stream and num_workers > 1 and getattr(collator, "reads_numbers", False):
        raise ValueError(
            f"{num_workers} workers would read one stream, and each would number its rows from 0: different rows would "
            "share masks and dropped features, which depend on the number. Set the number of workers "
            "(DataLoader(num_workers=...), TrainingArguments(dataloader_num_workers=...)) to 0 or 1, or encode a "
            "datasets.Dataset instead of a stream"
        )


def _numbers(rows: Rows) -> np.ndarray:
    numbers = _column(rows, "row")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"the column 'row' must hold whole numbers; it holds {numbers.dtype}, such as {numbers.tolist()[0]!r}"
        )
    return numbers.astype(np.int64)


def _refuse_shared_numbers(numbers: np.ndarray, contents: Callable[[np.ndarray], Sequence[np.ndarray]]) -> None:
    """Raises ValueError if different rows share a number: they would be masked alike. The same row may come twice.

    Args:
        numbers: int64 (rows,).
        contents: what the rows at those places hold, (places, ...) each.
    """
    order = np.argsort(numbers, kind="stable")
    shared = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    for start in range(0, len(shared), _COMPARED_ROWS):
        places = shared[start : start + _COMPARED_ROWS]
        for values in contents(np.concatenate([order[places], order[places + 1]])):
            differs = (values[: len(places)] != values[len(places) :]).any(axis=1)
            if differs.any():
                number = numbers[order[places[differs.argmax()]]]
                raise ValueError(
                    f"{np.count_nonzero(numbers == number)} different rows share row number {number}, so all of them "
                    "would be masked alike: masks and dropped features depend on the number. Encode all rows at once "
                    "with processor.encode_dataset(dataset), or each part with processor.encode(rows, first_row=...); "
                    "or renumber them: rows.remove_columns('row').add_column('row', list(range(len(rows))))"
                )


def check_training_rows(rows: datasets.Dataset, collator: Any) -> None:
    """Raises ValueError unless a collator can make batches of all rows, for finetuning with labels.

    If batches depend on row numbers, different rows must not share one. They do if datasets were encoded apart and then
    concatenated. Collators of another package are not checked.

    Args:
        rows: the encoded training rows.
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`.
    """
    if not isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
        return
    for name in collator.needed_columns:
        _check_column(name in rows.column_names, name)
    if isinstance(collator, FlipCTRCollator) and "label" not in rows.column_names:
        raise ValueError(
            "the training rows have no column 'label' to learn from: encode them with "
            "processor.encode_dataset(dataset, with_label=True); a processor knows the label column by "
            "FlipProcessor.fit(..., label='label')"
        )
    if not collator.reads_numbers:
        return
    numbers = _numbers(rows.select_columns(["row"]).with_format("arrow")[:])
    if (numbers[1:] > numbers[:-1]).all():
        return
    views = [name for name in ("feature_ids", "input_ids", "attention_mask") if name in collator.columns]
    table = EncodedRows(rows, views)

    def contents(places: np.ndarray) -> list[np.ndarray]:
        part = table.__getitems__(places.tolist())
        texts = [_unpadded_texts(part).padded(-1)] if "input_ids" in part.column_names else []
        return [_ragged(part, "feature_ids").padded(-1), *texts]

    _refuse_shared_numbers(numbers, contents)


def check_fields(fields: Sequence[FieldConfig], model_fields: Sequence[FieldConfig]) -> None:
    """Raises ValueError, which names the first difference, unless a processor's fields are the model's.

    Args:
        fields: the processor's.
        model_fields: `model.config.fields`.
    """
    own, others = ([f.name for f in some] for some in (fields, model_fields))
    if own != others:
        difference = f"the processor has {', '.join(map(repr, own))} and the model {', '.join(map(repr, others))}"
    elif changed := [(a, b) for a, b in zip(fields, model_fields, strict=True) if a != b]:
        field, other = changed[0]
        name = next(f.name for f in dataclasses.fields(field) if getattr(field, f.name) != getattr(other, f.name))
        difference = (
            f"field {field.name!r} has {name}={getattr(field, name)!r} in the processor and {getattr(other, name)!r} "
            "in the model"
        )
    else:
        return
    raise ValueError(
        f"the processor's fields are not the model's: {difference}. Load both from one folder, and after "
        "processor.extend resize the model and save both"
    )


_COLLATORS: dict[str, Any] = {cls.model_class: cls for cls in (FlipCTRCollator, FlipPretrainingCollator)}


def find_flip_model(model: Any) -> tuple[Any, str] | None:
    """The FLIP model that a model is or wraps, as PEFT does, and which it is.

    Returns:
        The model, and "FlipForCTR" or "FlipForPreTraining", also for their subclasses; None if there is none.
    """
    found = ((m, cls.__name__) for m in model.modules() for cls in type(m).__mro__ if cls.__name__ in _COLLATORS)
    return next(found, None)


def check_collator(collator: Any, model: Any) -> None:
    """Raises ValueError unless a collator makes what a model reads. Collators of another package are not checked.

    Args:
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`.
        model: `FlipForCTR` or `FlipForPreTraining`, or a wrapper around one, such as PEFT's.
    """
    found = find_flip_model(model)
    if found is None or not isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
        return
    flip, name = found
    config: Any = flip.config
    if collator.model_class != name:
        raise ValueError(
            f"{type(collator).__name__} makes batches for {collator.model_class}, and this is a {name}: use "
            f"{_COLLATORS[name].__name__}(processor)"
        )
    towers = [list(tower) for tower in collator.text_towers] if collator.text_towers is not None else None
    if collator.mode not in ("joint", config.mode) or towers != config.text_towers:
        of_collator, of_model = (f"mode={a.mode!r} and text_towers={a.text_towers}" for a in (collator, config))
        raise ValueError(
            f"the collator has {of_collator}, and the model {of_model}: make FlipCTRCollator(processor, "
            "model.config.mode, text_towers=model.config.text_towers)"
        )
    check_fields(collator.fields, config.fields)


def _unpadded_texts(rows: Rows) -> Ragged:
    """The rows' tokens, without those that an `attention_mask` says are padding."""
    texts = _ragged(rows, "input_ids")
    if not _has(rows, "attention_mask"):
        return texts
    mask = _ragged(rows, "attention_mask")
    if np.array_equal(mask.lengths, texts.lengths):
        of_row = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
        lengths = np.bincount(of_row[mask.values == 1], minlength=len(texts.lengths))
        within = np.arange(len(of_row)) - np.repeat(texts.lengths.cumsum() - texts.lengths, texts.lengths)
        wrong = of_row[mask.values != (within < lengths[of_row])]
        if not len(wrong) and lengths.all():
            return Ragged(texts.values[mask.values == 1], lengths)
        row = wrong[0] if len(wrong) else lengths.argmin()
    else:
        row = (mask.lengths != texts.lengths).argmax()
    raise ValueError(
        f"the attention_mask of row {row} of the batch must be as long as its input_ids, 1 on tokens and then 0 on "
        "padding, with at least one token; encode the rows with processor.encode or encode_dataset, which do not pad"
    )


def _token_fields(rows: Rows, texts: Ragged) -> Ragged:
    """The field of each token of the texts."""
    fields = _ragged(rows, "token_field_ids")
    if not np.array_equal(fields.lengths, texts.lengths):
        row = (fields.lengths != texts.lengths).argmax()
        raise ValueError(
            f"row {row} of the batch has {texts.lengths[row]} tokens in input_ids and {fields.lengths[row]} in "
            "token_field_ids; take both from one call of processor.encode"
        )
    return fields


def _ragged(rows: Rows, name: str) -> Ragged:
    """A column of lists of whole numbers."""
    wrong: int | None
    if isinstance(rows, pa.Table):
        column = rows[name]
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        # An attention_mask may be of Booleans.
        if is_list and (pa.types.is_integer(column.type.value_type) or pa.types.is_boolean(column.type.value_type)):
            return Ragged.of(column)
        wrong, held = 0, str(column.type)
    else:
        arrays = [np.asarray(value) for value in _values(rows, name)]
        # NumPy takes an empty list for one of floats.
        wrong = next((i for i, a in enumerate(arrays) if a.ndim != 1 or (len(a) and a.dtype.kind not in "iub")), None)
        if wrong is None:
            return Ragged.of(arrays)
        held = f"an array of {arrays[wrong].dtype} in {arrays[wrong].ndim} dimensions"
    raise ValueError(
        f"row {wrong} of the batch must have a list of whole numbers in {name!r}, not {held}: encode rows with "
        "processor.encode_dataset(dataset); whoever maps the processor needs dataset.map(processor, batched=True)"
    )


def _with_ranges(fields: Sequence[FieldConfig]) -> Iterator[tuple[FieldConfig, list[tuple[int, int]]]]:
    return zip(tabular_fields(fields), feature_ranges(fields), strict=True)
