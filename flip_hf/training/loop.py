"""The training loop of pretraining and finetuning."""

import itertools
import logging
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader

from flip_hf.data.collator_checks import check_collator, check_training_rows
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.data.sampling import LengthGroupedBatchSampler, text_lengths
from flip_hf.progress import progress_bar
from flip_hf.training.compiling import compile_text_encoder
from flip_hf.training.cpu import fast_cpu_training
from flip_hf.training.gradient_cache import contrast_over_window
from flip_hf.training.meter import Progress, memory_in_use
from flip_hf.training.optimization import build_optimizer, build_schedule, clip_gradients, learning_rates
from flip_hf.training.protocols import PreparedModel, SavedProcessor, TrainableModel, TrainingCollator, TrainingRun
from flip_hf.training.settings import TrainingSettings
from flip_hf.training.signals import Stopped, StopSignals, delayed_signals, leave_signals_to_parent
from flip_hf.training.state import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Goal:
    """The validation metric that chooses the best model."""

    metric: str
    larger_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        """Returns whether `value` beats the best so far; any value beats None, and only numbers beat NaN."""
        if best is None:
            return True
        if math.isnan(value) or math.isnan(best):
            return math.isnan(best) and not math.isnan(value)
        return value > best if self.larger_is_better else value < best


def click_goal(labels: np.ndarray) -> Goal:
    """Returns the goal of finetuning: AUC, or LogLoss if all validation rows have the same label.

    Args:
        labels: labels of the validation rows, 0 or 1 (rows,).
    """
    if labels.min() != labels.max():
        return Goal("auc", larger_is_better=True)
    logger.warning(
        "all %d validation rows have the label %d, so AUC is undefined; LogLoss chooses the best model",
        len(labels),
        labels[0],
    )
    return Goal("logloss", larger_is_better=False)


