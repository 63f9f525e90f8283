"""Settings of a run: plain dataclasses, read from YAML files and overridden on the command line."""

import sys
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import CONFIG_NAME

from flip_hf.fetch import MINILM
from flip_hf.training.ranges import check_ranges
from flip_hf.training.table_writers import check_output, ending_of

LABEL = "label"
"""The label column where neither the settings nor a saved processor name one."""
MODEL_FOLDER = "model"
"""The folder of the best model, in a run's folder."""


@dataclass
class DataConfig:
    """The click log: a named dataset, or files of one's own.

    Args:
        source: a name in `flip_hf.data.sources.DATASETS`; left out where files are given.
        split: how the named dataset is split 8:1:1, "random" or "time".
        split_seed: seed of the random split.
        histories: histories that the named dataset's rows get, such as `liked_titles`: what their user liked before.
        train_file: CSV or Parquet file of training rows.
        validation_file: CSV or Parquet file of validation rows.
        test_file: CSV or Parquet file of test rows, read once, after training.
        fields: the fields in the order of the text: column names, or mappings of `FieldConfig`'s settings. Of a named
            dataset all of its own by default, and a mapping replaces some of a field's settings. Beside a pretrained
            model, whose fields these must be, its settings hold.
        label: the label column of the files. By default it is the one that the model to start from was saved with, or
            else "label". Pretraining reads no labels, so its files may lack this column.
        max_train_rows: train on the first rows of the training split only, for a smaller budget.
        max_validation_rows: validate on the first rows of the validation split only, for a smaller budget.
    """

    source: str | None = None
    split: str = "random"
    split_seed: int = 0
    histories: list[str] = field(default_factory=list)
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    fields: list[str | dict[str, Any]] = field(default_factory=list)
    label: str | None = None
    max_train_rows: int | None = None
    max_validation_rows: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if self.source is None:
            check_label(self.label or LABEL, [f if isinstance(f, str) else f.get("name") for f in self.fields])


@dataclass
class ModelConfig:
    """What is built, and which settings of a pretrained FLIP finetuning replaces.

    Args:
        text_encoder: name or folder of the pretrained text encoder.
        text_layers: build only its first layers.
        text_pretrained: start from its weights, not afresh from its configuration, which shows what they give.
        max_length: most tokens of a row's text.
        options: further settings of `FlipConfig`, such as `backbone` or `contrastive_temperature`.
    """

    text_encoder: str = MINILM
    text_layers: int | None = None
    text_pretrained: bool = True
    max_length: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self, "model")


@dataclass
class MaskingConfig:
    """What pretraining masks.

    Args:
        text_mask_ratio: share of the fields masked in the text.
        tabular_mask_ratio: share of the fields masked in the table.
        text_mask_unit: what is masked in the text: whole values of a "field", as in the paper, or any "token" of them.
        mlm_vocabulary: the tokens that a masked token is told from: "all" of the text encoder's, as in the paper, or
            those "seen" in values of the training rows, which costs less.
    """

    text_mask_ratio: float = 0.15
    tabular_mask_ratio: float = 0.15
    text_mask_unit: Literal["field", "token"] = "field"
    mlm_vocabulary: Literal["all", "seen"] = "all"

    def __post_init__(self) -> None:
        check_ranges(self, "masking")


