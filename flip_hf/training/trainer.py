"""What `transformers.Trainer` is told about FLIP; docs/how_to/trainer.md shows it at work."""

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

# By these, rows that are encoded are known.
_VIEWS = {"feature_ids", "input_ids"}


class CollatorEpochs(TrainerCallback):
    """Tells the collator each epoch, so that each masks (or drops) anew; without it, every epoch masks alike.

    Args:
        collator: `FlipPretrainingCollator` or `FlipCTRCollator`, the one that Trainer has.

    Raises:
        ValueError: when training begins, if its workers outlive an epoch: they would keep the first one's masks; if
            the feature table is sharded, whose gradients Trainer would clip by each process's own rows; if the collator
            is not for the model, or the rows lack a column or a label or share row numbers that masks are a function
            of; if several workers read a stream and batches depend on row numbers; or if `label_smoothing_factor` is
            set.
    """

    def __init__(self, collator: TrainingCollator) -> None:
        self.collator = collator
        self._num_passes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._num_passes = 0
        if args.dataloader_persistent_workers:
            raise ValueError(
                "workers that outlive an epoch keep the masks of the first one; set dataloader_persistent_workers=False"
            )
        if kwargs["model"].sharded_parameters:
            raise ValueError(
                "Trainer can't train a sharded feature table; the package's own loop (flip-hf finetune) does"
            )
        loader = kwargs.get("train_dataloader")
        _check(kwargs["model"], args, self.collator, getattr(loader, "dataset", None))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A fraction where training resumes within an epoch, and where a stream begins again.
        self.collator.set_epoch(max(int(state.epoch), self._num_passes))
        self._num_passes += 1


