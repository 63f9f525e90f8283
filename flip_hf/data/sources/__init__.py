"""Named public datasets. To add one, write a file beside this one and add a line to `DATASETS`."""

from flip_hf.data.sources.base import DatasetSource, HistoryField, Months
from flip_hf.data.sources.bookcrossing import BOOKCROSSING
from flip_hf.data.sources.bookcrossing_core import BOOKCROSSING_CORE
from flip_hf.data.sources.goodreads import GOODREADS
from flip_hf.data.sources.movielens_1m import MOVIELENS_1M
from flip_hf.data.sources.movielens_100k import MOVIELENS_100K

DATASETS: dict[str, DatasetSource] = {
    "movielens-100k": MOVIELENS_100K,
    "movielens-1m": MOVIELENS_1M,
    "bookcrossing": BOOKCROSSING,
    "bookcrossing-core": BOOKCROSSING_CORE,
    "goodreads": GOODREADS,
}


def dataset_source(name: str) -> DatasetSource:
    """Returns the dataset with this name. An unknown name raises a ValueError that lists the names."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


__all__ = ["DATASETS", "DatasetSource", "HistoryField", "Months", "dataset_source"]