@dataclass
class TrainingConfig:
    """How the one training loop runs.

    Args:
        epochs: passes over the training rows.
        max_steps: stop after this many optimiser steps.
        batch_size: rows of a batch on each device.
        accumulation: batches of one optimiser step.
        contrastive_batches: whose rows pretraining contrasts: those of one "batch" on all devices, or those of the
            whole "window" of `accumulation` batches, for one more forward pass and the memory of one batch.
        learning_rate: peak learning rate of everything but the text encoder.
        text_learning_rate: peak learning rate of the text encoder.
        weight_decay: AdamW's, on matrices other than embeddings.
        oov_dropout: share of the features that finetuning replaces by their field's OOV feature, as a gated fusion
            needs: of all fields, or of each field that is named, such as `{user_id: 0.3}`. The text says "missing" in
            their place if the field's `show_oov` is off.
        feature_l2: L2 penalty on the feature embeddings that a batch reads.
        feature_updates: what an optimiser step changes of the feature table: its "dense" whole, or the "rows" that the
            batch read, which costs the same however large the table is. Rows that were not read then wait, where Adam
            would move them on by its moments, which costs some AUC (benchmarks/README.md). Several processes need
            `shard_features` for it.
        warmup_ratio: share of the steps in which the learning rate rises, before it falls as a cosine.
        max_gradient_norm: gradients are scaled down to this norm.
        precision: "bf16" autocast, "fp32", or "auto": bf16 where the device computes in it.
        compile: compile the text encoder by torch.compile, where torch can. It is for GPUs: on a CPU a step took half
            as long again (benchmarks/README.md).
        evaluation_batch_size: rows of a batch in evaluation, on each device.
        evaluations_per_epoch: evaluations on the validation rows in each epoch.
        patience: stop after this many evaluations without a better one.
        log_steps: optimiser steps between two lines of the log.
        trackers: where the log goes beside its file, out of "tensorboard", "trackio" and "wandb"; by default
            TensorBoard where it is installed, and nowhere for an empty list.
        checkpoint_steps: optimiser steps between two checkpoints: the most work that an interruption can cost.
        checkpoints_kept: how many checkpoints are kept until the run ends; each is about three times the weights.
        workers: processes that prepare batches.
        shard_features: each process holds its own share of the feature table's rows, for tables larger than one process
            holds. Batches are spread over processes as ever.
        seed: of everything random.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 128
    accumulation: int = 1
    contrastive_batches: Literal["batch", "window"] = "batch"
    learning_rate: float = 1e-3
    text_learning_rate: float = 1e-4
    weight_decay: float = 0.01
    oov_dropout: float | dict[str, float] = 0.0
    feature_l2: float = 0.0
    feature_updates: Literal["dense", "rows"] = "dense"
    warmup_ratio: float = 0.05
    max_gradient_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    evaluation_batch_size: int = 512
    evaluations_per_epoch: int = 1
    patience: int = 2
    log_steps: int = 10
    trackers: list[str] | None = None
    checkpoint_steps: int = 500
    checkpoints_kept: int = 2
    workers: int = 0
    shard_features: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "training")


@dataclass
class TrainingRun:
    """What pretraining and finetuning share.

    Args:
        output_dir: where the model, the log and the run's record go.
        resume: go on from the last checkpoint in `output_dir`; start where there is none, and where the run has ended
            do nothing but push.
        push_to_hub: repository on the Hub that gets the model, such as `org/name`; made where there is none. The token
            is the Hub client's: `hf auth login`, or the environment's `HF_TOKEN`.
        private: make the repository private.
        revision: branch to push to, made where there is none; by default `main`.
        push_when: at the "end"; or also whenever validation finds a "best" model so far; or at every "checkpoint" also
            the weights as they are then.
        data: the click log.
        model: what is built; for finetuning from a pretrained FLIP, the settings that replace the saved ones.
        training: how it is trained.
    """

    output_dir: Path
    resume: bool = False
    push_to_hub: str | None = None
    private: bool = False
    revision: str | None = None
    push_when: Literal["end", "best", "checkpoint"] = "end"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.push_to_hub is None and (self.private or self.revision or self.push_when != "end"):
            raise ValueError("private, revision and push_when say how to push: set push_to_hub, as in org/name, too")


@dataclass
class PretrainRun(TrainingRun):
    """A pretraining run; also all settings of `TrainingRun`.

    Args:
        masking: what is masked.
    """

    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass
class FinetuneRun(TrainingRun):
    """A finetuning run; also all settings of `TrainingRun`.

    Args:
        pretrained: folder or repository of a pretrained FLIP; left out, the model starts without pretraining.
        mode: "joint" trains both towers, "id" the ID-based model alone, "text" the text encoder alone.
        fusion_rows: the rows that the weights of the towers' logits are learned from: those of "training", with all
            else, as in the paper; or after that those of "validation", which the towers do not know by heart.

    Raises:
        ValueError: one tower alone has nothing to weigh; `pretrained` is a folder without a model, or it lies in the
            folder that this run writes to.
    """

    pretrained: str | None = None
    mode: Literal["joint", "id", "text"] = "joint"
    fusion_rows: Literal["training", "validation"] = "training"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is not None:
            check_model_folder(self.pretrained, "pretrained")
            if _lies_in(self.pretrained, self.output_dir):
                raise ValueError(
                    f"pretrained={self.pretrained} lies in output_dir={self.output_dir}, and this run would overwrite "
                    "it: choose another output_dir"
                )
        if self.fusion_rows != "training" and self.mode != "joint":
            raise ValueError(f"fusion_rows={self.fusion_rows!r} is for mode='joint', not for mode={self.mode!r}")


@dataclass
class EvaluateRun:
    """An evaluation of a finetuned model on labelled rows.

    Args:
        model: folder or repository of the model.
        output: JSON file to write the metrics to; printed only where left out.
        mode: score with both towers or with one; by default as the model was saved.
        data: the labelled rows: one file, such as `data.test_file`, or the named dataset and the split that the model
            was trained on. Fields and label of a file are by default the model's.
        rows: the split to read, and with files the one of `data.train_file`, `data.validation_file` and
            `data.test_file` to read.
        slices: fields whose unseen values make slices of their own: the rows where each is unseen, and those where all
            of them are seen.
        batch_size: rows of a batch.
        precision: as in training.
    """

    model: str
    output: Path | None = None
    mode: Literal["joint", "id", "text"] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    rows: Literal["train", "validation", "test"] = "test"
    slices: list[str] = field(default_factory=list)
    batch_size: int = 512
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        check_ranges(self)
        check_model_folder(self.model, "model")
        if self.output is not None:
            check_output(self.output, [self.data.train_file, self.data.validation_file, self.data.test_file])


@dataclass
class PredictRun:
    """Scores of a file's rows.

    Args:
        model: folder or repository of the model.
        input: CSV or Parquet file with the fields' columns.
        output: file to write: row numbers, kept columns and click probabilities. Its name says the format: .parquet,
            .csv or .csv.gz, and for JSON Lines .jsonl, .json, .jsonl.gz or .json.gz.
        keep: columns of the input to copy to the output unchanged, such as `[request_id]`. They need not be fields.
        mode: score with both towers or with one; by default as the model was saved.
        text_budget: share of the rows whose text is read, those that the ID-based model of both towers is least sure
            of; all others get the ID-based model's probability. Each chunk of rows is looked at by itself.
        batch_size: rows of a batch.
        chunk_rows: rows held in memory at a time.
        precision: as in training.
    """

    model: str
    input: Path
    output: Path
    keep: list[str] = field(default_factory=list)
    mode: Literal["joint", "id", "text"] | None = None
    text_budget: float | None = None
    batch_size: int = 512
    chunk_rows: int = 8192
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        check_ranges(self)
        ending_of(self.output)
        check_output(self.output, [self.input])
        check_model_folder(self.model, "model")


RunConfig = TypeVar("RunConfig", PretrainRun, FinetuneRun, EvaluateRun, PredictRun)


def parse_run(kind: type[RunConfig], arguments: Sequence[str] | None = None) -> RunConfig:
    """The run that the command line asks for: `--config FILE.yaml`, then overrides such as `--training.epochs 3`.

    Names may be written with dashes (`--push-to-hub`), and a switch without its value (`--private`) is on.

    Args:
        kind: the run's dataclass.
        arguments: the command line; by default the program's own.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    # A file of settings holds values. Where a setting takes any of them, `class_path` would have a program named by the
    # file imported and called.
    set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; later arguments override it")
    parser.add_class_arguments(kind)
    switches = {f"--{f.name}" for f in fields(kind) if f.type is bool}
    parsed = parser.parse_args(_spelled_out(sys.argv[1:] if arguments is None else arguments, switches))
    parsed.pop("config")
    run: RunConfig = kind(**parser.instantiate(parsed).as_dict())
    return run


