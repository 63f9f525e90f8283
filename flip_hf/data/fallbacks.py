"""Counts fallbacks per field, and detects rows that are read differently from the training rows."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pyarrow as pa

from flip_hf.data.kinds import KINDS
from flip_hf.data.schema import Fallback
from flip_hf.data.vocabulary import FeatureVocabulary
from flip_hf.fields import PADDING_ID, FieldConfig, feature_ranges, missing_id, oov_id, printable

logger = logging.getLogger(__name__)

# A field's share of unseen or missing values is suspicious if it exceeds the share in fitting by this much. The values
# are then probably read differently, or the rows are of another kind.
_SUSPICIOUS_SHARE = 0.3
# With fewer rows, shares are not informative.
_FEWEST_ROWS = 10


class FallbackReport:
    """Counts fallbacks over batches of encoded rows, and compares them with the counts of fitting.

    Args:
        vocabulary: the processor's vocabulary.

    Attributes:
        counts: number of fallbacks, by field name and fallback name.
        num_rows: number of rows counted.
    """

    def __init__(self, vocabulary: FeatureVocabulary) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.num_rows = 0
        self._vocabulary = vocabulary
        self._places = [i for i, f in enumerate(vocabulary.fields) if f.traits.has_features]
        fields = [vocabulary.fields[i] for i in self._places]
        ranges = feature_ranges(vocabulary.fields)
        # Rows: OOV and MISSING. Columns: fields.
        reserved_ids = np.array([[reserved(own) for own in ranges] for reserved in _RESERVED])
        positions = np.array([f.num_positions for f in fields], dtype=np.int64)
        self._first_positions = positions.cumsum() - positions
        self._position_ids = np.repeat(reserved_ids, positions, axis=1)
        fitted = vocabulary.counts
        totals = np.array([sum(fitted[first:end].sum() for first, end in own) for own in ranges])
        self._fitted_shares = fitted[reserved_ids] / np.maximum(totals, 1)
        self._num_values = np.zeros(len(fields), dtype=np.int64)
        self._numbers = np.zeros((len(_RESERVED), len(fields)), dtype=np.int64)
        self._examples: dict[int, str] = {}
        self._warned: set[tuple[int, int]] = set()

    def add(self, encoded: pa.Table, raw: Callable[[int, int], pa.Table], first_row: int = 0) -> None:
        """Counts a batch of rows.

        Args:
            encoded: the output of `FlipProcessor.encode`.
            raw: `raw(start, length)` returns raw rows, like `pyarrow.Table.slice`.
            first_row: the row of `raw` at which the batch starts.
        """
        for name, numbers in count_fallbacks(encoded, self._vocabulary.fields).items():
            self.counts.setdefault(name, Counter()).update(numbers)
        self.num_rows += len(encoded)
        if not len(encoded):
            return
        ids = np.concatenate([chunk.flatten().to_numpy() for chunk in encoded["feature_ids"].chunks])
        ids = ids.reshape(len(encoded), -1)
        self._num_values += self._by_field(ids != PADDING_ID)
        unseen, missing = (ids == of_kind for of_kind in self._position_ids)
        self._numbers += [self._by_field(unseen), self._by_field(missing)]
        for i in np.flatnonzero(np.add.reduceat(unseen, self._first_positions, axis=1).any(axis=0)).tolist():
            if i not in self._examples:
                end = self._first_positions[i] + self._vocabulary.fields[self._places[i]].num_positions
                row = int(unseen[:, self._first_positions[i] : end].any(axis=1).argmax())
                self._examples[i] = self._unseen_value(self._places[i], raw(first_row + row, 1))

    def counted(self) -> str:
        """Formats the counts on one line."""
        fields = (
            f"{name} {', '.join(f'{number} {kind}' for kind, number in c.items())}" for name, c in self.counts.items()
        )
        return printable("; ".join(fields))

    def _by_field(self, marks: np.ndarray) -> np.ndarray:
        numbers: np.ndarray = np.add.reduceat(marks.sum(axis=0), self._first_positions)
        return numbers

    def _unseen_value(self, field: int, row: pa.Table) -> str:
        config = self._vocabulary.fields[field]
        values = KINDS[config.kind].read(row[config.name], config, 0, None)
        is_unseen = self._vocabulary.keys(field, self._vocabulary.lookup(field, values)) == -1
        value: str = values.strings.filter(pa.array(is_unseen))[0].as_py()
        return value

    def warn(self, where: str) -> None:
        """Logs each message of `warnings`."""
        for message in self.warnings(where):
            logger.warning("%s", message)

    def warnings(self, where: str) -> list[str]:
        """Describes the fields that are unseen or missing in far more rows than in fitting. Reports each field once.

        Args:
            where: name of the rows for the message, such as `"validation.csv"`.
        """
        if self.num_rows < _FEWEST_ROWS:
            return []
        shares = self._numbers / np.maximum(self._num_values, 1)
        found = []
        for kind, i in np.argwhere(shares - self._fitted_shares >= _SUSPICIOUS_SHARE).tolist():
            if (kind, i) in self._warned:
                continue
            self._warned.add((kind, i))
            field = self._vocabulary.fields[self._places[i]]
            what = "values" if field.traits.is_bag else "rows"
            then, now = self._fitted_shares[kind, i], shares[kind, i]
            if _RESERVED[kind] is oov_id:
                values = self._vocabulary.valued(self._vocabulary.owner(self._places[i]))[1]
                seen = f"seen in training: {values[0].as_py()!r}" if len(values) else "no value was kept in training"
                message = f"unseen ({then:.0%} in training); {seen}; here: {self._examples[i]!r}"
            else:
                message = f"missing ({then:.0%} in training)"
            found.append(f"{where}, field {field.name!r}: {now:.0%} of the {what} {message}")
        return found


_RESERVED = (oov_id, missing_id)


def count_fallbacks(encoded: datasets.Dataset | pa.Table, fields: Sequence[FieldConfig]) -> dict[str, dict[str, int]]:
    """Counts fallbacks by field name and fallback name. Fields and fallbacks with a count of 0 are left out.

    Args:
        encoded: the output of `FlipProcessor.encode` or `encode_dataset`.
        fields: the processor's fields.
    """
    table = encoded.with_format("arrow")[:] if isinstance(encoded, datasets.Dataset) else encoded
    counts: dict[str, dict[str, int]] = {}
    for chunk in table["fallbacks"].chunks:
        flags = chunk.flatten().to_numpy().reshape(-1, len(fields))
        for i in flags.any(axis=0).nonzero()[0].tolist():
            field = fields[i]
            for kind in Fallback:
                if number := int(np.count_nonzero(flags[:, i] & kind)):
                    of_field = counts.setdefault(field.name, {})
                    of_field[str(kind.name).lower()] = of_field.get(str(kind.name).lower(), 0) + number
    return counts
