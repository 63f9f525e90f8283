"""Builds the textual view: rows as sentences, assembled from token segments that are tokenised once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flip_hf.data.kinds import FieldValues
from flip_hf.data.ragged import Ragged, concatenated_ranges
from flip_hf.data.segments import Segments, ValueTokenizer
from flip_hf.fields import FieldConfig

NO_FIELD = -1
"""The entry of `token_field_ids` for tokens that are not part of a value."""
# Number of segments and strings at which the cache is emptied. A million short segments take about 40 MB, or 150 MB if
# they are looked up by string.
_MAX_SEGMENTS = 1 << 24
_MAX_STRINGS = 1 << 21


@dataclass(frozen=True)
class AssembledText:
    """The tokens of a batch of rows, concatenated.

    Attributes:
        input_ids: int32 (tokens,), special tokens included.
        token_field_ids: int16 (tokens,), the index of the field for tokens of a value, `NO_FIELD` elsewhere.
        offsets: int64 (rows + 1,), where each row starts and ends.
        truncated: bool (rows, fields), true where the value lost tokens.
    """

    input_ids: np.ndarray
    token_field_ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray


class TextTemplate:
    """Writes `user id is 196 . genre is Comedy .` without tokenising whole sentences.

    A row's sentence consists of constant pieces (`user id is`, ` . genre is`, ` .`) and one segment per value, cut at
    spaces. Tokenizers that never merge across a space (WordPiece, byte-level BPE, SentencePiece) give the pieces the
    same tokens as the whole sentence. Each segment is therefore tokenised once, cached and copied. A space precedes the
    full stop, because a byte-level BPE would otherwise merge it with punctuation at the end of the value. The same
    holds for the commas between the values of a field with several.

    The text shows each value unchanged, with two exceptions. Special tokens spelled out in a value are tokenised as
    plain characters. Runs of white space become one space.

    Args:
        tokenizer: a fast transformers tokenizer.
        fields: the fields in the order of the sentence; vector fields are included, but not shown.
        max_length: maximum number of tokens per row. If a row has more, its longest values are cut first; every field
            keeps at least one token.

    Raises:
        ValueError: `max_length` does not leave one token for each field.
    """

    def __init__(self, tokenizer: Any, fields: Sequence[FieldConfig], max_length: int) -> None:
        self.tokenizer = tokenizer
        self._values = ValueTokenizer(tokenizer)
        self.fields = list(fields)
        self.max_length = max_length
        # Indices of the fields that the text shows.
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
                f"{self._num_constant_tokens} tokens of the template; raise max_length or shorten the fields' text_name"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "fields": self.fields, "max_length": self.max_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def missing_tokens(self) -> list[int]:
        """The tokens shown for a missing value."""
        return self._values.missing_tokens

    def sentence(self, values: Sequence[str | list[str] | None]) -> str:
        """Returns the text of one row before truncation. Each field has a value, a list of values or None (missing)."""
        several: list[list[Any]] = [(v or [None]) if isinstance(v, list) else [v] for v in values]
        shown = [" ,".join(map(self._values.text, vs)) for vs in several]
        pieces = [text for constant, value in zip(self._constants, shown, strict=False) for text in (constant, value)]
        return "".join([*pieces, self._constants[-1]])

    def assemble(self, columns: Sequence[FieldValues]) -> AssembledText:
        """Assembles the tokens of rows from the values of each field with text, in the order of the sentence."""
        # Keep a reference: another thread may still use the segments that this one replaces.
        kept = self._segments
        if len(kept) > _MAX_SEGMENTS or kept.num_strings > _MAX_STRINGS:
            kept = self._segments = self._fresh_segments()
        num_rows, num_shown = len(columns[0]), len(self._shown)
        segments = [kept.of(column) for column in columns]
        # Joined values of multi-valued fields are placed behind the cached segments.
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

        # Constants and values alternate: constant, value, constant, ..., value, constant.
        piece_lengths = np.empty((num_rows, 2 * num_shown + 1), dtype=np.int64)
        piece_lengths[:, 0::2], piece_lengths[:, 1::2] = kept.lengths(self._constant_segments), lengths
        flat_lengths = piece_lengths.ravel()
        # Moving the token indices takes most of the time, so use the smallest index type.
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
        """Joins each row's segments with commas.

        Args:
            kept: all segments.
            segments: int64 (values,), the segment of each value.
            offsets: int64 (rows + 1,), where each row's values start and end; a row without values shows the missing
                text.

        Returns:
            The tokens, int32 (tokens,), and the offsets at which each row's start and end, int64 (rows + 1,).
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
        """Returns new segments that hold the template's constant pieces."""
        segments = Segments(self._values.tokens)
        head, tail = self._special_tokens()
        constants = self._values.tokenize(self._constants)
        constants[0], constants[-1] = head + constants[0], constants[-1] + tail
        # Stored first, so their segment numbers are the same each time.
        self._constant_segments = segments.store(Ragged.of(constants))
        self._comma, self._missing = segments.store(Ragged.of([*self._values.tokenize([" ,"]), self.missing_tokens]))
        return segments

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Returns the tokens that the tokenizer puts before and after a sentence."""
        plain = self._values.tokenize(["a"])[0]
        framed = self.tokenizer("a", return_attention_mask=False)["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return framed[:start], framed[start + len(plain) :]

    def _fit(self, lengths: np.ndarray) -> np.ndarray:
        """Cuts the longest values of rows that exceed the budget, int64 (rows, fields) -> int64 (rows, fields).

        All values of such a row share one length limit. Tokens left over go to the first values that were cut.
        """
        too_long = lengths.sum(axis=1) > self._budget
        if not too_long.any():
            return lengths
        long = lengths[too_long]
        ascending = np.sort(long, axis=1)
        before = np.concatenate([np.zeros((len(long), 1), dtype=np.int64), ascending.cumsum(axis=1)[:, :-1]], axis=1)
        # The limit if this value and all longer ones shared the tokens that the shorter values leave.
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
