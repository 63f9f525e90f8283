"""The interface of dataset sources, so that examples, tests and model cards can use all of them in the same way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from flip_hf.fields import FieldConfig


@dataclass(frozen=True)
class HistoryField:
    """A user's history of items, which `flip_hf.data.splits.load_splits` can add.

    Attributes:
        field: the sequence field.
        user: name of the user column.
        item: name of the column that makes up the history.
        words: maps the label of a row to the text written before its item. Rows with other labels are not part of the
            history.
    """

    field: FieldConfig
    user: str
    item: str
    words: Mapping[int, str]


@dataclass(frozen=True)
class Months:
    """The rows of some calendar months (UTC), for `split: months`. This split has its own label rule.

    Attributes:
        load: like `DatasetSource.load`, with `timestamp`, but with this split's label rule. It may return rows of other
            months; the split ignores them.
        starts: the first month of the training, validation and test rows, and the month after the last one, each as
            `YYYY-MM`.
        description: describes a row and its label rule for model cards; replaces the source's description.
    """

    load: Callable[[], Dataset]
    starts: tuple[str, str, str, str]
    description: str


@dataclass(frozen=True)
class DatasetSource:
    """A named click log.

    Attributes:
        name: the key in `DATASETS`.
        fetch: downloads the raw files if they are not on disk, and returns their folder or archive. Raises
            `flip_hf.fetch.FetchError` if they can't be downloaded; the message says which file to put where by hand.
        load: returns all rows in the order of the raw files. The columns are the fields, `label` (int8, 0 or 1) and, if
            the files hold times, `timestamp` (int64, seconds since 1970-01-01 UTC). Fetches the raw files, and raises
            `ValueError` if they are not as expected.
        fields: the fields in the order of the template; each is a column of `load()`.
        item: name of the column that identifies a row's item, never null. `split: item` puts all rows of one item in
            one part.
        histories: the histories that can be added to the rows.
        description: describes a row and its label rule for model cards.
        homepage: URL of the data owner's description.
        licence: what the data owner allows.
        citation: BibTeX entries.
        months: the rows of `split: months`; None for a dataset without this split.
    """

    name: str
    fetch: Callable[[], Path]
    load: Callable[[], Dataset]
    fields: tuple[FieldConfig, ...]
    item: str
    histories: tuple[HistoryField, ...]
    description: str
    homepage: str
    licence: str
    citation: str
    months: Months | None = None
