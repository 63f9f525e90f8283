"""The click log of a run: its splits, fields and label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from flip_hf.data.arrow_files import open_files
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import Place, names_of, rows_located, shown
from flip_hf.data.sources import dataset_source
from flip_hf.data.splits import find_split, load_splits
from flip_hf.data.text_features import TextFeatures, as_text_features, catalog_columns, with_columns
from flip_hf.field_checks import check_label
from flip_hf.fields import FieldConfig, as_fields
from flip_hf.processing_flip import FlipProcessor
from flip_hf.runs.settings import LABEL, DataSettings

UNLABELED = "unlabeled"
"""Name of the split with rows without labels."""


@dataclass(frozen=True)
class ClickLog:
    """The rows of a run and the meaning of their columns.

    Attributes:
        splits: "train", "validation" and, if given, "test"; with `data.unlabeled_file` also "unlabeled".
        fields: the fields in the order of the text.
        label: the label column; None if the training rows of pretraining have none.
        sources: the origin of each split, for error messages.
        description: description of the data for the run's record.
        files: the files of each split; empty for a named dataset.
        csv: format of the CSV files.
        group_field: column whose values group the rows; None without metrics within groups.
        text_features: the vectors to attach to values of fields.
        catalog: rows, in any form, that describe values beyond those of the training rows; None for no catalog.
    """

    splits: DatasetDict
    fields: Sequence[FieldConfig]
    label: str | None
    sources: dict[str, str]
    description: dict[str, Any]
    files: Mapping[str, Place] = field(default_factory=dict)
    csv: CSVFormat | None = None
    group_field: str | None = None
    text_features: Sequence[TextFeatures] = ()
    catalog: Any = None

    def encode(self, processor: FlipProcessor, split: str, *, with_label: bool = True) -> Dataset:
        """Encodes a split with `FlipProcessor.encode_dataset`.

        The settings of fields come from the processor, not from the log.

        Raises:
            ValueError: the log has a field that the processor was not fitted on, or lacks one that it was fitted on.
        """
        known, own = [f.name for f in processor.fields], [f.name for f in self.fields]
        if unknown := [name for name in own if name not in known]:
            there = ", ".join(map(repr, known))
            raise ValueError(f"{unknown[0]!r} is not one of the fields that the processor was fitted on: {there}")
        if lacking := [name for name in known if name not in own]:
            raise ValueError(
                f"the processor was fitted on the field {lacking[0]!r}, which the log lacks; the log's fields are "
                f"{', '.join(map(repr, own))}"
            )
        columns = [f.name for f in with_columns(self.fields, self.text_features)]
        group_field = self.group_field if with_label else None
        columns = columns if group_field is None else list(dict.fromkeys([*columns, group_field]))
        with rows_located(self.files.get(split), columns, optional=[self.label] if self.label else [], csv=self.csv):
            return processor.encode_dataset(
                self.splits[split],
                with_label=with_label,
                source=self.sources[split],
                group_field=group_field,
            )


def load_click_log(
    settings: DataSettings,
    processor: FlipProcessor | None = None,
    *,
    split: str | None = None,
    needs_label: bool = True,
) -> ClickLog:
    """Loads the click log that a run's settings name.

    Args:
        settings: the settings of the data.
        processor: the processor of the model to start from. Its fields and its label are the defaults for settings that
            are not set.
        split: "train", "validation" or "test" reads only this split; by default, training and validation rows are
            required.
        needs_label: whether each file must have the label column. If False, `data.group_field` is ignored too.

    Raises:
        ValueError: the settings name neither a dataset nor files, or both; a required split is missing; or
            `data.group_field` is not a column of the named dataset.
        InputError: a file can't be read or lacks a column.
        flip_hf.fetch.FetchError: the named dataset can't be downloaded.
    """
    named = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
    given = {name: path for name, path in named.items() if path is not None}
    group_field = settings.group_field if needs_label else None
    if (settings.source is None) == (not given):
        raise ValueError("set either data.source or data.train_file and data.validation_file")
    if settings.source is not None:
        source = dataset_source(settings.source)
        offered = {history.field.name: history for history in source.histories}
        if unknown := sorted(set(settings.histories) - set(offered)):
            there = ", ".join(offered)
            raise ValueError(f"data.histories: {unknown[0]!r} is not a history of {settings.source}: {there}")
        label: str | None = LABEL
        fields: Sequence[FieldConfig] = [*source.fields, *(offered[name].field for name in settings.histories)]
        if settings.fields:
            fields = _chosen(settings.fields, fields, settings.source)
            if lost := set(settings.histories) - {f.name for f in fields}:
                raise ValueError(
                    f"data.histories names {min(lost)!r}, but data.fields does not: add it to data.fields, or remove "
                    "it from data.histories"
                )
        # The settings of the fields limit the lengths of the histories.
        histories = [replace(offered[f.name], field=f) for f in fields if f.name in settings.histories]
        splits = load_splits(settings.source, settings.split, settings.split_seed, histories)
        features = _features(settings, fields, processor)
        check_label(LABEL, [f.name for f in with_columns(fields, features)], group_field, "data.")
        columns = splits["train"].column_names
        if group_field is not None and group_field not in columns:
            there = ", ".join(columns)
            raise ValueError(f"data.group_field: {group_field!r} is not a column of {settings.source}: {there}")
        catalog = _catalog(splits, fields, features)
        files, sources = {}, {name: f"{settings.source} ({name})" for name in splits}
        description: dict[str, Any] = {
            name: getattr(settings, name) for name in ("source", "split", "split_seed", "histories")
        }
        description["dataset"] = {
            "name": source.name,
            "description": find_split(settings.split).rows_of(source).description,
            **{name: getattr(source, name) for name in ("homepage", "licence", "citation")},
        }
    else:
        for name in [split] if split else ["train", "validation"]:
            if name not in given:
                raise ValueError(f"data.{name}_file is not set: set it to the files of the {name} rows")
        if not settings.fields and processor is None:
            raise ValueError("data.fields is not set: list the columns to learn from, such as [user_id, title]")
        if settings.histories:
            raise ValueError(
                "data.histories is only for a named dataset; for files, add histories with "
                "flip_hf.data.history.add_history"
            )
        given = {split: given[split]} if split else given
        fields = as_fields(settings.fields) if settings.fields or processor is None else processor.fields
        label = settings.label or (processor.label if processor else None) or LABEL
        features = _features(settings, fields, processor)
        read = with_columns(fields, features)
        check_label(label, [f.name for f in read], group_field, "data.")
        splits = DatasetDict(
            {
                name: open_click_log_file(
                    place, read, label, settings.csv, needs_label=needs_label, group_field=group_field
                )
                for name, place in given.items()
            }
        )
        if label not in next(iter(splits.values())).column_names:
            label = None
        sources = {name: shown(place) for name, place in given.items()}
        description = {} if settings.name is None else {"name": settings.name}
        description["files"] = [name for place in given.values() for name in names_of(place)]
        files, catalog = dict(given), settings.catalog_file
    for name, most in (("train", settings.max_train_rows), ("validation", settings.max_validation_rows)):
        if most is not None and name in splits:
            splits[name] = splits[name].select(range(min(most, len(splits[name]))))
    if settings.unlabeled_file is not None:
        names = [f.name for f in with_columns(fields, features)]
        splits[UNLABELED] = open_files(settings.unlabeled_file, names, csv=settings.csv)
        files[UNLABELED], sources[UNLABELED] = settings.unlabeled_file, shown(settings.unlabeled_file)
        description["files"] = [*description.get("files", []), *names_of(settings.unlabeled_file)]
    description["rows"] = {name: len(rows) for name, rows in splits.items()}
    description["fingerprints"] = {name: rows._fingerprint for name, rows in splits.items()}
    return ClickLog(splits, fields, label, sources, description, files, settings.csv, group_field, features, catalog)


def _features(
    settings: DataSettings, fields: Sequence[FieldConfig], processor: FlipProcessor | None
) -> list[TextFeatures]:
    """Returns the text features of the model to start from; without one, those in the settings."""
    if processor is None:
        return as_text_features(settings.text_features, fields)
    saved = list(processor.vectors.features.values())
    if named := {features["field"] for features in settings.text_features} - {own.field for own in saved}:
        raise ValueError(
            f"data.text_features attaches vectors to {min(named)!r}, but the model to start from has none for this "
            "field; pretrain it with the same data.text_features"
        )
    for own in as_text_features(settings.text_features, fields):
        of_model = next(one for one in saved if one.field == own.field)
        if (own.fields, own.column, own.text_layers) != (of_model.fields, of_model.column, of_model.text_layers):
            raise ValueError(
                f"data.text_features of {own.field!r} differ from those of the model to start from, "
                f"{of_model.to_dict()}; leave them out, or set the same"
            )
    return saved


def _catalog(splits: DatasetDict, fields: Sequence[FieldConfig], features: Sequence[TextFeatures]) -> Dataset | None:
    """Returns the columns of text features from all splits, because a catalog is known before any click."""
    names = [column.name for column in catalog_columns(fields, features)]
    return concatenate_datasets([rows.select_columns(names) for rows in splits.values()]) if names else None


def _chosen(
    values: Sequence[str | dict[str, Any]], fields: Sequence[FieldConfig], source: str
) -> Sequence[FieldConfig]:
    """Selects the named fields of a dataset; a mapping replaces settings of its field."""
    own = {f.name: f.to_dict() for f in fields}
    settings = [{"name": value} if isinstance(value, str) else value for value in values]
    if unknown := [value.get("name") for value in settings if value.get("name") not in own]:
        raise ValueError(f"data.fields: {unknown[0]!r} is not a field of {source}: {', '.join(own)}")
    return as_fields([{**own[value["name"]], **value} for value in settings])


def open_click_log_file(
    place: Place,
    fields: Sequence[FieldConfig],
    label: str,
    csv: CSVFormat | None = None,
    *,
    needs_label: bool = True,
    group_field: str | None = None,
) -> Dataset:
    """Opens the columns of a click log's files as a Dataset on disk (`flip_hf.data.arrow_files.open_files`).

    Args:
        place: the files, in a form that `flip_hf.data.files.stream_tables` takes.
        fields: fields whose columns to read.
        label: the label column.
        csv: format of the CSV files.
        needs_label: True requires the label column; False reads it if it exists.
        group_field: another column to read, which may also be a field.

    Raises:
        InputError: a file can't be read or lacks a column, or the files have no rows.
    """
    names = [f.name for f in fields]
    if group_field is not None and group_field not in names:
        names.append(group_field)
    columns, optional = ([*names, label], []) if needs_label else (names, [label])
    return open_files(place, columns, optional=optional, csv=csv)
