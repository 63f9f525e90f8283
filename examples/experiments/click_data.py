"""The data sets of data.yaml, which tables name: a named data set of the package, or files that a user has."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetDict

from flip_hf.data.sources import dataset_source
from flip_hf.data.splits import load_splits
from flip_hf.fetch import check_file

EXAMPLES = Path(__file__).resolve().parents[1]
LABEL = "label"


@dataclass(frozen=True)
class ClickData:
    """A data set that tables name.

    Attributes:
        name: its key in data.yaml: `data.source` of a named data set, `data.name` of files, so that a record tells it.
        configs: the folder under examples/configs with its `pretrain.yaml` and `finetune.yaml`, which say what is read.
        user: the column of users, within which UAUC is.
        item: the column of items.
        files: for files "train", "validation" and "test" -> `name` and `sha256` of a Parquet file; empty for a named
            data set. The split is then what the files are, whatever a table calls it, and no seed changes it.
    """

    name: str
    configs: str
    user: str
    item: str
    files: Mapping[str, Mapping[str, str]]

    def config(self, script: str) -> Path:
        """The configuration file of a script, "pretrain" or "finetune"."""
        return EXAMPLES / "configs" / self.configs / f"{script}.yaml"

    @property
    def identity(self) -> Any:
        """What the rows are, for the key of a run: the fields of a named data set, the hashes of files."""
        if self.files:
            return {part: file["sha256"] for part, file in self.files.items()}
        return [kept.to_dict() for kept in dataset_source(self.name).fields]

    def settings(self, split: str, seed: int, folder: Path | None) -> dict[str, Any]:
        """The settings of a run that name its rows.

        Args:
            split: how a named data set is split.
            seed: of the split.
            folder: where the files are, as in `places`.
        """
        if self.files:
            return {f"data.{part}_file": str(path) for part, path in self.places(folder).items()}
        return {"data.split": split, "data.split_seed": seed}

    def rows(self, split: str, seed: int, folder: Path | None) -> DatasetDict:
        """The rows of all runs of a split and seed, with the columns of users, items and labels at least."""
        if self.files:
            columns = [self.user, self.item, LABEL]
            places = self.places(folder)
            return DatasetDict({part: Dataset(pq.read_table(path, columns=columns)) for part, path in places.items()})
        return load_splits(self.name, split, seed)

    def places(self, folder: Path | None) -> dict[str, Path]:
        """Where the files are.

        Raises:
            ValueError: no folder is given.
            flip_hf.fetch.FetchError: the folder lacks a file, or has another one of its name.
        """
        if folder is None:
            names = ", ".join(file["name"] for file in self.files.values())
            raise ValueError(f"{self.name} is files: name the folder of {names} by --files-dir")
        return {part: _checked(folder / file["name"], file["sha256"]) for part, file in self.files.items()}


@cache
def _checked(path: Path, sha256: str) -> Path:
    return check_file(path, "sha256", sha256)


def find_data(name: str, path: Path) -> ClickData:
    """The data set of that name in a file such as data.yaml.

    Raises:
        ValueError: there is none.
    """
    there = _parsed(path.read_text(encoding="utf-8"))
    if name not in there:
        raise ValueError(f"{name!r} is not in {path.name}: {', '.join(there)}")
    return ClickData(name, **{"files": {}, **there[name]})


@cache
def _parsed(text: str) -> Any:
    return yaml.safe_load(text)