class WithRowNumbers:
    """Wraps a collator to return each batch with its row numbers, so that errors can name the rows."""

    def __init__(self, collator: Callable[[pa.Table], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: pa.Table) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor(rows["row"].to_numpy()), self.collator(rows)


def train(
    model: TrainableModel,
    rows: Dataset,
    collator: TrainingCollator,
    settings: TrainingSettings,
    run: TrainingRun,
    goal: Goal,
    evaluate: Callable[[PreparedModel, str], dict[str, float]],
    processor: SavedProcessor,
) -> dict[str, Any]:
    """Trains a model and keeps the best one on the validation rows.

    Training ends after the given epochs or steps, or when validation stops improving. If the run resumes, training
    continues from the run's last checkpoint. On SIGTERM or SIGINT, training completes the current step, saves a
    checkpoint and ends the program.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`.
        rows: the encoded training rows.
        collator: makes batches of the rows; `set_epoch` is called at the start of each epoch.
        settings: the training settings.
        run: receives the log, the checkpoints and the best model.
        goal: the validation metric that chooses the best model.
        evaluate: computes the validation metrics of the prepared model; the second argument describes the moment.
        processor: saved beside the model.

    Returns:
        The best validation metrics, the step of the best model, the steps taken and the training rows per second.

    Raises:
        FloatingPointError: a loss or a gradient is NaN or infinite; names the step, the parts of the loss and the rows.
        ValueError: the collator is not for this model; the rows lack a column or labels; masks depend on row numbers,
            and two rows share one; the feature table is sharded and FSDP is on; `feature_updates` is "rows" on several
            processes without `shard_features`; or `contrastive_batches` is "window" and the model has no contrastive
            objective.
        Stopped: a signal came, and a checkpoint was saved. If it is not caught, the program's exit code is
            `flip_hf.training.signals.EXIT_STOPPED`.
        OSError: a checkpoint or a model could not be written. The previous ones are intact.
    """
    check_training(model, rows, collator, settings, run.accelerator)
    loader = _loader(rows, collator, settings, run.accelerator)
    run.record["goal"] = asdict(goal)
    with _Training(model, loader, collator, settings, run, processor) as training:
        plan, progress = training.plan, training.progress
        while True:
            # Evaluate first, because the checkpoint may have been saved between a step and its evaluation.
            if plan.is_due(progress.step) and progress.evaluated_step < progress.step:
                training.take_metrics(evaluate(training.model, f"validation at step {progress.step}"), goal)
                # A signal may have come during the evaluation.
                training.stop_if_told()
            if progress.step == plan.total_steps or progress.without_better >= settings.patience:
                return progress.result(plan.total_steps)
            training.take_step()
            # Stop before the evaluation, which may take longer than the sender of the signal waits.
            training.stop_if_told()
            training.save_if_due()


def check_training(
    model: TrainableModel,
    rows: Dataset,
    collator: TrainingCollator,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> None:
    """Raises the ValueErrors of `train` that can be detected before the first step; arguments as in `train`."""
    check_collator(collator, model)
    check_training_rows(rows, collator)
    if "row" not in rows.column_names:
        raise ValueError(
            "the encoded rows lack the column 'row', which errors need to name rows: encode with "
            "processor.encode_dataset, or number the rows with rows.add_column('row', list(range(len(rows))))"
        )
    if settings.contrastive_batches == "window" and not model.contrasts_rows:
        raise ValueError(
            "training.contrastive_batches is 'window', but this model has no contrastive objective; use it only for "
            "pretraining, with a positive weight of icl in model.options.objectives"
        )
    if model.sharded_parameters and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "training.shard_features and FSDP would both shard the feature table: set shard_features to false, or "
            "launch without FSDP"
        )
    if settings.feature_updates == "rows" and accelerator.num_processes > 1 and not model.sharded_parameters:
        raise ValueError(
            "training.feature_updates='rows' on several processes needs a sharded feature table: set "
            "training.shard_features to true, or training.feature_updates to 'dense'"
        )


def _loader(
    rows: Dataset, collator: TrainingCollator, settings: TrainingSettings, accelerator: Accelerator
) -> DataLoader[Any]:
    sampler = LengthGroupedBatchSampler(
        text_lengths(rows),
        settings.per_device_train_batch_size,
        settings.seed,
        accelerator.num_processes,
        accelerator.process_index,
    )
    return DataLoader(
        EncodedRows(rows, collator.columns),
        batch_sampler=sampler,
        collate_fn=WithRowNumbers(collator),
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
        # Otherwise the loader draws a seed for its workers from the random stream of the model's dropout.
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _Plan:
    """The steps after which training ends or evaluates.

    Attributes:
        steps_per_epoch: number of optimiser steps in one pass over the training rows.
        total_steps: number of optimiser steps of the whole training.
        evaluate_at: steps within an epoch, counted from 1, after which an evaluation follows.
    """

    steps_per_epoch: int
    total_steps: int
    evaluate_at: frozenset[int]

    @classmethod
    def of(cls, settings: TrainingSettings, num_batches: int) -> "_Plan":
        steps_per_epoch = -(-num_batches // settings.gradient_accumulation_steps)
        total_steps = min(settings.num_train_epochs * steps_per_epoch, settings.max_steps or sys.maxsize)
        parts = settings.evaluations_per_epoch
        evaluate_at = {round(steps_per_epoch * i / parts) for i in range(1, parts + 1)}
        return cls(steps_per_epoch, total_steps, frozenset(evaluate_at))

    def epoch(self, step: int) -> int:
        """Returns the epoch, counted from 0, that a step belongs to."""
        return (step - 1) // self.steps_per_epoch

    def is_due(self, step: int) -> bool:
        """Returns whether an evaluation follows this step."""
        return step == self.total_steps or step - self.epoch(step) * self.steps_per_epoch in self.evaluate_at


class _Training:
    """The state of one call of `train`, new or resumed. It is a context manager that cleans up at the end.

    Args:
        model: the model, not yet prepared by accelerate.
        loader: loads the batches of training rows.
        collator: the loader's collator.
        settings: the training settings.
        run: receives the log, the checkpoints and the best model.
        processor: saved beside the model.
    """

    def __init__(
        self,
        model: TrainableModel,
        loader: DataLoader[Any],
        collator: TrainingCollator,
        settings: TrainingSettings,
        run: TrainingRun,
        processor: SavedProcessor,
    ) -> None:
        accelerator = run.accelerator
        # One process writes a checkpoint, so it must hold all parameters.
        self.is_resumable = not model.sharded_parameters and accelerator.distributed_type != DistributedType.FSDP
        if not self.is_resumable:
            logger.warning("parameters are sharded over processes: this run saves its best model, but can't be resumed")
        if settings.torch_compile:
            compile_text_encoder(model, accelerator.device)
        self.settings, self.run, self.processor = settings, run, processor
        self.plan = _Plan.of(settings, len(loader))
        self._speed_up = fast_cpu_training(model, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, settings))
        self.schedule = build_schedule(self.optimizer, settings, self.plan.total_steps)
        if accelerator.process_index > 0:
            # All processes have built the same model. From now on, each draws its own dropout and negatives.
            torch.manual_seed(settings.seed + accelerator.process_index)
        self.state = TrainingState(accelerator, self.model, self.optimizer, self.schedule)
        saved = run.resume(self.state) if self.is_resumable else None
        self.progress = Progress() if saved is None else Progress.of(saved)
        self.windows = _windows_from(
            self.progress.step, self.plan.steps_per_epoch, loader, collator, settings.gradient_accumulation_steps
        )

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.enter_context(self._speed_up)
            self.bar = opened.enter_context(
                progress_bar(
                    total=self.plan.total_steps,
                    initial=self.progress.step,
                    desc="training",
                    unit="step",
                    disable=not self.run.is_main,
                )
            )
            self.signals = opened.enter_context(StopSignals(self.is_resumable))
            # Closing the windows ends the loader's workers now. Otherwise, an error's traceback may keep them alive.
            opened.enter_context(closing(self.windows))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def take_metrics(self, metrics: dict[str, float], goal: Goal) -> None:
        """Logs the validation metrics after the last step, and saves the model if it is the best so far."""
        run, progress = self.run, self.progress
        run.log("validation", {"step": progress.step, "epoch": self.plan.epoch(progress.step), **metrics})
        if run.is_main:
            self.bar.write(f"step {progress.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        progress.evaluated_step = progress.step
        if goal.better(metrics[goal.metric], progress.best.get(goal.metric)):
            progress.best, progress.best_step, progress.without_better = metrics, progress.step, 0
            run.save_model(self.model, self.processor, progress.result(self.plan.total_steps))
        else:
            progress.without_better += 1

    def take_step(self) -> None:
        """Takes one optimiser step; every `logging_steps` steps it also writes a line to the log."""
        run, progress, accelerator = self.run, self.progress, self.run.accelerator
        started = monotonic()
        epoch, window = next(self.windows)
        window = send_to_device(window, accelerator.device)
        self.model.train()
        values = _step(self.model, self.optimizer, window, self.settings, run, progress.step + 1)
        self.schedule.step()
        num_rows = sum(len(numbers) for numbers, _ in window) * accelerator.num_processes
        progress.add_step(values, num_rows, monotonic() - started)
        self.bar.update()
        if progress.step % self.settings.logging_steps == 0 or progress.step == self.plan.total_steps:
            averages = progress.take_averages()
            shown = {k: f"{v:.3g}" for k, v in averages.items() if k.endswith(("loss", "rows_per_second"))}
            self.bar.set_postfix(shown)
            now = {**learning_rates(self.optimizer), **memory_in_use(accelerator.device)}
            run.log("train", {"step": progress.step, "epoch": epoch, **averages, **now})

    def stop_if_told(self) -> None:
        """Saves a checkpoint and raises `Stopped` if any process has received a signal."""
        if self.signals.any(self.run.accelerator):
            self._save()
            self.run.close_trackers()
            step = self.progress.step
            logger.info("stopped after step %d and saved a checkpoint; continue with --resume true", step)
            raise Stopped

    def save_if_due(self) -> None:
        """Saves a checkpoint every `save_steps` steps."""
        if self.is_resumable and self.progress.step % self.settings.save_steps == 0:
            self._save()

    def _save(self) -> None:
        self.run.save_checkpoint(self.progress.step, self.state, asdict(self.progress), self.processor)


def _windows_from(
    step: int, steps_per_epoch: int, loader: Any, collator: TrainingCollator, size: int
) -> Generator[tuple[int, list[Any]], None, None]:
    """Yields the epoch and the batches of each optimiser step after `step`, endlessly; earlier rows are not loaded."""
    first_epoch, steps_done = divmod(step, steps_per_epoch)
    for epoch in itertools.count(first_epoch):
        loader.batch_sampler.set_epoch(epoch, steps_done * size)
        collator.set_epoch(epoch)
        with delayed_signals():
            batches = iter(loader)  # starts the workers
        for window in _windows(batches, size):
            yield epoch, window
        steps_done = 0


def _step(
    model: PreparedModel,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Any],
    settings: TrainingSettings,
    run: TrainingRun,
    step: int,
) -> dict[str, float]:
    """Takes one optimiser step over accumulated batches; returns the values to log."""
    accelerator = run.accelerator
    # Every masked item of all batches and processes has the same weight, so the items are counted before the first
    # backward pass. Gradients are averaged over processes, hence the division.
    batches = [batch for _, batch in window]
    totals = count_items(accelerator.unwrap_model(model), batches, accelerator)
    num_items = {name: total / accelerator.num_processes for name, total in totals.items()}

    over_window = settings.contrastive_batches == "window"
    forwards = contrast_over_window(model, batches, accelerator) if over_window else [model] * len(window)

    values: dict[str, torch.Tensor] = {}
    for i, (numbers, batch) in enumerate(window):
        last = i == len(window) - 1
        with accelerator.no_sync(model) if not last else nullcontext():
            output = forwards[i](**batch, num_items_in_batch=num_items)
            loss = output.loss
            if settings.feature_l2 and output.feature_penalty is not None:
                loss = loss + 0.5 * settings.feature_l2 * output.feature_penalty / len(window)
            parts = {k: v.detach() for k, v in output.items() if k.endswith("loss")}
            if not torch.isfinite(loss.detach()):
                raise _not_finite(f"the loss is {loss.item()}", step, parts, [numbers], run)
            accelerator.backward(loss)
        for name, value in parts.items():
            values[name] = values.get(name, torch.zeros_like(value)) + value
        for name, value in (output.get("metrics") or {}).items():
            values[name] = values.get(name, torch.zeros_like(value)) + value / len(window)
    gradient_norm = clip_gradients(model, accelerator, settings.max_grad_norm)
    if not torch.isfinite(gradient_norm):
        message = f"the gradient's norm is {gradient_norm.item()}"
        raise _not_finite(message, step, values, [numbers for numbers, _ in window], run)
    optimizer.step()
    optimizer.zero_grad()
    values["gradient_norm"] = gradient_norm
    averaged = accelerator.reduce(values, "mean")
    return {name: value.item() for name, value in averaged.items()}


def count_items(model: TrainableModel, batches: Iterable[Any], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Counts the items that each part of the loss averages over in one optimiser step, summed over all processes.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR` that accelerate has not wrapped.
        batches: the step's batches on this process.
        accelerator: sums the counts of all processes.

    Returns:
        The counts by the name of the part, such as `mlm`, float ().
    """
    counts: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, number in model.num_items(batch).items():
            counts[name] = counts.get(name, 0) + number.float()
    totals: dict[str, torch.Tensor] = accelerator.reduce(counts, "sum")
    return totals


def _not_finite(
    message: str, step: int, parts: dict[str, torch.Tensor], rows: Sequence[torch.Tensor], run: TrainingRun
) -> FloatingPointError:
    losses = ", ".join(f"{name}={value.item():.4g}" for name, value in parts.items())
    return FloatingPointError(
        f"{message} at step {step}: {losses}; rows {torch.cat(list(rows)).tolist()}. Lower the learning rate or check "
        f"these rows. Any best model and checkpoint saved so far are intact in {run.folder}"
    )


def _windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    window = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
