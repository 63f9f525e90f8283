"""Encoded rows -> the tensors that the models' `forward` takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset as TorchDataset

from flip_hf.configuration_flip import (
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
from flip_hf.data.kinds import KINDS
from flip_hf.data.masking import masked_fields, uniform
from flip_hf.data.ragged import Ragged
from flip_hf.data.template import NO_FIELD

_TEXT_STREAM, _TABULAR_STREAM, _TARGET_STREAM, _OOV_STREAM = range(4)

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
        "id", and with `text_towers` (B, towers, T); labels float32 (B,) where the rows have a label.
    """

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
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
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
        views = ["input_ids"] if self.mode != "id" else []
        views += ["token_field_ids"] if self.text_towers is not None or self._hides else []
        return [*views, *(["feature_ids"] if self.mode != "text" or self._hides else []), "row", "label"]

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        hidden = None
        if self.mode != "text" or self._hides:
            feature_ids = _matrix(rows, "feature_ids")
            if self._oov_shares.any():
                dropped = self._dropped(feature_ids, _numbers(rows))
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
        if _has(rows, "label"):
            batch["labels"] = torch.from_numpy(_column(rows, "label").astype(np.float32))
        return batch

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
        texts = _ragged(rows, "input_ids")
        if hidden is None and self.text_towers is None:
            return texts
        _check_column(rows, "token_field_ids", "by which the values in the text are told apart")
        fields = _ragged(rows, "token_field_ids")
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
    """

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
        return ["row", "feature_ids", "input_ids", "token_field_ids"]

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch = self.plain(rows)
        batch.pop("labels", None)
        feature_ids = batch["feature_ids"].numpy()
        numbers = _numbers(rows)
        num_tabular = len(self.plain.first_positions)

        in_table = masked_fields(self.seed, self.epoch, numbers, num_tabular, self.tabular_mask_ratio, _TABULAR_STREAM)
        masked_ids = np.where(in_table[:, self._position_fields], PADDING_ID, feature_ids)
        masked_ids[:, self.plain.first_positions] = np.where(
            in_table, MASK_ID, feature_ids[:, self.plain.first_positions]
        )
        batch["masked_feature_ids"] = torch.from_numpy(masked_ids)
        targets = np.take_along_axis(feature_ids, self._target_positions(feature_ids, numbers), axis=1)
        batch["mtm_labels"] = torch.from_numpy(np.where(in_table, targets, IGNORED_LABEL))

        token_field_ids = _ragged(rows, "token_field_ids").padded(NO_FIELD, self.plain.pad_to_multiple_of)
        if self.text_mask_unit == "field":
            in_text = masked_fields(self.seed, self.epoch, numbers, self.num_fields, self.text_mask_ratio, _TEXT_STREAM)
            # Tokens of no field look the last place up, which is never masked.
            lookup = np.concatenate([in_text, np.zeros((len(numbers), 1), dtype=bool)], axis=1)
            masked = np.take_along_axis(lookup, token_field_ids % (self.num_fields + 1), axis=1)
        else:
            draws = uniform(self.seed, self.epoch, numbers, _TEXT_STREAM, token_field_ids.shape[1])
            draws[token_field_ids == NO_FIELD] = np.inf
            masked = draws <= np.maximum(draws.min(axis=1, keepdims=True), self.text_mask_ratio)
        input_ids = batch["input_ids"].numpy()
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
    return np.array([row[name] for row in rows])


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


def _check_column(rows: Rows, name: str, purpose: str) -> None:
    if not _has(rows, name):
        raise ValueError(
            f"the encoded rows lack the column {name!r}, {purpose}; keep it: transformers.Trainer does with "
            "TrainingArguments(remove_unused_columns=False)"
        )


def _numbers(rows: Rows) -> np.ndarray:
    _check_column(rows, "row", "which masks and dropped features are a function of")
    return _column(rows, "row").astype(np.int64)


def _matrix(rows: Rows, name: str) -> np.ndarray:
    """Of a column of rows of one length, int64 (rows, length), the caller's to change."""
    if isinstance(rows, pa.Table):
        return np.array(rows[name].combine_chunks().flatten(), dtype=np.int64).reshape(len(rows), -1)
    return np.stack([row[name] for row in rows]).astype(np.int64)


def _ragged(rows: Rows, name: str) -> Ragged:
    return Ragged.of(rows[name] if isinstance(rows, pa.Table) else [np.asarray(row[name]) for row in rows])


def _with_ranges(fields: Sequence[FieldConfig]) -> Iterator[tuple[FieldConfig, list[tuple[int, int]]]]:
    return zip(tabular_fields(fields), feature_ranges(fields), strict=True)
