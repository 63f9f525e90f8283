"""The textual view: rows as sentences, assembled from token segments that were tokenised once."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from flip_hf.configuration_flip import FieldConfig
from flip_hf.data.kinds import FieldValues
from flip_hf.data.ragged import places

NO_FIELD = -1
"""`token_field_ids` of tokens that are not part of a value."""
MISSING_TEXT = "missing"
"""What the text shows for a value that is missing."""
# Segments kept before the cache starts afresh: a million short ones are some 150 MB.
_MAX_SEGMENTS = 1 << 22


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

    The text shows the value as it is, also where its feature is OOV. Special tokens that a value spells out are
    tokenised as plain characters. Runs of white space in a value become one space.

    Args:
        tokenizer: a fast transformers tokenizer.
        fields: the fields in the order of the sentence.
        max_length: most tokens of a row. Where a row has more, its longest values are cut first, and every field
            keeps at least one token.

    Raises:
        ValueError: `max_length` does not leave one token for each field.
    """

    def __init__(self, tokenizer: Any, fields: Sequence[FieldConfig], max_length: int) -> None:
        self.tokenizer = tokenizer
        # What transformers would call, without what it makes of each text beside the tokens: a third of the time.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # As `split_special_tokens`.
        self._backend.encode_special_tokens = True
        self.fields = list(fields)
        self.max_length = max_length
        names = [f.display_name for f in self.fields]
        self._constants = [f"{names[0]} is", *(f" . {name} is" for name in names[1:]), " ."]
        self._max_tokens = np.array([f.max_tokens for f in self.fields])
        # The unknown token is special too, but a value may well be unknown.
        self._control_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._control_spellings = sorted(set(tokenizer.all_special_tokens) - {tokenizer.unk_token}, key=len)
        self._reset()
        self._num_constant_tokens = int(self._lengths(self._constant_segments).sum())
        self._budget = max_length - self._num_constant_tokens
        if self._budget < len(self.fields):
            raise ValueError(
                f"max_length={max_length} leaves no room for {len(self.fields)} values beside "
                f"{self._num_constant_tokens} tokens of template; raise max_length or shorten the fields' text_name"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "fields": self.fields, "max_length": self.max_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def sentence(self, values: Sequence[str | list[str] | None]) -> str:
        """The text of one row, before it is cut to length: for each field a value, None where missing, or several."""
        several: list[list[Any]] = [(v or [None]) if isinstance(v, list) else [v] for v in values]
        shown = [" ,".join(text for text, _ in self._show([_one_line(v) for v in vs])) for vs in several]
        pieces = [text for constant, value in zip(self._constants, shown, strict=False) for text in (constant, value)]
        return "".join([*pieces, self._constants[-1]])

    def assemble(self, columns: Sequence[FieldValues]) -> AssembledText:
        """The tokens of rows given as one column of values a field, in the order in which they are shown."""
        if len(self._starts) > _MAX_SEGMENTS:
            self._reset()
        num_rows, num_fields = len(columns[0]), len(self.fields)
        segments = [self._segments_of(column.strings) for column in columns]
        # What a field shows of several values is put together behind the segments that are kept.
        pools, starts, full = [np.frombuffer(self._tokens, dtype=np.int32)], [], []
        for column, own in zip(columns, segments, strict=True):
            if column.offsets is None:
                starts.append(self._bounds(own)[0])
                full.append(self._lengths(own))
            else:
                tokens, bounds = self._join(own, column.offsets)
                starts.append(sum(map(len, pools)) + bounds[:-1])
                full.append(np.diff(bounds))
                pools.append(tokens)
        full_lengths = np.stack(full, axis=1)  # (rows, fields)
        lengths = self._fit(np.minimum(full_lengths, self._max_tokens))

        # Constants and values take turns: constant, value, constant, ..., value, constant.
        piece_starts = np.empty((num_rows, 2 * num_fields + 1), dtype=np.int64)
        piece_starts[:, 0::2], piece_starts[:, 1::2] = (
            self._bounds(self._constant_segments)[0],
            np.stack(starts, axis=1),
        )
        piece_lengths = np.empty_like(piece_starts)
        piece_lengths[:, 0::2], piece_lengths[:, 1::2] = self._lengths(self._constant_segments), lengths

        flat_lengths = piece_lengths.ravel()
        gather = places(piece_starts.ravel(), flat_lengths)
        piece_fields = np.full(2 * num_fields + 1, NO_FIELD, dtype=np.int16)
        piece_fields[1::2] = np.arange(num_fields)
        offsets = np.concatenate([[0], piece_lengths.sum(axis=1).cumsum()])
        return AssembledText(
            input_ids=(np.concatenate(pools) if len(pools) > 1 else pools[0])[gather],
            token_field_ids=np.repeat(np.tile(piece_fields, num_rows), flat_lengths),
            offsets=offsets,
            truncated=lengths < full_lengths,
        )

    def _join(self, segments: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's segments with commas between them.

        Args:
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
        own_pieces = places(np.zeros_like(counts), counts)
        pieces[np.repeat(piece_bounds[:-1], counts) + 2 * own_pieces] = segments
        lengths = self._lengths(pieces)
        tokens = np.frombuffer(self._tokens, dtype=np.int32)[places(self._bounds(pieces)[0], lengths)]
        return tokens, np.concatenate([[0], lengths.cumsum()])[piece_bounds]

    def _reset(self) -> None:
        self._ids: dict[str | None, int] = {}
        self._tokens, self._starts, self._ends = array("i"), array("q"), array("q")
        head, tail = self._special_tokens()
        constants = self._tokenize(self._constants)
        constants[0], constants[-1] = head + constants[0], constants[-1] + tail
        self._constant_segments = np.array([self._store(tokens) for tokens in constants])
        self._comma, self._missing = (self._store(tokens) for tokens in self._tokenize([" ,", f" {MISSING_TEXT}"]))

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a sentence."""
        plain = self._tokenize(["a"])[0]
        framed = self.tokenizer("a", return_attention_mask=False)["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return framed[:start], framed[start + len(plain) :]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _store(self, tokens: list[int]) -> int:
        self._starts.append(len(self._tokens))
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))
        return len(self._starts) - 1

    def _bounds(self, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where segments begin and end among all tokens."""
        starts, ends = np.frombuffer(self._starts, dtype=np.int64), np.frombuffer(self._ends, dtype=np.int64)
        return starts[segments], ends[segments]

    def _lengths(self, segments: np.ndarray) -> np.ndarray:
        starts, ends = self._bounds(segments)
        return ends - starts

    def _show(self, values: list[str]) -> list[tuple[str, list[int]]]:
        """The segment of each value, as text with its space in front and as tokens."""
        texts = [f" {value}" for value in values]
        result = list(zip(texts, self._tokenize(texts), strict=True))
        for i, (text, tokens) in enumerate(result):
            if not values[i] or not tokens:
                # Also a value of control characters alone, which leaves some tokenizers with nothing to show.
                text = f" {MISSING_TEXT}"
                result[i] = text, self._tokenize([text])[0]
            elif not self._control_ids.isdisjoint(tokens):
                # Some vocabularies hold the spelling of a special token as a plain piece, with the special token's id.
                for special in self._control_spellings:
                    text = text.replace(special, " ".join(special))
                result[i] = text, self._tokenize([text])[0]
        return result

    def _segments_of(self, column: pa.Array) -> np.ndarray:
        encoded = column.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        if encoded.null_count:
            texts.append(None)
        indices = pc.fill_null(encoded.indices, len(texts) - 1).to_numpy(zero_copy_only=False)
        found = [self._ids.get(text) for text in texts]
        if None in found:
            new = [text for text, segment in zip(texts, found, strict=True) if segment is None]
            for text, (_, tokens) in zip(new, self._show([_one_line(text) for text in new]), strict=True):
                self._ids[text] = self._store(tokens)
            found = [self._ids[text] for text in texts]
        segments: np.ndarray = np.array(found, dtype=np.int64)[indices]
        return segments

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


def _one_line(value: str | None) -> str:
    """A value with runs of white space made one space; empty where missing."""
    return " ".join((value or "").split())
