"""What a dataset source gives, so that examples, tests and model cards can use any of them alike."""

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
        user: the column of the users.
        item: the column that the history is made of.
        words: what stands before an item, by the label of its row; rows of no label named here are not part of it.
    """

    field: FieldConfig
    user: str
    item: str
    words: Mapping[int, str]


@dataclass(frozen=True)
class Months:
    """The rows of some calendar months (UTC), for `split: months`. Their label rule is this split's own.

    Attributes:
        load: as `DatasetSource.load`, with `timestamp`, but by this split's label rule. Rows of other months may be
            among them; the split leaves them out.
        starts: the first month of the training, of the validation and of the test rows, and the month after the last
            one, each as `YYYY-MM`.
        description: what a row is and how its label comes about, for model cards; it replaces that of the source.
    """

    load: Callable[[], Dataset]
    starts: tuple[str, str, str, str]
    description: str


@dataclass(frozen=True)
class DatasetSource:
    """A named click log.

    Attributes:
        name: the key in `DATASETS`.
        fetch: gets the raw files where they are not on disk yet; returns the folder or archive that they lie in. Raises
            `flip_hf.fetch.FetchError` if they can't be had; it says what to put where by hand.
        load: returns all rows in the raw files' order, with one column a field, `label` (int8, 0 or 1) and, where the
            files say when a row was, `timestamp` (int64, seconds since 1970-01-01 UTC). Fetches
            the raw files, and raises `ValueError` where they are not what they should be.
        fields: the fields in the order of the template, a column of `load()` each.
        item: the column that says which item a row is about, never null. `split: item` keeps its values apart.
        histories: the histories that rows can have beside them.
        description: what a row is and how its label comes about, for model cards.
        homepage: where the data's owner describes it.
        licence: what the data's owner allows.
        citation: BibTeX.
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
