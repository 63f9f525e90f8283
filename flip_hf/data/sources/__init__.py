"""Named public datasets. A new one is a file beside this one and a line in `DATASETS`."""

from flip_hf.data.sources.base import DatasetSource, HistoryField
from flip_hf.data.sources.movielens_100k import MOVIELENS_100K

DATASETS: dict[str, DatasetSource] = {
    "movielens-100k": MOVIELENS_100K,
}

__all__ = ["DATASETS", "DatasetSource", "HistoryField"]
