"""Settings of the commands: dataclasses that are read from YAML files and overridden on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import CONFIG_NAME

from flip_hf.backbones import build_backbone, check_backbone_options
from flip_hf.configuration_flip import FlipConfig, check_settings
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import Place, without_credentials
from flip_hf.data.text_features import TextFeatures
from flip_hf.fetch import MINILM
from flip_hf.field_checks import check_label
from flip_hf.fields import FieldConfig
from flip_hf.runs.folder import MODEL_FOLDER, RECORD_NAME
from flip_hf.runs.table_writers import check_output, check_output_folder, ending_of
from flip_hf.training.ranges import check_ranges
from flip_hf.training.settings import CHANGES_NO_WEIGHT, TrainingSettings

LABEL = "label"
"""The label column if neither the settings nor a saved processor name one."""
# Metadata of a setting that only says where a run writes, so the record leaves it out.
_NOT_RECORDED = CHANGES_NO_WEIGHT | {"is_recorded": False}

# Settings of `FlipConfig` that can't be set in model.options, and the setting to use instead.
_NOT_OPTIONS = {
    "fields": "data.fields",
    "mode": "mode (finetuning trains one tower or both; pretraining needs both)",
    "text_base_model": "model.text_encoder",
    "text_config": "model.text_encoder",
    "text_layers": "model.text_layers",
    "distillation_weight": "distillation_weight (finetuning with a teacher)",
}


@dataclass
class DataSettings:
    """The click log: a named dataset, or files.

    Args:
        source: name of a dataset: movielens-100k, movielens-1m, bookcrossing, bookcrossing-core or goodreads. Leave it
            out to read files.
        split: how to split a named dataset into training, validation and test rows. "random" splits the rows 8:1:1 at
            random. "time" splits them 8:1:1 by time, oldest first. "item" splits the items 8:1:1 at random, so that
            all rows of an item are in the same split. "months" is only for movielens-1m: 10, 5 and 5 calendar months
            from June 2001 to January 2003, with ratings of 3 as negatives.
        split_seed: seed of the splits "random" and "item".
        histories: user histories to add to a named dataset as fields, such as `liked_titles`. A history lists what the
            user did in earlier rows. Set `max_values` of this field in `fields` to limit its length.
        name: name of the dataset in your own files, such as `ml1m-months`, to show in run.json and in the model card.
            Leave it out if `source` is set.
        train_file: CSV or Parquet files of training rows: a file, a folder, a pattern such as `logs/*.csv`, a URL such
            as `s3://bucket/logs`, or a list of these.
        validation_file: files of validation rows.
        test_file: files of test rows. They are scored once, after training.
        unlabeled_file: files of rows without labels, for finetuning with a `teacher`: its predictions replace labels.
        csv: Format of CSV files
        fields: the columns to learn from, in the order of the text. Each is a column name or a mapping of `FieldConfig`
            settings, such as `{name: title, max_tokens: 16}`. By default, a named dataset uses all of its fields. If
            you list fields of a named dataset, only these are used, and a mapping changes settings of its field. With a
            pretrained model, the fields must be exactly those of the model, and their saved settings apply.
        label: name of the label column in the files. The default is the label column of the model to start from, or
            "label" without one. Files for pretraining may lack this column.
        group_field: column whose values group the rows, such as `user_id`. It adds GAUC and UAUC, which are AUCs within
            groups, to the click metrics. The column need not be a field. Rows without a value are left out of these two
            metrics. Pretraining ignores this setting.
        text_features: vectors to attach to the values of fields, each a mapping of `TextFeatures` settings, such as
            `{field: movie_id, encoder: sentence-transformers/all-MiniLM-L6-v2, fields: [title, genre]}`. A pretrained
            model always uses its own.
        catalog_file: files that describe further values for the text features, such as all items of a shop. They need
            the columns that the text features read. A named dataset is its own catalog.
        max_train_rows: maximum number of training rows; only the first ones are used. No limit by default.
        max_validation_rows: maximum number of validation rows; only the first ones are used. No limit by default.
    """

    source: str | None = None
    split: str = "random"
    split_seed: int = 0
    histories: list[str] = field(default_factory=list)
    name: str | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    # The names of files don't affect the weights; a fingerprint of their rows is compared instead.
    train_file: Place | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    validation_file: Place | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    test_file: Place | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    unlabeled_file: Place | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    csv: CSVFormat = field(default_factory=CSVFormat, metadata=CHANGES_NO_WEIGHT)
    fields: list[str | dict[str, Any]] = field(default_factory=list)
    label: str | None = None
    group_field: str | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    text_features: list[dict[str, Any]] = field(default_factory=list)
    catalog_file: Place | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    max_train_rows: int | None = None
    max_validation_rows: int | None = None

    def __post_init__(self) -> None:
        for value in self.fields:
            if isinstance(value, dict):
                FieldConfig.check_names(value)
        for features in self.text_features:
            TextFeatures.from_dict(features)
        if self.catalog_file is not None and (self.source is not None or not self.text_features):
            raise ValueError(
                "data.catalog_file needs data.text_features and rows from files; a named dataset is its own catalog"
            )
        check_ranges(self, "data")
        if self.name is not None and not self.name.strip():
            raise ValueError("data.name is empty: set it to a name for the dataset in the files, or leave it out")
        if self.name is not None and self.source is not None:
            raise ValueError(f"data.name={self.name} is only for files: leave it out, or data.source={self.source}")
        if self.source is None:
            names = [f if isinstance(f, str) else f.get("name") for f in self.fields]
            check_label(self.label or LABEL, names, self.group_field, "data.")

    def refuse_unlabeled(self, advice: str) -> None:
        """Raises ValueError, with advice, if `unlabeled_file` is set."""
        if self.unlabeled_file is not None:
            raise ValueError(f"data.unlabeled_file is only for finetuning with a teacher; {advice}")


@dataclass
class ModelSettings:
    """Settings of the model to build.

    Args:
        text_encoder: Hub name or folder of the pretrained text encoder.
        text_layers: number of layers of the text encoder to build, counted from the first; all by default.
        text_pretrained: true loads the text encoder's weights; false initialises them randomly (an ablation).
        max_length: maximum number of tokens of a row's text. The default is the tokenizer's limit, at most 512.
        options: other settings of `FlipConfig`, such as `backbone` or `contrastive_temperature`. When finetuning a
            pretrained FLIP, they override the saved settings.
    """

    text_encoder: str = MINILM
    text_layers: int | None = None
    text_pretrained: bool = True
    max_length: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        for name, place in _NOT_OPTIONS.items():
            if name in self.options:
                raise ValueError(f"model.options.{name} can't be set: set {place} instead")
        check_settings(self.options, "model.options")
        # The groups of text_towers are checked later, because the fields are not known yet.
        options = {name: value for name, value in self.options.items() if name != "text_towers"}
        with _errors_of_options("model.options"):
            FlipConfig(**options)

    def check_backbone(self) -> None:
        """Raises ValueError if the backbone does not exist or can't be built with its options."""
        name = self.options.get("backbone", FlipConfig.backbone)
        options = self.options.get("backbone_options", {})
        check_backbone_options(name, options)
        # The meta device allocates no memory. The number of fields is not known yet, but any number is valid.
        with _errors_of_options(f"model.options.backbone_options={options}"), torch.device("meta"):
            build_backbone(name, 2, self.options.get("embedding_dim", FlipConfig.embedding_dim), options)


