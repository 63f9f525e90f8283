"""What `flip-hf fetch` fetches."""

from collections.abc import Callable
from pathlib import Path

from flip_hf.data.sources import DATASETS
from flip_hf.fetch import minilm

FETCHABLE: dict[str, Callable[[], Path]] = {
    "minilm": minilm,
    **{name: source.fetch for name, source in DATASETS.items()},
}
"""By name, what gets the default text encoder or the raw files of a named dataset, and returns where they lie.

Each raises `flip_hf.fetch.FetchError` if it can't; the error says what failed at each step and what to do.
"""
