"""Tokenises pieces of text and caches their tokens."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from flip_hf.data.kinds import FieldValues
from flip_hf.data.ragged import Growing, Ragged

MISSING_TEXT = "missing"
"""The text shown for a missing value."""
# With more texts at a time, the tokenizer's output would leave the CPU cache before it is read.
_TOKENIZED_AT_ONCE = 1024
_MAX_WORDS = 1 << 19
# The characters at which `str.split` splits.
_WHITE_SPACE = re.compile(r"\s")


class ValueTokenizer:
    """Tokenises values as they appear in a sentence: word by word, since tokenizers do not merge across a space.

    Threads may share it.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        # Calls the backend directly, because transformers' extra outputs per text take a third of the time.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # Same as `split_special_tokens`.
        self._backend.encode_special_tokens = True
        # The unknown token is special too, but a value may contain unknown words.
        self._control_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._control_spellings = sorted(set(tokenizer.all_special_tokens) - {tokenizer.unk_token}, key=len)
        # Only tokens added to the tokenizer by hand may contain white space.
        self._reads_words = not any(map(_WHITE_SPACE.search, tokenizer.get_added_vocab()))
        self.missing_tokens = self.tokenize([f" {MISSING_TEXT}"])[0]
        """The tokens shown for a missing value."""
        self._known: dict[str, list[int]] = {}

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenises each text unchanged."""
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def text(self, value: str | None) -> str:
        """Returns a value as the text shows it, with its leading space."""
        words = (value or "").split()
        words = words if self._reads_words else [" ".join(words)] * bool(words)
        spelled = [
            f" {word}" if self._control_ids.isdisjoint(tokens) else self._spelled_out(word)
            for word, tokens in zip(words, self.tokenize([f" {word}" for word in words]), strict=True)
            # Some tokenizers give no tokens for control characters.
            if tokens
        ]
        return "".join(spelled) or f" {MISSING_TEXT}"

    def tokens(self, values: Sequence[str | None]) -> Ragged:
        """Tokenises each value as the text shows it."""
        if len(self._known) > _MAX_WORDS:
            # Replaced, not cleared, because another thread may still use the old dict.
            self._known = {}
        known = self._known
        # Only words of longer texts are cached, because they repeat. Single-word values, such as ids, occur once.
        if not self._reads_words:
            values = [value and " ".join(value.split()) for value in values]
        is_alone = [bool(value and not (self._reads_words and _WHITE_SPACE.search(value))) for value in values]
        several = (value.split() for value, alone in zip(values, is_alone, strict=True) if value and not alone)
        new = list({word for words in several for word in words if word not in known})
        known.update(zip(new, self._read(new), strict=True))
        of_alone = self._read([value for value, alone in zip(values, is_alone, strict=True) if value and alone])
        # One flat list, because the garbage collector would scan one list per value.
        tokens: list[int] = []
        bounds = [0]
        for value, alone in zip(values, is_alone, strict=True):
            if alone:
                tokens += next(of_alone)
            elif value:
                for word in value.split():
                    tokens += known[word]
            if len(tokens) == bounds[-1]:
                tokens += self.missing_tokens
            bounds.append(len(tokens))
        return Ragged(np.array(tokens, dtype=np.int32), np.diff(bounds))

    def _read(self, words: list[str]) -> Iterator[list[int]]:
        """Yields the tokens of each word with a leading space."""
        encoded = self._backend.encode_batch_fast([f" {word}" for word in words], add_special_tokens=False)
        for word, own in zip(words, encoded, strict=True):
            tokens = own.ids
            yield tokens if self._control_ids.isdisjoint(tokens) else self.tokenize([self._spelled_out(word)])[0]

    def _spelled_out(self, word: str) -> str:
        # Some vocabularies contain the spelling of a special token as an ordinary piece with the special token's id.
        for special in self._control_spellings:
            word = word.replace(special, " ".join(special))
        return f" {word}"


class Segments:
    """Caches the tokens of values. Each value is tokenised when it first occurs. Threads may share it.

    Args:
        tokenize: tokenises a list of values, null where missing.
    """

    def __init__(self, tokenize: Callable[[list[str | None]], Ragged]) -> None:
        self._tokenize = tokenize
        # The tokens of segment i lie between bound i and bound i + 1.
        self._tokens, self._bounds = Growing(np.int32), Growing(np.int64)
        self._bounds.extend([0])
        self._of_keys = np.empty(0, dtype=np.int64)
        self._of_strings: dict[str | None, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def num_strings(self) -> int:
        """The number of segments that are looked up by their string alone."""
        return len(self._of_strings)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of all segments, int32 (tokens,)."""
        return self._tokens.values

    def bounds(self, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the segments start and end in `tokens`."""
        bounds = self._bounds.values
        return bounds[segments], bounds[segments + 1]

    def lengths(self, segments: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of each segment."""
        starts, ends = self.bounds(segments)
        return ends - starts

    def store(self, parts: Ragged) -> np.ndarray:
        """Stores tokens as new segments and returns the segment numbers, int64 (parts,)."""
        with self._lock:
            first, num_tokens = len(self), len(self._tokens)
            self._tokens.extend(parts.values)
            self._bounds.extend(num_tokens + parts.lengths.cumsum())
        return np.arange(first, first + len(parts.lengths))

    def of(self, values: FieldValues) -> np.ndarray:
        """Returns the segment number of each value, int64 (values,). Tokenises new values."""
        if values.keys is None:
            return self._of_texts(values.strings)
        segments = np.full(len(values.keys), -1)
        # A key outside `of_keys` is new, like a key without a segment.
        of_keys = self._of_keys
        is_known = (values.keys >= 0) & (values.keys < len(of_keys))
        segments[is_known] = of_keys[values.keys[is_known]]
        new = np.flatnonzero((segments < 0) & (values.keys >= 0))
        if len(new):
            keys, first, places = np.unique(values.keys[new], return_index=True, return_inverse=True)
            added = self._add(values.strings.take(pa.array(new[first])).to_pylist())
            self._note(keys, added)
            segments[new] = added[places]
        other = np.flatnonzero(values.keys < 0)
        if len(other):
            segments[other] = self._of_texts(values.strings.take(pa.array(other)))
        return segments

    def _note(self, keys: np.ndarray, segments: np.ndarray) -> None:
        with self._lock:
            if (lacking := int(keys[-1]) + 1 - len(self._of_keys)) > 0:
                self._of_keys = np.append(self._of_keys, np.full(max(lacking, len(self._of_keys)), -1))
            self._of_keys[keys] = segments

    def _of_texts(self, strings: pa.Array) -> np.ndarray:
        encoded = strings.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        if encoded.null_count:
            texts.append(None)
        indices = pc.fill_null(encoded.indices, len(texts) - 1).to_numpy(zero_copy_only=False)
        found = [self._of_strings.get(text) for text in texts]
        if None in found:
            new = [text for text, segment in zip(texts, found, strict=True) if segment is None]
            self._of_strings.update(zip(new, self._add(new).tolist(), strict=True))
            found = [self._of_strings[text] for text in texts]
        segments: np.ndarray = np.array(found, dtype=np.int64)[indices]
        return segments

    def _add(self, texts: list[str | None]) -> np.ndarray:
        parts = (texts[i : i + _TOKENIZED_AT_ONCE] for i in range(0, len(texts), _TOKENIZED_AT_ONCE))
        return np.concatenate([self.store(self._tokenize(part)) for part in parts])
