"""Encoded rows -> the tensors that the models' `forward` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flip_hf.configuration_flip import IGNORED_LABEL, MASK_ID, MODES
from flip_hf.data.masking import masked_fields
from flip_hf.data.template import NO_FIELD

_TEXT_STREAM, _TABULAR_STREAM = 0, 1

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
        pad_to_multiple_of: the length of a batch is its longest row's, rounded up to this.

    Returns (when called with a list of encoded rows):
        feature_ids int64 (B, F) unless the mode is "text"; input_ids and attention_mask int64 (B, T) unless it is
        "id"; labels float32 (B,) where the rows have a label.
    """

    def __init__(self, processor: Any, mode: str = "joint", pad_to_multiple_of: int = 8) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
        self.pad_token_id: int = processor.tokenizer.pad_token_id
        self.mode = mode
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        if self.mode != "text":
            batch["feature_ids"] = torch.from_numpy(np.stack([row["feature_ids"] for row in rows]).astype(np.int64))
        if self.mode != "id":
            input_ids = [np.asarray(row["input_ids"]) for row in rows]
            batch["input_ids"] = torch.from_numpy(pad_ragged(input_ids, self.pad_token_id, self.pad_to_multiple_of))
            ones = [np.ones(len(ids), dtype=np.int64) for ids in input_ids]
            batch["attention_mask"] = torch.from_numpy(pad_ragged(ones, 0, self.pad_to_multiple_of))
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([float(row["label"]) for row in rows])
        return batch


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
        feature_ids, masked_feature_ids, mtm_labels int64 (B, F); input_ids, attention_mask, masked_input_ids and
        mlm_labels int64 (B, T). Labels are -100 where nothing was masked.
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
        num_fields = feature_ids.shape[1]

        in_table = masked_fields(self.seed, self.epoch, numbers, num_fields, self.tabular_mask_ratio, _TABULAR_STREAM)
        batch["masked_feature_ids"] = torch.from_numpy(np.where(in_table, MASK_ID, feature_ids))
        batch["mtm_labels"] = torch.from_numpy(np.where(in_table, feature_ids, IGNORED_LABEL))

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