@dataclass
class MaskingSettings:
    """Settings of the masks of pretraining.

    Args:
        text_mask_ratio: share of a row's fields to mask in the text, from 0 to 1.
        tabular_mask_ratio: share of a row's fields to mask in the feature ids, from 0 to 1.
        text_mask_unit: "field" masks all value tokens of a field together, as in the paper; "token" masks single value
            tokens.
        mlm_vocabulary: tokens that MLM chooses from when it predicts a masked token. "all" means all tokens of the text
            encoder, as in the paper. "seen" means only tokens in the training values, which is faster.
    """

    text_mask_ratio: float = 0.15
    tabular_mask_ratio: float = 0.15
    text_mask_unit: Literal["field", "token"] = "field"
    mlm_vocabulary: Literal["all", "seen"] = "all"

    def __post_init__(self) -> None:
        check_ranges(self, "masking")


@dataclass
class RunSettings:
    """Settings of the run.

    Args:
        output_dir: folder for the model, the log, the checkpoints and the record of the run.
        resume: continue from the last checkpoint in `output_dir`. Without a checkpoint the run starts from the
            beginning. If the run has already finished, nothing is trained, and the model is pushed if `push_to_hub` is
            set.
        push_to_hub: Hub repository to push the model to, such as `org/name`; it is created if needed. The token comes
            from `hf auth login` or from `HF_TOKEN`.
        private: create the repository as private; an existing public repository is an error.
        revision: branch to push to, created if needed; the default is `main`.
        push_when: "end" pushes only at the end of the run. "best" also pushes after each new best validation result.
            "checkpoint" does the same as "best" and also pushes at each checkpoint.
        data: The click log
        model: The model to build
        training: Training
    """

    output_dir: Path = field(metadata=_NOT_RECORDED)
    resume: bool = field(default=False, metadata=_NOT_RECORDED)
    push_to_hub: str | None = field(default=None, metadata=_NOT_RECORDED)
    private: bool = field(default=False, metadata=_NOT_RECORDED)
    revision: str | None = field(default=None, metadata=_NOT_RECORDED)
    push_when: Literal["end", "best", "checkpoint"] = field(default="end", metadata=_NOT_RECORDED)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        check_output_folder(self.output_dir, "output_dir")
        if self.push_to_hub is None and (self.private or self.revision or self.push_when != "end"):
            raise ValueError("private, revision and push_when need push_to_hub: set it to a name such as org/name")