class FlipTrainer(Trainer):
    """A Trainer that takes rows as users have them, and whose pretraining losses are means over all that a step masks.

    With `processing_class=processor`, every data set may be rows in any form that `FlipProcessor.encode_dataset` takes:
    a DataFrame, a `datasets.Dataset`, an Arrow table, a list of dicts, files. FlipTrainer encodes them, makes the
    model's collator where `data_collator` is not given, and saves the processor beside each model that it saves. Rows
    that are encoded already are taken as they are.

    FlipTrainer never changes `args`. `remove_unused_columns` removes only what the collator does not read. If batches
    depend on the epoch, as masks do, a `CollatorEpochs` is added. If `compute_metrics` is not given, a `FlipForCTR` is
    evaluated by `click_metrics`. On a CPU the text encoder trains as in the package's own loop (`training.cpu`).

    A plain Trainer counts `labels` only, of which pretraining has none: it averages the means of the accumulated
    batches and processes, so an item weighs more in a batch that masks fewer. Finetuning is exact in both.

    With `group_field`, and where evaluation rows were encoded with one, `label_ids` is a tuple of the labels and the
    groups, int64 (rows,), in `predict` and for `compute_metrics`: then `click_metrics` gives GAUC and UAUC too.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`, or a wrapper around one, such as PEFT's.
        args: as in Trainer.
        data_collator: by default `FlipPretrainingCollator(processor)` or `FlipCTRCollator(processor)` in the model's
            mode; its seed is `args.data_seed`, or else `args.seed`.
        train_dataset: training rows; `FlipForCTR` needs the processor's label column.
        eval_dataset: the same, or a dict of such rows by name. A dict that has all of the processor's fields as keys is
            one set of rows, a dict of columns.
        processing_class: the model's processor. Only encoded rows with a `data_collator` can do without it.
        more: as in Trainer.
        group_field: column of the evaluation rows whose values group them, such as `user_id`.
        kwargs: as in Trainer.

    Raises:
        InputError: rows can't be encoded; says which row, field and value.
        ValueError: rows are not encoded and there is no processor; the collator is not for the model, the training rows
            have no label or share row numbers that masks are a function of, several workers read a stream and batches
            depend on row numbers, or `label_smoothing_factor` is set.
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
        # The metrics need all rows at once.
        if self._kind == "FlipForCTR" and self.compute_metrics is None and not self.args.batch_eval_metrics:
            self.compute_metrics = click_metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; `eval_dataset` may be rows in any form that the constructor takes, or files."""
        parts: Any = self.eval_dataset
        # Trainer passes the names of a dict's parts.
        if not (isinstance(parts, dict) and isinstance(eval_dataset, str) and eval_dataset in parts):
            eval_dataset = self._encoded_parts(eval_dataset, "eval_dataset")
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; `test_dataset` may be rows in any form that the constructor takes, with or without labels."""
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
        """Pushes the model, its processor, a card and the code that loads them, in one commit.

        The repository is `args.hub_model_id`, or named after `args.output_dir`. Trainer's checkpoints and arguments,
        which are pickles, are not pushed. In a distributed run every process must call this.

        Args:
            commit_message: of the commit.
            blocking: must be True.
            token: by default `args.hub_token`, or else the one of the login.
            revision: branch, made where there is none; by default `args.hub_revision`, or else "main".
            private: make the repository private; by default `args.hub_private_repo`.
            record: the record of a run of the package's own loop, `run.json`: the card is written from it. By default
                the card is Trainer's draft.
            kwargs: as in Trainer: what its draft of a card says, such as `dataset` and `language`.

        Returns:
            The commit's hash in the main process, None in others.

        Raises:
            ValueError: `blocking` is False, the model is PEFT's, or as in `flip_hf.hub.push_to_hub`.
            OSError: as in `flip_hf.hub.push_to_hub`.
        """
        if not blocking:
            raise ValueError("blocking=False is not supported: the push is one commit, and is made again if it fails")
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            raise ValueError("only a whole model can be pushed; merge the adapters first, model.merge_and_unload()")
        # Of a model that is spread over processes, each of them holds a part.
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
            """The model, with its weights from all processes."""

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
        # With `push_to_hub=True` Trainer's own would upload its arguments, a pickle, and no code that loads the model.
        if self.args.hub_strategy != HubStrategy.END:
            try:
                self.push_to_hub(f"Training in progress, step {self.state.global_step}")
            except OSError as error:
                logger.warning("%s was not pushed, and training goes on: %s", self.hub_model_id, error)

    def _default_collator(self) -> Any:
        processor: Any = self.processing_class
        if not hasattr(processor, "encode_dataset") or not self._kind:
            raise ValueError(
                "FlipTrainer makes the collator of a FlipForPreTraining or a FlipForCTR from processing_class="
                "processor, a FlipProcessor; give both, or encoded rows and data_collator"
            )
        if self._kind == "FlipForPreTraining":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return FlipPretrainingCollator(processor, seed)
        return FlipCTRCollator.from_model(processor, self.model)

    @property
    def _field_names(self) -> list[str]:
        """The processor's fields; none without a processor of ours."""
        return [f.name for f in getattr(self.processing_class, "fields", [])]

    def _encoded_parts(self, rows: Any, name: str) -> Any:
        """One set of rows, or a dict of several, encoded."""
        fields = self._field_names
        if not isinstance(rows, Mapping) or (fields and set(fields) <= set(rows)):
            return self._encoded(rows, name, self._group_field)
        return {key: self._encoded(part, f"{name}[{key!r}]", self._group_field) for key, part in rows.items()}

    def _encoded(self, rows: Any, name: str, group_field: str | None = None, *, needs_label: bool = True) -> Any:
        """Rows that a DataLoader can read: encoded here, unless they are already."""
        if rows is None:
            return None
        processor: Any = self.processing_class
        fields = self._field_names
        columns = [] if is_place(rows) else column_names(rows)
        if _VIEWS & (set(columns) - set(fields)):
            if group_field is not None and GROUP_COLUMN not in columns:
                raise ValueError(
                    f"{name} is encoded without its groups: encode it with processor.encode_dataset(rows, "
                    f"group_field={group_field!r}), or give FlipTrainer the rows as they are"
                )
            return datasets.Dataset(rows) if isinstance(rows, pa.Table) else rows
        if isinstance(rows, TorchDataset) and not isinstance(rows, datasets.IterableDataset):
            return rows
        if not hasattr(processor, "encode_dataset"):
            if not isinstance(self.data_collator, FlipCTRCollator | FlipPretrainingCollator):
                return rows
            raise ValueError(
                f"{name} is not encoded: give processing_class=processor, which FlipTrainer encodes it with, or "
                "processor.encode_dataset(rows)"
            )
        with_label = self._kind == "FlipForCTR"
        if with_label and not needs_label:
            label = [processor.label] if processor.label else []
            if is_place(rows):
                columns = next(stream_tables(rows, fields, optional=label, batch_rows=1)).column_names
            with_label = bool(set(label) & set(columns))
        # Where rows lie on disk, the other processes find them encoded.
        with self.args.main_process_first(desc=f"encoding {name}"):
            source = None if is_place(rows) else name
            return processor.encode_dataset(rows, with_label=with_label, source=source, group_field=group_field)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        collator: Any = self.data_collator
        collator = collator.collator if isinstance(collator, _WithGroups) else collator
        # Trainer removes the columns that `forward` does not take. Collators read more; grouping by length reads texts.
        if isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
            taken: Any = self._signature_columns
            self._signature_columns: Any = list(dict.fromkeys([*taken, *collator.columns, GROUP_COLUMN]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; on a CPU the text encoder trains as in the package's own loop (`training.cpu`)."""
        model: Any = self.model
        # PEFT's wrapper has a `base_model` of its own.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        with fast_cpu_training(model, self.args.device):
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimiser step, and what their losses are means over (`count_items`)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals = count_items(self.accelerator.unwrap_model(self.model), batches, self.accelerator)
        if not self.args.average_tokens_across_devices:
            # Trainer then leaves out the factor that makes up for averaging gradients over processes.
            totals = {name: total / self.accelerator.num_processes for name, total in totals.items()}
        return batches, totals

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's; batches hold the `groups` of rows that were encoded with `group_field`."""
        with self._batches_with_groups():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As Trainer's; batches hold the `groups` of rows that were encoded with `group_field`."""
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
        """As Trainer's; with groups the labels are a tuple of labels and groups, which Trainer gathers alike."""
        groups = inputs.pop("groups", None)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits, labels if labels is None or groups is None else (labels, groups)


class _WithGroups:
    """A collator whose batches come with the groups of rows that have one."""

    def __init__(self, collator: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if has_column(rows, GROUP_COLUMN):
            batch["groups"] = torch.from_numpy(column_values(rows, GROUP_COLUMN).astype("int64"))
        return batch


def _check(model: Any, args: Any, collator: Any, rows: Any) -> None:
    """Raises ValueError, before training, for what Trainer itself would not notice or not explain."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: Trainer smooths a softmax over classes, and FLIP "
            "has one logit a row and computes the losses of its towers itself; set it to 0"
        )
    check_collator(collator, model)
    check_stream(rows, args.dataloader_num_workers, collator)
    if isinstance(rows, datasets.Dataset):
        check_training_rows(rows, collator)


def click_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for `FlipForCTR`: the metrics of its logits, in joint mode also of each tower's (`id_auc`,
    `text_auc`).

    Args:
        prediction: logits float (rows,) or a tuple of the model's logits and its towers'; labels (rows,), or from
            `FlipTrainer` a tuple of labels and groups, which adds GAUC and UAUC.
    """
    found: Any = prediction.predictions
    # One tower alone repeats the model's logits, under a name that nothing reads.
    scores = dict(zip(LOGITS, found if isinstance(found, tuple) else (found,), strict=False))
    labels: Any = prediction.label_ids
    if isinstance(labels, tuple):
        labels, scores["groups"] = labels
    return ctr_metrics(scores | {"labels": labels})
