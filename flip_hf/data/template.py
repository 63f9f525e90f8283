"""The textual view: rows as sentences, assembled from token segments that were tokenised once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flip_hf.data.kinds import FieldValues
from flip_hf.data.ragged import Ragged, concatenated_ranges
from flip_hf.data.segments import Segments, ValueTokenizer
from flip_hf.fields import FieldConfig

NO_FIELD = -1
"""`token_field_ids` of tokens that are not part of a value."""
# Segments kept before the cache starts afresh: a million short ones are some 40 MB, and 150 MB where only their strings
# tell them apart.
_MAX_SEGMENTS = 1 << 24
_MAX_STRINGS = 1 << 21


@dataclass(frozen=True)
class AssembledText:
    """The tokens of some rows, one after the other.

    Attributes:
        input_ids: int32 (tokens,), special tokens included.
        token_field_ids: int16 (tokens,), the field's place on tokens of its value, `NO_FIELD` elsewhere.
        offsets: int64 (rows + 1,), where each row starts and ends.
        truncated: bool (rows, fields), whose value lost tokens.
    """

    input_ids: np.ndarray
    token_field_ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray


class TextTemplate:
    """Writes `user id is 196 . genre is Comedy .` without tokenising sentences.

    The sentence of a row is cut at its spaces into constant pieces (`user id is`, ` . genre is`, ` .`) and one segment
    for each value. Tokenizers that never merge across a space (WordPiece, byte-level BPE, SentencePiece) give the
    pieces the same tokens as the sentence, so a segment is tokenised once, kept, and copied from then on. The full
    stop stands apart because a byte-level BPE would merge it with the value's last punctuation mark, and so do the
    commas between the values of a field that shows several.

    The text shows each value as it is. Special tokens that a value spells out are tokenised as plain characters. Runs
    of white space in a value become one space.

    Args:
        tokenizer: a fast transformers tokenizer.
        fields: the fields in the order of the sentence, vectors too, which the text leaves out.
        max_length: most tokens of a row. Where a row has more, its longest values are cut first, and every field
            keeps at least one token.

    Raises:
        ValueError: `max_length` does not leave one token for each field.
    """

    def __init__(self, tokenizer: Any, fields: Sequence[FieldConfig], max_length: int) -> None:
        self.tokenizer = tokenizer
        self._values = ValueTokenizer(tokenizer)
        self.fields = list(fields)
        self.max_length = max_length
        # The places of the fields that the text shows.
        self._shown = np.array([i for i, f in enumerate(self.fields) if f.traits.has_text])
        names = [self.fields[i].display_name for i in self._shown]
        self._constants = [f"{names[0]} is", *(f" . {name} is" for name in names[1:]), " ."]
        self._max_tokens = np.array([self.fields[i].max_tokens for i in self._shown])
        self._segments = self._fresh_segments()
        self._num_constant_tokens = int(self._segments.lengths(self._constant_segments).sum())
        self._budget = max_length - self._num_constant_tokens
        if self._budget < len(self._shown):
            raise ValueError(
                f"max_length={max_length} leaves no room for {len(self._shown)} values beside "
                f"{self._num_constant_tokens} tokens of template; raise max_length or shorten the fields' text_name"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "fields": self.fields, "max_length": self.max_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def missing_tokens(self) -> list[int]:
        """What a value that is missing shows."""
        return self._values.missing_tokens

    def sentence(self, values: Sequence[str | list[str] | None]) -> str:
        """The text of one row, before it is cut to length: for each field a value, None where missing, or several."""
        several: list[list[Any]] = [(v or [None]) if isinstance(v, list) else [v] for v in values]
        shown = [" ,".join(map(self._values.text, vs)) for vs in several]
        pieces = [text for constant, value in zip(self._constants, shown, strict=False) for text in (constant, value)]
        return "".join([*pieces, self._constants[-1]])

    def assemble(self, columns: Sequence[FieldValues]) -> AssembledText:
        """The tokens of rows given as one column of values for each field that has text, in the order in which they
        are shown."""
        # Another thread may go on with those that this one gives up.
        kept = self._segments
        if len(kept) > _MAX_SEGMENTS or kept.num_strings > _MAX_STRINGS:
            kept = self._segments = self._fresh_segments()
        num_rows, num_shown = len(columns[0]), len(self._shown)
        segments = [kept.of(column) for column in columns]
        # What a field shows of several values is put together behind the segments that are kept.
        pools, starts, full = [kept.tokens], [], []
        for column, own in zip(columns, segments, strict=True):
            if column.offsets is None:
                starts.append(kept.bounds(own)[0])
                full.append(kept.lengths(own))
            else:
                tokens, bounds = self._join(kept, own, column.offsets)
                starts.append(sum(map(len, pools)) + bounds[:-1])
                full.append(np.diff(bounds))
                pools.append(tokens)
        full_lengths = np.stack(full, axis=1)  # (rows, fields)
        lengths = self._fit(np.minimum(full_lengths, self._max_tokens))

        # Constants and values take turns: constant, value, constant, ..., value, constant.
        piece_lengths = np.empty((num_rows, 2 * num_shown + 1), dtype=np.int64)
        piece_lengths[:, 0::2], piece_lengths[:, 1::2] = kept.lengths(self._constant_segments), lengths
        flat_lengths = piece_lengths.ravel()
        # Most of the time goes into moving the places of tokens, so they are as small as they can be.
        largest = max(sum(map(len, pools)), flat_lengths.sum())
        piece_starts = np.empty(piece_lengths.shape, dtype=np.int32 if largest < 2**31 else np.int64)
        piece_starts[:, 0::2], piece_starts[:, 1::2] = (
            kept.bounds(self._constant_segments)[0],
            np.stack(starts, axis=1),
        )

        gather = concatenated_ranges(piece_starts.ravel(), flat_lengths)
        piece_fields = np.full(2 * num_shown + 1, NO_FIELD, dtype=np.int16)
        piece_fields[1::2] = self._shown
        truncated = np.zeros((num_rows, len(self.fields)), dtype=bool)
        truncated[:, self._shown] = lengths < full_lengths
        offsets = np.concatenate([[0], piece_lengths.sum(axis=1).cumsum()])
        return AssembledText(
            input_ids=(np.concatenate(pools) if len(pools) > 1 else pools[0])[gather],
            token_field_ids=np.repeat(np.tile(piece_fields, num_rows), flat_lengths),
            offsets=offsets,
            truncated=truncated,
        )

    def _join(self, kept: Segments, segments: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's segments with commas between them.

        Args:
            kept: all segments.
            segments: int64 (values,).
            offsets: int64 (rows + 1,), where each row's values begin and end; a row without any shows that it is
                missing.

        Returns:
            int32 (tokens,), and where each row's begin and end, int64 (rows + 1,).
        """
        counts = np.diff(offsets)
        num_pieces = np.where(counts > 0, 2 * counts - 1, 1)
        piece_bounds = np.concatenate([[0], num_pieces.cumsum()])
        pieces = np.full(piece_bounds[-1], self._comma)
        pieces[piece_bounds[:-1][counts == 0]] = self._missing
        own_pieces = concatenated_ranges(np.zeros_like(counts), counts)
        pieces[np.repeat(piece_bounds[:-1], counts) + 2 * own_pieces] = segments
        lengths = kept.lengths(pieces)
        tokens = kept.tokens[concatenated_ranges(kept.bounds(pieces)[0], lengths)]
        return tokens, np.concatenate([[0], lengths.cumsum()])[piece_bounds]

    def _fresh_segments(self) -> Segments:
        """Segments that hold what the template itself is made of."""
        segments = Segments(self._values.tokens)
        head, tail = self._special_tokens()
        constants = self._values.tokenize(self._constants)
        constants[0], constants[-1] = head + constants[0], constants[-1] + tail
        # The first ones, so these numbers are the same each time.
        self._constant_segments = segments.store(Ragged.of(constants))
        self._comma, self._missing = segments.store(Ragged.of([*self._values.tokenize([" ,"]), self.missing_tokens]))
        return segments

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a sentence."""
        plain = self._values.tokenize(["a"])[0]
        framed = self.tokenizer("a", return_attention_mask=False)["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return framed[:start], framed[start + len(plain) :]

    def _fit(self, lengths: np.ndarray) -> np.ndarray:
        """Cuts the longest values of rows that exceed the budget, int64 (rows, fields) -> the same.

        Each such row has one limit that its values share; tokens that the limit leaves over go to the first of those
        that were cut.
        """
        too_long = lengths.sum(axis=1) > self._budget
        if not too_long.any():
            return lengths
        long = lengths[too_long]
        ascending = np.sort(long, axis=1)
        before = np.concatenate([np.zeros((len(long), 1), dtype=np.int64), ascending.cumsum(axis=1)[:, :-1]], axis=1)
        # If all values from this one on shared what the shorter ones leave.
        shares = (self._budget - before) // np.arange(long.shape[1], 0, -1)
        first_cut = (ascending > shares).argmax(axis=1)
        limits = shares[np.arange(len(long)), first_cut, None]
        cut = long > limits
        fitted = np.where(cut, limits, long)
        left_over = self._budget - fitted.sum(axis=1, keepdims=True)
        fitted += cut & (cut.cumsum(axis=1) <= left_over)
        result = lengths.copy()
        result[too_long] = fitted
        return result