def _spelled_out(arguments: Sequence[str], switches: Container[str]) -> list[str]:
    """The arguments with underscores in their names and a value for every switch."""
    spelled = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            if name in switches and not equals and (i + 1 == len(arguments) or arguments[i + 1].startswith("--")):
                equals, value = "=", "true"
        spelled.append(f"{name}{equals}{value}")
    return spelled


def check_label(label: str, fields: Sequence[str | None]) -> None:
    """Raises a ValueError where the label column is one of the fields."""
    if label in fields:
        raise ValueError(
            f"data.fields names {label!r}, which is the label: the model would read the answer. Leave it out of the "
            "fields, or set data.label"
        )


def check_model_folder(name: str, setting: str) -> None:
    """Raises a ValueError where a name is neither a folder with a model nor one that a repository may have.

    Args:
        name: folder or repository of a model.
        setting: what sets it, for the error.
    """
    folder = Path(name)
    if not folder.exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            message = "there is no such folder, and a repository's name looks like org/name"
            raise ValueError(f"{setting}={name}: {message}") from error
    elif not (folder / CONFIG_NAME).is_file():
        better = folder / MODEL_FOLDER
        hint = f"; did you mean {better}?" if (better / CONFIG_NAME).is_file() else ""
        raise ValueError(f"{setting}={name}: this folder holds no model, as it lacks {CONFIG_NAME}{hint}")


def _lies_in(name: str, folder: Path) -> bool:
    path = Path(name)
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def as_plain(run: Any) -> dict[str, Any]:
    """A run's settings as plain JSON types."""
    return {name: _plain(value) for name, value in asdict(run).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return str(value) if isinstance(value, Path) else value
