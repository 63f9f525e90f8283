"""FLIP in `transformers.Trainer`; docs/how_to/trainer.md shows how to use it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from flip_hf.data.collator_checks import check_collator, check_training_rows, find_flip_model
from flip_hf.data.collators import FlipCTRCollator, FlipPretrainingCollator
from flip_hf.data.encoded_rows import check_stream, column_values, has_column
from flip_hf.data.files import is_place, stream_tables
from flip_hf.data.groups import GROUP_COLUMN
from flip_hf.data.tables import column_names
from flip_hf.hub import push_to_hub
from flip_hf.scoring import LOGITS
from flip_hf.training.cpu import fast_cpu_training
from flip_hf.training.evaluation import ctr_metrics
from flip_hf.training.loop import count_items
from flip_hf.training.protocols import TrainingCollator

logger = logging.getLogger(__name__)

# Encoded rows have at least one of these columns.
_VIEWS = {"feature_ids", "input_ids"}


class CollatorEpochs(TrainerCallback):
    """Passes the epoch to the collator, so that each epoch has new masks; without it, all epochs have the same masks.

    Args:
        collator: the Trainer's `FlipPretrainingCollator` or `FlipCTRCollator`.

    Raises:
        ValueError: at the start of training, in these cases: `dataloader_persistent_workers` is True (persistent
            workers keep the masks of the first epoch); the feature table is sharded (Trainer would clip gradients
            separately in each process); the collator is not for the model; the rows lack a column or a label; batches
            depend on row numbers, but some rows share a number; batches depend on row numbers, but several workers read
            a stream; or `label_smoothing_factor` is set.
    """

    def __init__(self, collator: TrainingCollator) -> None:
        self.collator = collator
        self._num_passes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._num_passes = 0
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True: persistent workers would use the masks of the first epoch in all "
                "epochs; set it to False"
            )
        if kwargs["model"].sharded_parameters:
            raise ValueError(
                "Trainer can't train a sharded feature table; train with flip-hf finetune instead, or load the model "
                "without sharding"
            )
        loader = kwargs.get("train_dataloader")
        _check(kwargs["model"], args, self.collator, getattr(loader, "dataset", None))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `state.epoch` is a fraction if training resumes within an epoch, and if a stream begins again.
        self.collator.set_epoch(max(int(state.epoch), self._num_passes))
        self._num_passes += 1


class FlipTrainer(Trainer):
    """A Trainer for FLIP models: it encodes raw rows itself and averages pretraining losses exactly.

    With `processing_class=processor`, each data set may be raw rows in any form that `FlipProcessor.encode_dataset`
    takes: a DataFrame, a `datasets.Dataset`, an Arrow table, a list of dicts, or files. FlipTrainer encodes the rows,
    builds the model's collator if `data_collator` is not given, and saves the processor beside each saved model. It
    uses encoded rows unchanged.

    FlipTrainer never changes `args`. `remove_unused_columns` removes only columns that the collator does not read. If
    batches depend on the epoch, as masks do, FlipTrainer adds a `CollatorEpochs`. If `compute_metrics` is not given, it
    evaluates a `FlipForCTR` with `click_metrics`. On a CPU, the text encoder trains as in `flip-hf finetune`
    (`training.cpu`).

    A plain Trainer counts only `labels`, which pretraining does not have. It averages the batch means over accumulated
    batches and processes, so a masked item has more weight in a batch with fewer masked items. FlipTrainer weighs all
    masked items of a step equally. Finetuning is exact in both.

    If evaluation rows have groups (`group_field`), `label_ids` is a tuple of labels and groups, int64 (rows,), both in
    `predict` and for `compute_metrics`. `click_metrics` then adds GAUC and UAUC.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`, or a wrapper around one, such as PEFT's.
        args: as in Trainer.
        data_collator: the default is `FlipPretrainingCollator(processor)` or `FlipCTRCollator(processor)` in the
            model's mode, with the seed `args.data_seed`, or `args.seed` if that is not set.
        train_dataset: training rows; `FlipForCTR` needs the processor's label column.
        eval_dataset: evaluation rows, or a dict of several sets of rows by name. A dict whose keys include all of the
            processor's fields is one set of rows, as a dict of columns.
        processing_class: the model's processor. It may be left out only if the rows are encoded and `data_collator` is
            given.
        more: as in Trainer.
        group_field: column of the evaluation rows whose values group the rows, such as `user_id`.
        kwargs: as in Trainer.

    Raises:
        InputError: rows can't be encoded; names the row, the field and the value.
        ValueError: rows are not encoded, and there is no processor; the collator is not for the model; the training
            rows have no label; batches depend on row numbers, but some rows share a number; batches depend on row
            numbers, but several workers read a stream; or `label_smoothing_factor` is set.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *more: Any,
        group_field: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, *more, **kwargs)
        _, self._kind = find_flip_model(self.model) or (None, "")
        if data_collator is None:
            self.data_collator = self._default_collator()
        self._group_field = group_field
        self.train_dataset = self._encoded(train_dataset, "train_dataset")
        self.eval_dataset = self._encoded_parts(eval_dataset, "eval_dataset")
        _check(self.model, self.args, self.data_collator, self.train_dataset)
        collator: Any = self.data_collator
        if getattr(collator, "reads_numbers", False) and not any(
            isinstance(callback, CollatorEpochs) for callback in self.callback_handler.callbacks
        ):
            self.add_callback(CollatorEpochs(collator))
        # Click metrics need all rows at once, so they can't be computed batch by batch.
        if self._kind == "FlipForCTR" and self.compute_metrics is None and not self.args.batch_eval_metrics:
            self.compute_metrics = click_metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as Trainer does; `eval_dataset` may be rows in any form that the constructor takes."""
        parts: Any = self.eval_dataset
        # If `eval_dataset` is a dict, Trainer calls this with the name of each part.
        if not (isinstance(parts, dict) and isinstance(eval_dataset, str) and eval_dataset in parts):
            eval_dataset = self._encoded_parts(eval_dataset, "eval_dataset")
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts as Trainer does; `test_dataset` may be rows in any form that the constructor takes.

        The rows may lack labels.
        """
        return super().predict(
            self._encoded(test_dataset, "test_dataset", self._group_field, needs_label=False), *args, **kwargs
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Pushes the model, its processor, a model card and the loading code to the Hub, in one commit.

        The repository is `args.hub_model_id`; if that is not set, it is named after `args.output_dir`. Trainer's
        checkpoints and arguments are not pushed, because they are pickles. In a distributed run, every process must
        call this.

        Args:
            commit_message: message of the commit.
            blocking: must be True.
            token: token with write access; the default is `args.hub_token`, or the token of `hf auth login`.
            revision: branch to push to, created if needed; the default is `args.hub_revision`, or "main".
            private: make the repository private; the default is `args.hub_private_repo`.
            record: the record (`run.json`) of a run of `flip-hf`, from which the card is written. By default, the card
                is Trainer's draft.
            kwargs: as in Trainer: content of the draft, such as `dataset` and `language`.

        Returns:
            The hash of the commit in the main process; None in other processes.

        Raises:
            ValueError: `blocking` is False, the model is a PEFT model, or as in `flip_hf.hub.push_to_hub`.
            OSError: as in `flip_hf.hub.push_to_hub`.
        """
        if not blocking:
            raise ValueError(
                "blocking=False is not supported, because a failed push must be retried as one commit; leave it out"
            )
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            raise ValueError("only a whole model can be pushed; merge the adapters first: model.merge_and_unload()")
        # Under FSDP, each process holds only a part of the model.
        weights = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return None
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        card = None
        if record is None:
            self.create_model_card(**{"model_name": str(self.hub_model_id).rpartition("/")[-1]} | kwargs)
            draft = ModelCard.load(Path(str(self.args.output_dir)) / "README.md")
            draft.data.library_name = "flip_hf"
            card = str(draft)

        class Prepared:
            """The model with the weights gathered from all processes."""

            def save_pretrained(self, folder: Path, **settings: Any) -> None:
                model.save_pretrained(folder, state_dict=weights, **settings)

        return push_to_hub(
            str(self.hub_model_id),
            model=Prepared(),
            processor=self.processing_class,
            record=record,
            card=card,
            private=private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message or "End of training",
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # With `push_to_hub=True`, Trainer's method would upload its arguments as a pickle, and no loading code.
        if self.args.hub_strategy != HubStrategy.END:
            try:
                self.push_to_hub(f"Training in progress, step {self.state.global_step}")
            except OSError as error:
                logger.warning("pushing to %s failed, and training continues: %s", self.hub_model_id, error)

    def _default_collator(self) -> Any:
        processor: Any = self.processing_class
        if not hasattr(processor, "encode_dataset") or not self._kind:
            raise ValueError(
                "FlipTrainer needs a collator. To have it built, pass a FlipForPreTraining or a FlipForCTR and "
                "processing_class=processor, a FlipProcessor; otherwise pass encoded rows and data_collator"
            )
        if self._kind == "FlipForPreTraining":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return FlipPretrainingCollator(processor, seed)
        return FlipCTRCollator.from_model(processor, self.model)

    @property
    def _field_names(self) -> list[str]:
        """The names of the processor's fields; empty without a FlipProcessor."""
        return [f.name for f in getattr(self.processing_class, "fields", [])]

    def _encoded_parts(self, rows: Any, name: str) -> Any:
        """Encodes one set of rows, or a dict of several sets."""
        fields = self._field_names
        if not isinstance(rows, Mapping) or (fields and set(fields) <= set(rows)):
            return self._encoded(rows, name, self._group_field)
        return {key: self._encoded(part, f"{name}[{key!r}]", self._group_field) for key, part in rows.items()}

    def _encoded(self, rows: Any, name: str, group_field: str | None = None, *, needs_label: bool = True) -> Any:
        """Returns rows that a DataLoader can read; encodes them unless they are encoded already."""
        if rows is None:
            return None
        processor: Any = self.processing_class
        fields = self._field_names
        columns = [] if is_place(rows) else column_names(rows)
        if _VIEWS & (set(columns) - set(fields)):
            if group_field is not None and GROUP_COLUMN not in columns:
                raise ValueError(
                    f"{name} was encoded without groups: encode it with processor.encode_dataset(rows, "
                    f"group_field={group_field!r}), or pass the raw rows to FlipTrainer"
                )
            return datasets.Dataset(rows) if isinstance(rows, pa.Table) else rows
        if isinstance(rows, TorchDataset) and not isinstance(rows, datasets.IterableDataset):
            return rows
        if not hasattr(processor, "encode_dataset"):
            if not isinstance(self.data_collator, FlipCTRCollator | FlipPretrainingCollator):
                return rows
            raise ValueError(
                f"{name} is not encoded: pass processing_class=processor, so that FlipTrainer encodes it, or pass "
                "processor.encode_dataset(rows)"
            )
        with_label = self._kind == "FlipForCTR"
        if with_label and not needs_label:
            label = [processor.label] if processor.label else []
            if is_place(rows):
                columns = next(stream_tables(rows, fields, optional=label, batch_rows=1)).column_names
            with_label = bool(set(label) & set(columns))
        # The main process encodes first; the other processes then find the encoded rows in the cache on disk.
        with self.args.main_process_first(desc=f"encoding {name}"):
            source = None if is_place(rows) else name
            return processor.encode_dataset(rows, with_label=with_label, source=source, group_field=group_field)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        collator: Any = self.data_collator
        collator = collator.collator if isinstance(collator, _WithGroups) else collator
        # Trainer removes the columns that `forward` does not take, but collators and grouping by length read more.
        if isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
            taken: Any = self._signature_columns
            self._signature_columns: Any = list(dict.fromkeys([*taken, *collator.columns, GROUP_COLUMN]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; on a CPU, the text encoder trains as in `flip-hf finetune` (`training.cpu`)."""
        model: Any = self.model
        # PEFT's wrapper has a `base_model` of its own.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        with fast_cpu_training(model, self.args.device):
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Returns the batches of one optimiser step, and the numbers of items that their losses average over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals = count_items(self.accelerator.unwrap_model(self.model), batches, self.accelerator)
        if not self.args.average_tokens_across_devices:
            # Trainer then omits the factor that compensates for averaging gradients over processes.
            totals = {name: total / self.accelerator.num_processes for name, total in totals.items()}
        return batches, totals

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns Trainer's loader; batches also hold `groups` if the rows were encoded with `group_field`."""
        with self._batches_with_groups():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Returns Trainer's loader; batches also hold `groups` if the rows were encoded with `group_field`."""
        with self._batches_with_groups():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _batches_with_groups(self) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = _WithGroups(collator)
        try:
            yield
        finally:
            self.data_collator = collator

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Predicts a batch as Trainer does; if the batch has groups, the labels are a tuple of labels and groups."""
        groups = inputs.pop("groups", None)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits, labels if labels is None or groups is None else (labels, groups)


class _WithGroups:
    """Wraps a collator to add `groups` to the batch if the rows have them."""

    def __init__(self, collator: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if has_column(rows, GROUP_COLUMN):
            batch["groups"] = torch.from_numpy(column_values(rows, GROUP_COLUMN).astype("int64"))
        return batch


def _check(model: Any, args: Any, collator: Any, rows: Any) -> None:
    """Raises ValueError before training for mistakes that Trainer would not notice or not explain."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: Trainer's label smoothing needs one logit per "
            "class, but FLIP has one logit per row and computes its own loss; set it to 0"
        )
    check_collator(collator, model)
    check_stream(rows, args.dataloader_num_workers, collator)
    if isinstance(rows, datasets.Dataset):
        check_training_rows(rows, collator)


def click_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Computes click metrics of a `FlipForCTR`, for Trainer's `compute_metrics`.

    In joint mode, the results include the metrics of each tower, such as `id_auc` and `text_auc`.

    Args:
        prediction: predictions are logits, float (rows,), or a tuple of the model's and its towers' logits. Labels are
            (rows,), or from `FlipTrainer` a tuple of labels and groups, which adds GAUC and UAUC.
    """
    found: Any = prediction.predictions
    # A model with one tower returns the same logits twice; `ctr_metrics` ignores the second.
    scores = dict(zip(LOGITS, found if isinstance(found, tuple) else (found,), strict=False))
    labels: Any = prediction.label_ids
    if isinstance(labels, tuple):
        labels, scores["groups"] = labels
    return ctr_metrics(scores | {"labels": labels})
