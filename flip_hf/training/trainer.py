"""What `transformers.Trainer` is told about FLIP; docs/trainer.md shows it at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback

from flip_hf.data.collator_checks import check_collator, check_training_rows
from flip_hf.data.encoded_rows import check_stream
from flip_hf.data.groups import GROUP_COLUMN
from flip_hf.training.cpu import fast_cpu_training
from flip_hf.training.evaluation import ctr_metrics
from flip_hf.training.loop import count_items


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

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_persistent_workers:
            raise ValueError(
                "workers that outlive an epoch keep the masks of the first one; set dataloader_persistent_workers=False"
            )
        if kwargs["model"].sharded_parameters:
            raise ValueError("Trainer can't train a sharded feature table; the package's own loop (examples/) does")
        loader = kwargs.get("train_dataloader")
        _check(kwargs["model"], args, self.collator, getattr(loader, "dataset", None))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A fraction where training resumes within an epoch.
        self.collator.set_epoch(int(state.epoch))


class FlipTrainer(Trainer):
    """A Trainer whose pretraining losses are means over all that an optimiser step masks, which measures clicks within
    groups, and which is fast on a CPU.

    A plain Trainer counts `labels` only, of which pretraining has none: it averages the means of the accumulated
    batches and processes, so an item weighs more in a batch that masks fewer. Finetuning is exact in both.

    Where evaluation rows were encoded with `group_field`, `label_ids` is a tuple of the labels and the groups, int64
    (rows,), in `predict` and for `compute_metrics`: then `click_metrics` gives GAUC and UAUC too.

    Raises:
        ValueError: the collator is not for the model, the training rows have no label or share row numbers that masks
            are a function of, several workers read a stream and batches depend on row numbers, or
            `label_smoothing_factor` is set.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        has_all_columns = not self.args.remove_unused_columns
        _check(self.model, self.args, self.data_collator, self.train_dataset, has_all_columns)

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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Else Trainer drops the column, which the model does not take.
        columns: Any = self._signature_columns
        if GROUP_COLUMN not in columns:
            columns.append(GROUP_COLUMN)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As Trainer's; with groups the labels are a tuple of labels and groups, which Trainer gathers alike."""
        groups = inputs.pop("groups", None)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits, labels if labels is None or groups is None else (labels, groups)


class _WithGroups:
    """A collator whose batches come with the groups of rows that have one."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self.collator(rows)
        is_table = isinstance(rows, pa.Table)
        if GROUP_COLUMN in (rows.column_names if is_table else rows[0]):
            groups = rows[GROUP_COLUMN].to_pylist() if is_table else [int(row[GROUP_COLUMN]) for row in rows]
            batch["groups"] = torch.tensor(groups)
        return batch


def _check(model: Any, args: Any, collator: Any, rows: Any, has_all_columns: bool = True) -> None:
    """Raises ValueError, before training, for what Trainer itself would not notice or not explain."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: Trainer smooths a softmax over classes, and FLIP "
            "has one logit a row and computes the losses of its towers itself; set it to 0"
        )
    check_collator(collator, model)
    check_stream(rows, args.dataloader_num_workers, collator)
    # Trainer may drop columns of the rows later.
    if isinstance(rows, datasets.Dataset) and has_all_columns:
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
    names = ("logits", "id_logits", "text_logits")
    scores = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))
    labels: Any = prediction.label_ids
    if isinstance(labels, tuple):
        labels, scores["groups"] = labels
    return ctr_metrics(scores | {"labels": labels})
