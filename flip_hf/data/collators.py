"""Collators: convert encoded rows to the tensors that the models' `forward` takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from flip_hf.data.distillation import TEACHER_COLUMN, labels_or_ignored, teacher_logits
from flip_hf.data.encoded_rows import (
    Rows,
    arrow_column,
    check_rows,
    fields_of_tokens,
    has_column,
    ragged_column,
    refuse_shared_numbers,
    row_numbers,
    unpadded_texts,
)
from flip_hf.data.kinds import KINDS
from flip_hf.data.masking import masked_fields, uniform
from flip_hf.data.ragged import Ragged, padding_multiple
from flip_hf.data.schema import canonical_labels
from flip_hf.data.template import NO_FIELD
from flip_hf.data.vector_inputs import VectorInputs
from flip_hf.field_checks import check_fields
from flip_hf.fields import (
    IGNORED_LABEL,
    MASK_ID,
    MODES,
    PADDING_ID,
    FieldConfig,
    feature_ranges,
    missing_id,
    oov_id,
    tabular_fields,
)
from flip_hf.text_towers import TextTowers, named_towers

_TEXT_STREAM, _TABULAR_STREAM, _TARGET_STREAM, _OOV_STREAM = range(4)


class FlipCTRCollator:
    """Batches encoded rows for `FlipForCTR`.

    Args:
        processor: the processor that encoded the rows.
        mode: the model's mode, which decides the views in a batch.
        oov_dropout: share of the features to replace by their field's OOV feature in training, in [0, 1). This trains
            the OOV feature and shows a gated fusion what it is worth. A number applies to every field that can have OOV
            values; a dict gives the share of each field that it names. The choice depends only on the seed, the epoch
            and the row number. If all features of a field are replaced and its `show_oov` is off, the text shows
            "missing", as for OOV values.
        seed: the run's seed; used only with `oov_dropout`.
        pad_to_multiple_of: the batch length is the longest row's, rounded up to a multiple of this. Default:
            `flip_hf.data.ragged.padding_multiple()`, which is 8 with an accelerator and 2 without.
        text_towers: `model.config.text_towers`. If set, each text is cut into one part per tower. A constant piece such
            as ` . genre is` belongs to the value that follows it; the end of the text belongs to the last value. Mode
            "id" ignores this argument.

    Returns (when called with encoded rows, a list or an Arrow table of them):
        feature_ids int64 (B, P), unless the mode is "text"; input_ids and attention_mask int64 (B, T), or
        (B, towers, T) with `text_towers`, unless the mode is "id"; `vectors` and `vector_places` as in `FlipModel`, if
        fields have vectors and the mode is not "text"; labels float32 (B,), if the rows have labels; teacher_logits
        float32 (B,), if the rows have a `teacher_logit`. With teacher_logits, labels may be null or NaN, which become
        -100. Rows may also be the processor's own output, as in `Dataset.map(processor, batched=True)`; their
        `attention_mask` marks the padding.

    Raises (when called):
        ValueError: the rows are neither a list nor an Arrow table, are empty, or are not encoded; a column is missing;
            a feature id belongs to another field, as in most rows of another processor; an `attention_mask` is not ones
            followed by zeros; or a label is not 0 or 1. With `oov_dropout` also: different rows share a row number, or
            several workers read one stream.
    """

    model_class: ClassVar[str] = "FlipForCTR"

    def __init__(
        self,
        processor: Any,
        mode: str = "joint",
        oov_dropout: float | Mapping[str, float] = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        text_towers: TextTowers | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(
                f"mode={mode!r} is not one of {', '.join(MODES)}; set it to model.config.mode, or create the collator "
                "with FlipCTRCollator.from_model(processor, model)"
            )
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
        self.pad_to_multiple_of = padding_multiple() if pad_to_multiple_of is None else pad_to_multiple_of
        self.towers: dict[str, list[str]] | None = None
        if text_towers is not None and mode != "id":
            self.towers = named_towers(text_towers, processor.fields)
        self.epoch = 0
        self.num_positions = np.array([f.num_positions for f, _ in fields])
        self.first_positions = self.num_positions.cumsum() - self.num_positions
        self._position_names = [f.name for f, _ in fields for _ in range(f.num_positions)]
        # The bounds of each position's ids, (ranges, positions). Fields with fewer ranges get empty ones.
        num_ranges = max(len(ranges) for _, ranges in fields)
        bounds = np.array([ranges + [(0, 0)] * (num_ranges - len(ranges)) for _, ranges in fields], dtype=np.int64)
        self._first_ids, self._end_ids = np.repeat(bounds, self.num_positions, axis=0).transpose(2, 1, 0)
        # Each position's OOV feature, MISSING feature, and dropout share.
        self._oov_ids = np.repeat([oov_id(ranges) for _, ranges in fields], self.num_positions)
        self._missing_ids = np.repeat([missing_id(ranges) for _, ranges in fields], self.num_positions)
        self._oov_dropout = np.repeat([shares.get(f.name, 0.0) for f, _ in fields], self.num_positions)
        # The fields that the text hides if they are dropped: their indices in the table, and among all fields.
        self._hidden = [i for i, (f, _) in enumerate(fields) if not f.show_oov and shares.get(f.name, 0.0)]
        self._hidden_places = [places[i] for i in self._hidden]
        self._hides = mode != "id" and bool(self._hidden)
        self._num_fields = len(processor.fields)
        self._vector_inputs = VectorInputs(processor.fields, processor.vectors)
        self._missing = np.array(processor.template.missing_tokens)

    @classmethod
    def from_model(
        cls,
        processor: Any,
        model: Any,
        oov_dropout: float | Mapping[str, float] = 0.0,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> Self:
        """Creates the collator for a model. Takes the mode and the text towers from the model's configuration.

        Args:
            processor: as in the constructor.
            model: a `FlipForCTR`, or PEFT's wrapper around one.
            oov_dropout: as in the constructor.
            seed: as in the constructor.
            pad_to_multiple_of: as in the constructor.

        Raises:
            ValueError: the processor's fields differ from the model's.
        """
        check_fields(processor.fields, model.config.fields)
        return cls(
            processor, model.config.mode, oov_dropout, seed, pad_to_multiple_of, text_towers=model.config.text_towers
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines which features the next batches drop."""
        self.epoch = epoch

    @property
    def columns(self) -> list[str]:
        """The columns of the encoded rows that the collator reads."""
        views = ["input_ids", "attention_mask"] if self.mode != "id" else []
        views += ["token_field_ids"] if self.towers is not None or self._hides else []
        views += ["feature_ids"] if self.mode != "text" or self._hides else []
        return [*views, *(self.vector_columns if self.mode != "text" else []), "row", "label", TEACHER_COLUMN]

    @property
    def vector_columns(self) -> list[str]:
        """The columns of the encoded rows that hold vectors or their keys."""
        return self._vector_inputs.columns

    @property
    def needed_columns(self) -> list[str]:
        """The columns without which the collator can't make a batch; a subset of `columns`."""
        optional = {"attention_mask", "label", TEACHER_COLUMN} | (set() if self.reads_numbers else {"row"})
        return [name for name in self.columns if name not in optional]

    @property
    def reads_numbers(self) -> bool:
        """Whether batches depend on the row numbers."""
        return bool(self._oov_dropout.any()) and (self.mode != "text" or self._hides)

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch = self.views(rows)
        has_teacher = has_column(rows, TEACHER_COLUMN)
        if has_column(rows, "label"):
            read = labels_or_ignored if has_teacher else canonical_labels
            batch["labels"] = torch.from_numpy(read(arrow_column(rows, "label"), "label"))
        if has_teacher:
            batch["teacher_logits"] = torch.from_numpy(teacher_logits(rows))
        return batch

    def views(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Makes a batch without labels and teacher logits."""
        check_rows(rows, self)
        batch: dict[str, torch.Tensor] = {}
        hidden = None
        if self.mode != "text" or self._hides:
            feature_ids = self.feature_ids(rows)
            if self.reads_numbers:
                numbers = row_numbers(rows)
                refuse_shared_numbers(numbers, lambda places: [feature_ids[places]])
                dropped = self._dropped(feature_ids, numbers)
                hidden = self._fields_to_hide(feature_ids, dropped) if self._hides else None
                feature_ids = np.where(dropped, self._oov_ids, feature_ids)
            if self.mode != "text":
                batch["feature_ids"] = torch.from_numpy(feature_ids)
                batch |= self._vector_inputs(rows)
        if self.mode != "id":
            texts, towers = self._texts(rows, hidden), self.towers
            padded = texts.padded(self.pad_token_id, self.pad_to_multiple_of)
            for name, values in (("input_ids", padded), ("attention_mask", texts.mask(padded.shape[1]))):
                tensor = torch.from_numpy(values.astype(np.int64, copy=False))
                batch[name] = tensor if towers is None else tensor.unflatten(0, (-1, len(towers)))
        return batch

    def feature_ids(self, rows: Rows) -> np.ndarray:
        """Returns the rows' feature ids, int64 (rows, positions).

        Raises:
            ValueError: a row has the wrong number of positions, or a position holds a feature of another field. This
                does not detect rows of another processor whose ids all belong to the right fields.
        """
        lists = ragged_column(rows, "feature_ids")
        width = int(self.num_positions.sum())
        advice = "another processor encoded the rows; encode them with this collator's processor.encode_dataset"
        if (lists.lengths != width).any():
            row = int((lists.lengths != width).argmax())
            raise ValueError(
                f"row {row} of the batch has {lists.lengths[row]} feature_ids, but the fields of the collator's "
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
                f"row {row} of the batch holds feature id {feature_ids[row, position]} at a position of field "
                f"{field!r}, which has no such feature: {advice}"
            )
        return feature_ids

    def _dropped(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Draws the features to replace, bool (rows, positions)."""
        draws = uniform(self.seed, self.epoch, numbers, _OOV_STREAM, feature_ids.shape[1])
        # A missing value is known to be missing, so it is never replaced by OOV.
        droppable = (feature_ids != PADDING_ID) & (feature_ids != self._missing_ids)
        result: np.ndarray = droppable & (draws < self._oov_dropout)
        return result

    def _fields_to_hide(self, feature_ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Returns the fields to hide in the text, bool (rows, fields + 1); the last column stands for no field."""
        left = np.logical_or.reduceat((feature_ids != PADDING_ID) & ~dropped, self.first_positions, axis=1)
        result = np.zeros((len(feature_ids), self._num_fields + 1), dtype=bool)
        result[:, self._hidden_places] = ~left[:, self._hidden]
        return result

    def _texts(self, rows: Rows, hidden: np.ndarray | None) -> Ragged:
        texts = unpadded_texts(rows)
        if hidden is None and self.towers is None:
            return texts
        fields = fields_of_tokens(rows, texts)
        if hidden is not None:
            texts, fields = self._without(hidden, texts, fields)
        if self.towers is None:
            return texts
        tower_of_name = {name: i for i, group in enumerate(self.towers.values()) for name in group}
        # A vector field has no tokens, so its tower is never looked up.
        tower_of_field = np.array([tower_of_name.get(field.name, 0) for field in self.fields])
        return _cut(texts, fields.values, tower_of_field, len(self.towers))

    def _without(self, hidden: np.ndarray, texts: Ragged, fields: Ragged) -> tuple[Ragged, Ragged]:
        """Replaces hidden values by "missing". Returns the texts and the fields of their tokens."""
        row_of_token = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
        is_hidden = hidden[row_of_token, fields.values]
        # Each token's offset within its value; constant tokens separate the values.
        order = np.arange(len(fields.values))
        within = order - np.maximum.accumulate(np.where(np.diff(fields.values, prepend=NO_FIELD) != 0, order, 0))
        # A text may not grow beyond the encoder's maximum length, so "missing" is cut to the length of the value.
        says_missing = is_hidden & (within < len(self._missing))
        values = texts.values.copy()
        values[says_missing] = self._missing[within[says_missing]]
        kept = ~is_hidden | says_missing
        lengths = np.bincount(row_of_token[kept], minlength=len(texts.lengths))
        return Ragged(values[kept], lengths), Ragged(fields.values[kept], lengths)


class FlipPretrainingCollator:
    """Batches encoded rows for `FlipForPreTraining`, with fields masked in both views.

    Masks in the text and in the table are drawn independently. In the text, the mask token replaces all value tokens of
    a masked field and no other tokens; with `text_mask_unit="token"` it replaces single tokens. Masks depend only on
    the seed, the epoch and the row number (`data.masking`), so they stay the same when a run is resumed or resharded.

    Args:
        processor: the processor that encoded the rows; its tokenizer must have a mask token.
        seed: the run's seed.
        text_mask_ratio: share of the fields masked in the text, in (0, 1]; at least one field is masked.
        tabular_mask_ratio: share of the fields masked in the table, in (0, 1]; at least one field is masked.
        text_mask_unit: "field", or "token". With "token", `text_mask_ratio` is the share of all value tokens, whatever
            their fields; at least one token is masked.
        pad_to_multiple_of: the batch length is the longest row's, rounded up to a multiple of this. Default:
            `flip_hf.data.ragged.padding_multiple()`, which is 8 with an accelerator and 2 without.

    Returns (when called with encoded rows, a list or an Arrow table of them):
        feature_ids, masked_feature_ids int64 (B, P); mtm_labels int64 (B, F), F being the number of fields with
        features; input_ids, attention_mask, masked_input_ids and mlm_labels int64 (B, T). Labels are -100 where nothing
        is masked. If a masked field has several features, all are masked. One, drawn like the masks, is the label.

    Raises (when called):
        ValueError: as in `FlipCTRCollator` with `oov_dropout`, because rows that share a number would get equal masks.
    """

    model_class: ClassVar[str] = "FlipForPreTraining"
    mode: ClassVar[str] = "joint"
    towers: ClassVar[None] = None
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
            raise ValueError(f"text_mask_unit={text_mask_unit!r} must be 'field' or 'token'")
        for name, ratio in (("text_mask_ratio", text_mask_ratio), ("tabular_mask_ratio", tabular_mask_ratio)):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name}={ratio} must be in (0, 1]")
        if processor.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; MLM needs a text encoder that was trained with one")
        self.mask_token_id: int = processor.tokenizer.mask_token_id
        self.plain = FlipCTRCollator(processor, pad_to_multiple_of=pad_to_multiple_of)
        self.num_fields = len(processor.fields)
        # A vector has no text, and its single feature leaves nothing to predict.
        self._in_text = np.array([f.traits.has_text for f in processor.fields])
        self._in_table = np.array([not f.traits.is_vector for f in tabular_fields(processor.fields)])
        if not self._in_table.any():
            raise ValueError(
                "pretraining masks fields of the table, but these are all vectors; add one of another kind"
            )
        num_positions = self.plain.num_positions
        self._position_fields = np.repeat(np.arange(len(num_positions)), num_positions)
        self.seed = seed
        self.text_mask_ratio = text_mask_ratio
        self.tabular_mask_ratio = tabular_mask_ratio
        self.text_mask_unit = text_mask_unit
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the masks of the next batches."""
        self.epoch = epoch

    @property
    def columns(self) -> list[str]:
        """The columns of the encoded rows that the collator reads."""
        return [*self.needed_columns, "attention_mask"]

    @property
    def needed_columns(self) -> list[str]:
        """The columns without which the collator can't make a batch; a subset of `columns`."""
        return ["row", "feature_ids", "input_ids", "token_field_ids", *self.plain.vector_columns]

    @property
    def fields(self) -> list[FieldConfig]:
        """The processor's fields."""
        return self.plain.fields

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        check_rows(rows, self)
        batch = self.plain.views(rows)
        feature_ids, input_ids = batch["feature_ids"].numpy(), batch["input_ids"].numpy()
        numbers = row_numbers(rows)
        refuse_shared_numbers(numbers, lambda places: [feature_ids[places], input_ids[places]])

        in_table = self._masked(numbers, self._in_table, self.tabular_mask_ratio, _TABULAR_STREAM)
        masked_ids = np.where(in_table[:, self._position_fields], PADDING_ID, feature_ids)
        masked_ids[:, self.plain.first_positions] = np.where(
            in_table, MASK_ID, feature_ids[:, self.plain.first_positions]
        )
        batch["masked_feature_ids"] = torch.from_numpy(masked_ids)
        targets = np.take_along_axis(feature_ids, self._target_positions(feature_ids, numbers), axis=1)
        batch["mtm_labels"] = torch.from_numpy(np.where(in_table, targets, IGNORED_LABEL))

        token_fields = fields_of_tokens(rows, unpadded_texts(rows))
        token_field_ids = token_fields.padded(NO_FIELD, self.plain.pad_to_multiple_of)
        if self.text_mask_unit == "field":
            in_text = self._masked(numbers, self._in_text, self.text_mask_ratio, _TEXT_STREAM)
            # Tokens outside values look up the last column, which is never masked.
            lookup = np.concatenate([in_text, np.zeros((len(numbers), 1), dtype=bool)], axis=1)
            masked = np.take_along_axis(lookup, token_field_ids % (self.num_fields + 1), axis=1)
        else:
            draws = uniform(self.seed, self.epoch, numbers, _TEXT_STREAM, token_field_ids.shape[1])
            draws[token_field_ids == NO_FIELD] = np.inf
            masked = draws <= np.maximum(draws.min(axis=1, keepdims=True), self.text_mask_ratio)
        batch["masked_input_ids"] = torch.from_numpy(np.where(masked, self.mask_token_id, input_ids))
        batch["mlm_labels"] = torch.from_numpy(np.where(masked, input_ids, IGNORED_LABEL))
        return batch

    def _masked(self, numbers: np.ndarray, maskable: np.ndarray, ratio: float, stream: int) -> np.ndarray:
        """Draws the masked fields, bool (rows, fields). `maskable`, bool (fields,), says which fields can be masked."""
        masked = np.zeros((len(numbers), len(maskable)), dtype=bool)
        masked[:, maskable] = masked_fields(self.seed, self.epoch, numbers, int(maskable.sum()), ratio, stream)
        return masked

    def _target_positions(self, feature_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Draws, for each field, the position of the feature to recover if it is masked, int64 (rows, fields)."""
        present = np.add.reduceat(feature_ids != PADDING_ID, self.plain.first_positions, axis=1)
        draws = uniform(self.seed, self.epoch, numbers, _TARGET_STREAM, len(self.plain.first_positions))
        positions: np.ndarray = self.plain.first_positions + (draws * present).astype(np.int64)
        return positions


def _cut(texts: Ragged, field_ids: np.ndarray, tower_of_field: np.ndarray, num_towers: int) -> Ragged:
    """Cuts each text into the parts that the towers read; each row becomes `num_towers` texts."""
    # Fields come in order and each has a token. A part ends after its last value; the last part ends with the row.
    of_values = np.flatnonzero(field_ids != NO_FIELD)
    row_of_token = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
    parts = row_of_token[of_values] * num_towers + tower_of_field[field_ids[of_values]]  # ascending
    lasts = np.searchsorted(parts, np.arange(len(texts.lengths) * num_towers), side="right") - 1
    ends = of_values[lasts] + 1
    ends[num_towers - 1 :: num_towers] = texts.lengths.cumsum()
    return Ragged(texts.values, np.diff(ends, prepend=0))


def _with_ranges(fields: Sequence[FieldConfig]) -> Iterator[tuple[FieldConfig, list[tuple[int, int]]]]:
    return zip(tabular_fields(fields), feature_ranges(fields), strict=True)