@dataclass
class PretrainSettings(RunSettings):
    """Settings of the run.

    Args:
        masking: Masking
    """

    masking: MaskingSettings = field(default_factory=MaskingSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.check_backbone()
        self.data.refuse_unlabeled("pretraining needs no labels: add these files to data.train_file")


@dataclass
class FinetuneSettings(RunSettings):
    """Settings of the run.

    Args:
        pretrained: folder or Hub repository of a pretrained FLIP. Without it, finetuning starts from a new model.
        mode: "joint" trains both towers, "id" the ID-based model alone, "text" the text encoder alone.
        fusion_rows: rows for learning the weights of the two towers' logits. "training" learns them together with the
            towers, as in the paper. "validation" learns them afterwards, on validation rows, which the towers have not
            memorised.
        teacher: folder or Hub repository of a finetuned model for knowledge distillation: the new model also learns
            from the teacher's click logits. For example, `mode: id` can learn from a joint teacher. A teacher is
            overconfident on its own training rows, so use `data.unlabeled_file` to add rows that the teacher has not
            seen.
        distillation_weight: share of the loss that comes from the teacher, from 0 to 1; labels have the rest.

    Raises:
        ValueError: `fusion_rows` is set for a model with one tower; `pretrained` or `teacher` is a folder without a
            model, or is inside `output_dir`; or a setting that needs a teacher is set without one.
    """

    pretrained: str | None = None
    mode: Literal["joint", "id", "text"] = "joint"
    fusion_rows: Literal["training", "validation"] = "training"
    teacher: str | None = None
    distillation_weight: float = FlipConfig.distillation_weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is None or "backbone" in self.model.options:
            self.model.check_backbone()
        check_ranges(self)
        for setting, name in (("pretrained", self.pretrained), ("teacher", self.teacher)):
            if name is None:
                continue
            check_model_folder(name, setting)
            if _lies_in(name, self.output_dir):
                raise ValueError(
                    f"{setting}={name} is inside output_dir={self.output_dir}, so this run would overwrite it: choose "
                    "another output_dir"
                )
        if self.teacher is None:
            self.data.refuse_unlabeled("set teacher to a finetuned model, such as runs/flip/model")
            if self.distillation_weight != FlipConfig.distillation_weight:
                raise ValueError(
                    f"distillation_weight={self.distillation_weight} needs a teacher: set teacher, or leave it out"
                )
        if self.fusion_rows != "training" and self.mode != "joint":
            raise ValueError(f"fusion_rows={self.fusion_rows!r} needs mode='joint', not mode={self.mode!r}")


@dataclass
class EvaluateSettings:
    """Settings of the evaluation.

    Args:
        model: folder or Hub repository of a finetuned model.
        output: JSON file for the metrics; by default they are only printed.
        mode: score with both towers ("joint") or with one ("id", "text"); the default is the saved mode.
        data: The labelled rows: files, such as `data.test_file`, or the same named dataset and split as in training
        rows: the split to evaluate. With files, it selects `data.train_file`, `data.validation_file` or
            `data.test_file`.
        slices: fields for extra metrics on slices of the rows. For each field, one slice has the rows with an unseen
            value of this field. One more slice has the rows whose values of all these fields were seen in training.
        batch_size: rows in a batch.
        precision: "bf16" computes with bf16 autocast, "fp32" in single precision; "auto" chooses bf16 if the device
            supports it.
    """

    model: str
    output: Path | None = None
    mode: Literal["joint", "id", "text"] | None = None
    data: DataSettings = field(default_factory=DataSettings)
    rows: Literal["train", "validation", "test"] = "test"
    slices: list[str] = field(default_factory=list)
    batch_size: int = 512
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        check_ranges(self)
        check_model_folder(self.model, "model")
        self.data.refuse_unlabeled("an evaluation needs labels")
        if self.output is not None:
            check_output(self.output, [self.data.train_file, self.data.validation_file, self.data.test_file])


@dataclass
class PredictSettings:
    """Settings of the prediction.

    Args:
        model: folder or Hub repository of a finetuned model.
        input: CSV or Parquet files with the columns of the model's fields: a file, a folder, a pattern, a URL, or a
            list of these.
        output: file for the row numbers, kept columns and click probabilities. The ending of its name selects the
            format: Parquet (.parquet), CSV (.csv, .csv.gz) or JSON Lines (.jsonl, .json, .jsonl.gz, .json.gz).
        keep: columns of the input to copy to the output, such as `[request_id]`. They need not be fields.
        mode: score with both towers ("joint") or with one ("id", "text"); the default is the saved mode.
        text_budget: share of the rows whose text is read, from 0 to 1. A smaller share saves time. The text is read for
            the rows that the ID-based model is least sure about; the others get the ID-based model's probability. The
            share applies to each chunk of `chunk_rows` rows. By default, all texts are read.
        batch_size: rows in a batch.
        chunk_rows: number of rows to hold in memory at a time.
        precision: "bf16" computes with bf16 autocast, "fp32" in single precision; "auto" chooses bf16 if the device
            supports it.
        csv: Format of CSV files
    """

    model: str
    input: Place
    output: Path
    keep: list[str] = field(default_factory=list)
    mode: Literal["joint", "id", "text"] | None = None
    text_budget: float | None = None
    batch_size: int = 512
    chunk_rows: int = 8192
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    csv: CSVFormat = field(default_factory=CSVFormat)

    def __post_init__(self) -> None:
        check_ranges(self)
        ending_of(self.output)
        check_output(self.output, [self.input])
        check_model_folder(self.model, "model")


@dataclass
class CardSettings:
    """Settings of the card.

    Args:
        run: folder of a finished run.
        repo: Hub repository of the model, such as `org/name`; it need not exist yet.
        output: folder for README.md, run.json and the pictures.
    """

    run: Path
    repo: str
    output: Path

    def __post_init__(self) -> None:
        check_output_folder(self.output, "output")
        if not (self.run / RECORD_NAME).is_file():
            raise ValueError(f"run={self.run}: this folder holds no finished run, because {RECORD_NAME} is missing")


@contextmanager
def _errors_of_options(setting: str) -> Iterator[None]:
    """Turns all errors into ValueError, because transformers and torch raise many types for invalid values."""
    try:
        yield
    except Exception as error:
        # transformers' checks of types and ranges wrap the original error, which has the clearer message.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"{setting}: {cause}") from error


def check_model_folder(name: str, setting: str) -> None:
    """Raises ValueError if a name is neither a folder with a model nor a valid name of a Hub repository.

    Args:
        name: folder or Hub repository of a model.
        setting: name of the setting, for the error.
    """
    folder = Path(name)
    if not folder.exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            message = "this folder does not exist, and the name is not that of a Hub repository, such as org/name"
            raise ValueError(f"{setting}={name}: {message}") from error
    elif not (folder / CONFIG_NAME).is_file():
        better = folder / MODEL_FOLDER
        hint = f"; did you mean {better}?" if (better / CONFIG_NAME).is_file() else ""
        raise ValueError(f"{setting}={name}: this folder holds no model, because {CONFIG_NAME} is missing{hint}")


def _lies_in(name: str, folder: Path) -> bool:
    path = Path(name)
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def as_plain(settings: Any) -> dict[str, Any]:
    """Returns a run's settings for its record, as JSON types and without credentials in URLs."""
    recorded = [f.name for f in fields(settings) if f.metadata.get("is_recorded", True)]
    values = asdict(settings)
    return {name: _plain(values[name]) for name in recorded}


def names_without_effect(kind: type) -> set[str]:
    """Returns the dotted names of the settings, or groups of settings, that do not affect the weights.

    Args:
        kind: a dataclass of settings.
    """
    found = set()
    for f in fields(kind):
        if not f.metadata.get("changes_weights", True):
            found.add(f.name)
        elif isinstance(f.type, type) and is_dataclass(f.type):
            found |= {f"{f.name}.{name}" for name in names_without_effect(f.type)}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return without_credentials(str(value)) if isinstance(value, str | Path) else value
