"""The downloads that `flip-hf fetch` offers."""

from collections.abc import Callable
from pathlib import Path

from flip_hf.data.sources import DATASETS
from flip_hf.fetch import minilm

FETCHABLE: dict[str, Callable[[], Path]] = {
    "minilm": minilm,
    **{name: source.fetch for name, source in DATASETS.items()},
}
"""The functions that download the default text encoder or a named dataset and return its folder, by name.

If a download fails, the function raises `flip_hf.fetch.FetchError`, which says what failed and what to do.
"""
