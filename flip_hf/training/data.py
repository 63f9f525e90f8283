"""The click log of a run, split and with its fields."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict

from flip_hf.configuration_flip import FieldConfig, as_fields
from flip_hf.data.arrow_files import BLOCK_ROWS, rows_on_disk
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import Place, content_of, names_of, rows_located, shown, stream_tables
from flip_hf.data.sources import dataset_source
from flip_hf.data.splits import load_splits
from flip_hf.processing_flip import FlipProcessor
from flip_hf.training.run_config import DataConfig

logger = logging.getLogger(__name__)

# Part of the key of what is kept of files: to be raised when the same files are read otherwise than before.
_READER = 1


@dataclass(frozen=True)
class ClickLog:
    """Rows and what their columns mean.

    Attributes:
        splits: "train" and "validation", and where there is one "test".
        fields: the fields in the order of the text.
        label: the label column.
        sources: where each split comes from, for error messages.
        facts: what a run's record says of the data.
        places: the files of each split; empty for a named dataset.
        csv: how CSV files among them are written.
    """

    splits: DatasetDict
    fields: Sequence[FieldConfig]
    label: str
    sources: dict[str, str]
    facts: dict[str, Any]
    places: Mapping[str, Place] = field(default_factory=dict)
    csv: CSVFormat | None = None

    def encode(self, processor: FlipProcessor, split: str, *, with_label: bool = True) -> Dataset:
        """A split's rows as `FlipProcessor.encode_dataset` gives them.

        The processor's fields and their settings hold, not the log's.

        Raises:
            ValueError: the log has a field that the processor was not fitted on, or lacks one.
        """
        known, own = [f.name for f in processor.fields], [f.name for f in self.fields]
        if unknown := [name for name in own if name not in known]:
            there = ", ".join(map(repr, known))
            raise ValueError(f"{unknown[0]!r} is not one of the fields that the processor knows: {there}")
        if lacking := [name for name in known if name not in own]:
            raise ValueError(
                f"the processor was fitted on {lacking[0]!r} too, and the log's fields are {', '.join(map(repr, own))}"
            )
        with rows_located(self.places.get(split), own, optional=[self.label], csv=self.csv):
            return processor.encode_dataset(self.splits[split], with_label=with_label, source=self.sources[split])


def load_click_log(config: DataConfig) -> ClickLog:
    """The click log that a run's settings name.

    Raises:
        ValueError: neither a named dataset nor files, or both.
        InputError: a file can't be read or lacks a column.
        flip_hf.fetch.FetchError: the named dataset can't be had.
    """
    files = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}
    given = {name: path for name, path in files.items() if path is not None}
    if (config.source is None) == (not given):
        raise ValueError("set either data.source or data.train_file and data.validation_file")
    if config.source is not None:
        source = dataset_source(config.source)
        offered = {history.field.name: history for history in source.histories}
        if unknown := sorted(set(config.histories) - set(offered)):
            raise ValueError(f"data.histories: {unknown[0]!r} is not one of {', '.join(offered)}")
        histories = [offered[name] for name in config.histories]
        splits, label = load_splits(config.source, config.split, config.split_seed, histories), "label"
        fields: Sequence[FieldConfig] = [*source.fields, *(history.field for history in histories)]
        if config.fields:
            fields = _chosen(config.fields, fields, config.source)
            if lost := set(config.histories) - {f.name for f in fields}:
                raise ValueError(f"data.fields leaves out {min(lost)!r}, which data.histories asks for")
        places, sources = {}, {name: f"{config.source} ({name})" for name in splits}
        facts: dict[str, Any] = {"source": config.source, "split": config.split, "split_seed": config.split_seed}
        facts["histories"] = config.histories
        facts["dataset"] = {
            name: getattr(source, name) for name in ("name", "description", "homepage", "licence", "citation")
        }
    else:
        if not config.fields or "train" not in given or "validation" not in given:
            raise ValueError("with files, data.train_file, data.validation_file and data.fields must all be set")
        if config.histories:
            raise ValueError(
                "data.histories are those of a named dataset; flip_hf.data.history.add_history makes them for files"
            )
        fields, label = as_fields(config.fields), config.label
        splits = DatasetDict(
            {name: open_click_log_file(place, fields, label, config.csv) for name, place in given.items()}
        )
        sources = {name: shown(place) for name, place in given.items()}
        facts = {"files": [name for place in given.values() for name in names_of(place)]}
        places = given
    for name, most in (("train", config.max_train_rows), ("validation", config.max_validation_rows)):
        if most is not None:
            splits[name] = splits[name].select(range(min(most, len(splits[name]))))
    facts["rows"] = {name: len(rows) for name, rows in splits.items()}
    facts["fingerprints"] = {name: rows._fingerprint for name, rows in splits.items()}
    return ClickLog(splits, fields, label, sources, facts, places, config.csv)


def _chosen(
    values: Sequence[str | dict[str, Any]], fields: Sequence[FieldConfig], source: str
) -> Sequence[FieldConfig]:
    """Those of a dataset's fields that are named, with the settings that mappings replace."""
    own = {f.name: f.to_dict() for f in fields}
    settings = [{"name": value} if isinstance(value, str) else value for value in values]
    if unknown := [value.get("name") for value in settings if value.get("name") not in own]:
        raise ValueError(f"data.fields: {unknown[0]!r} is not a field of {source}: {', '.join(own)}")
    return as_fields([{**own[value["name"]], **value} for value in settings])


def open_click_log_file(
    place: Place, fields: Sequence[FieldConfig], label: str, csv: CSVFormat | None = None
) -> Dataset:
    """The wanted columns of CSV or Parquet files as a Dataset on disk: memory does not grow with the files.

    Written once, as Arrow, into the folder where datasets keeps what it makes of files, and opened again as long as the
    files hold the same bytes. To know that, each call reads the files once.

    Args:
        place: the files, as `flip_hf.data.files.stream_tables` takes them.
        fields: whose columns are wanted.
        label: the label column.
        csv: how CSV files are written.

    Raises:
        InputError: a file can't be read, lacks a column, or there are no rows.
    """
    columns = [*(f.name for f in fields), label]
    key = ["files", _READER, *content_of(place, csv), columns]
    warnings: list[str] = []

    def tables() -> Iterator[pa.Table]:
        return stream_tables(place, columns, batch_rows=BLOCK_ROWS, csv=csv, warn=warnings.append)

    rows = rows_on_disk(key, tables, shown(place), warnings)
    for warning in warnings:
        logger.warning("%s", warning)
    return rows
