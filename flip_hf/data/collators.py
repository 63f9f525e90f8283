"""Encoded rows -> the tensors that the models' `forward` takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flip_hf.configuration_flip import (
    IGNORED_LABEL,
    MASK_ID,
    MISSING_OFFSET,
    MODES,
    OOV_OFFSET,
    PADDING_ID,
    FieldConfig,
    feature_ranges,
    tabular_fields,
)
from flip_hf.data.kinds import KINDS
from flip_hf.data.masking import masked_fields, uniform
from flip_hf.data.template import NO_FIELD

_TEXT_STREAM, _TABULAR_STREAM, _TARGET_STREAM, _OOV_STREAM = range(4)

Row = Mapping[str, Any]


def pad_ragged(rows: Sequence[Any], value: int, multiple_of: int = 1) -> np.ndarray:
    """Rows of different lengths as one int64 (rows, length), filled up with `value`.

    `length` is the longest row's, rounded up to a multiple of `multiple_of`.
    """
    lengths = np.array([len(row) for row in rows])
    longest = -(-int(lengths.max(initial=1)) // multiple_of) * multiple_of
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    padded[np.arange(longest) < lengths[:, None]] = np.concatenate(rows) if len(rows) else []
    return padded


class FlipCTRCollator:
    """Batches encoded rows for `FlipForCTR`.

    Args:
        processor: the processor that encoded the rows.
        mode: the model's mode: which views it reads.
        oov_dropout: share of the features replaced by their field's OOV feature, for training: so the OOV feature is
            trained, and a gated fusion learns what it is worth. Fields that know no OOV are spared. Which are replaced
            depends on the seed, the epoch and the row's number alone.
        seed: the run's seed; only read with `oov_dropout`.
        pad_to_multiple_of: the length of a batch is its longest row's, rounded up to this.

    Returns (when called with a list of encoded rows):
        feature_ids int64 (B, P) unless the mode is "text"; input_ids and attention_mask int64 (B, T) unless it is
        "id"; labels float32 (B,) where the rows have a label.
    """

    def __init__(
        self,
        processor: Any,
        mode: str = "joint",
        oov_dropout: float = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int = 8,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
        if not 0 <= oov_dropout < 1:
            raise ValueError(f"oov_dropout={oov_dropout} must be in [0, 1)")
        self.pad_token_id: int = processor.tokenizer.pad_token_id
        self.mode = mode
        self.oov_dropout = oov_dropout
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.epoch = 0
        # For each position its field's OOV feature, and padding where there is none to drop to.
        self._oov_ids = np.array(
            [
                ranges[0][0] + OOV_OFFSET if KINDS[field.kind].grows(field) else PADDING_ID
                for field, ranges in _with_ranges(processor.fields)
                for _ in range(field.num_positions)
            ]
        )

    def set_epoch(self, epoch: int) -> None:
        """What the next batches drop belongs to this epoch."""
        self.epoch = epoch

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        if self.mode != "text":
            feature_ids = np.stack([row["feature_ids"] for row in rows]).astype(np.int64)
            if self.oov_dropout:
                feature_ids = self._drop(feature_ids, np.array([row["row"] for row in rows], dtype=np.int64))
            batch["feature_ids"] = torch.from_numpy(feature_ids)
        if self.mode != "id":
            input_ids = [np.asarray(row["input_ids"]) for row in rows]
            batch["input_ids"] = torch.from_numpy(pad_ragged(input_ids, self.pad_token_id, self.pad_to_multiple_of))
            ones = [np.ones(len(ids), dtype=np.int64) for ids in input_ids]
            batch["attention_mask"] = torch.from_numpy(pad_ragged(ones, 0, self.pad_to_multiple_of))
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([float(row["label"]) for row in rows])
        return batch

    def _drop(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        draws = uniform(self.seed, self.epoch, numbers, _OOV_STREAM, feature_ids.shape[1])
        droppable = (self._oov_ids != PADDING_ID) & (feature_ids != PADDING_ID)
        # A value that is missing is not one that was never seen.
        droppable &= feature_ids != self._oov_ids - OOV_OFFSET + MISSING_OFFSET
        return np.where(droppable & (draws < self.oov_dropout), self._oov_ids, feature_ids)


class FlipPretrainingCollator:
    """Batches encoded rows for `FlipForPreTraining`, with fields masked in both views.

    The fields masked in the text and in the table are drawn independently. All value tokens of a masked field are
    replaced by the tokenizer's mask token, and no others. What is masked depends on the seed, the epoch and the row's
    number alone (`data.masking`), so a resumed or resharded run masks alike.

    Args:
        processor: the processor that encoded the rows; its tokenizer must have a mask token.
        seed: the run's seed.
        text_mask_ratio: share of the fields masked in the text; at least one field is.
        tabular_mask_ratio: share of the fields masked in the table; at least one field is.
        pad_to_multiple_of: the length of a batch is its longest row's, rounded up to this.

    Returns (when called with a list of encoded rows):
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
        pad_to_multiple_of: int = 8,
    ) -> None:
        for name, ratio in (("text_mask_ratio", text_mask_ratio), ("tabular_mask_ratio", tabular_mask_ratio)):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name}={ratio} must be in (0, 1]")
        if processor.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; MLM needs a text encoder that was trained with one")
        self.mask_token_id: int = processor.tokenizer.mask_token_id
        self.plain = FlipCTRCollator(processor, pad_to_multiple_of=pad_to_multiple_of)
        self.num_fields = len(processor.fields)
        num_positions = np.array([f.num_positions for f in tabular_fields(processor.fields)])
        self._first_positions = num_positions.cumsum() - num_positions
        self._position_fields = np.repeat(np.arange(len(num_positions)), num_positions)
        self.seed = seed
        self.text_mask_ratio = text_mask_ratio
        self.tabular_mask_ratio = tabular_mask_ratio
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Masks of the next batches belong to this epoch."""
        self.epoch = epoch

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = self.plain(rows)
        batch.pop("labels", None)
        feature_ids = batch["feature_ids"].numpy()
        numbers = np.array([row["row"] for row in rows], dtype=np.int64)
        num_tabular, num_fields = len(self._first_positions), self.num_fields

        in_table = masked_fields(self.seed, self.epoch, numbers, num_tabular, self.tabular_mask_ratio, _TABULAR_STREAM)
        masked_ids = np.where(in_table[:, self._position_fields], PADDING_ID, feature_ids)
        masked_ids[:, self._first_positions] = np.where(in_table, MASK_ID, feature_ids[:, self._first_positions])
        batch["masked_feature_ids"] = torch.from_numpy(masked_ids)
        targets = np.take_along_axis(feature_ids, self._target_positions(feature_ids, numbers), axis=1)
        batch["mtm_labels"] = torch.from_numpy(np.where(in_table, targets, IGNORED_LABEL))

        in_text = masked_fields(self.seed, self.epoch, numbers, num_fields, self.text_mask_ratio, _TEXT_STREAM)
        token_fields = [np.asarray(row["token_field_ids"]) for row in rows]
        token_field_ids = pad_ragged(token_fields, NO_FIELD, self.plain.pad_to_multiple_of)
        # Tokens of no field look the last place up, which is never masked.
        lookup = np.concatenate([in_text, np.zeros((len(rows), 1), dtype=bool)], axis=1)
        masked = np.take_along_axis(lookup, token_field_ids % (num_fields + 1), axis=1)
        input_ids = batch["input_ids"].numpy()
        batch["masked_input_ids"] = torch.from_numpy(np.where(masked, self.mask_token_id, input_ids))
        batch["mlm_labels"] = torch.from_numpy(np.where(masked, input_ids, IGNORED_LABEL))
        return batch

    def _target_positions(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Where the feature to recover stands, for each field if it is masked, int64 (rows, fields)."""
        present = np.add.reduceat(feature_ids != PADDING_ID, self._first_positions, axis=1)
        draws = uniform(self.seed, self.epoch, numbers, _TARGET_STREAM, len(self._first_positions))
        positions: np.ndarray = self._first_positions + (draws * present).astype(np.int64)
        return positions


def _with_ranges(fields: Sequence[FieldConfig]) -> Iterator[tuple[FieldConfig, list[tuple[int, int]]]]:
    return zip(tabular_fields(fields), feature_ranges(fields), strict=True)
