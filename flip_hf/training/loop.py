"""The one training loop."""

import itertools
import logging
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader

from flip_hf.data.collators import EncodedRows, check_collator, check_training_rows
from flip_hf.data.sampling import LengthGroupedBatchSampler, text_lengths
from flip_hf.progress import progress_bar
from flip_hf.training.compiling import compile_text_encoder
from flip_hf.training.gradient_cache import contrast_over_window
from flip_hf.training.meter import Meter, Progress, memory_in_use
from flip_hf.training.optimization import build_optimizer, build_schedule, clip_gradients, learning_rates
from flip_hf.training.protocols import RunFolder
from flip_hf.training.settings import TrainingSettings
from flip_hf.training.signals import Stopped, StopSignals, delayed_signals, leave_signals_to_parent
from flip_hf.training.state import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Goal:
    """The validation metric by which the best model is chosen."""

    metric: str
    larger_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats the best so far: any value beats None, any number beats NaN, NaN beats no number."""
        if best is None:
            return True
        if math.isnan(value) or math.isnan(best):
            return math.isnan(best) and not math.isnan(value)
        return value > best if self.larger_is_better else value < best


def click_goal(labels: np.ndarray) -> Goal:
    """The goal of learning clicks: AUC, or LogLoss if all validation rows have the same label.

    Args:
        labels: of the validation rows, 0 or 1 (rows,).
    """
    if labels.min() != labels.max():
        return Goal("auc", larger_is_better=True)
    logger.warning(
        "all %d validation rows have the label %d: AUC is undefined there, so LogLoss chooses the best model",
        len(labels),
        labels[0],
    )
    return Goal("logloss", larger_is_better=False)


class WithRowNumbers:
    """A collator whose batches come with the numbers of their rows, so that an error can name them."""

    def __init__(self, collator: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: pa.Table) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor(rows["row"].to_numpy()), self.collator(rows)


def train(
    model: Any,
    rows: Dataset,
    collator: Any,
    config: TrainingSettings,
    run: RunFolder,
    goal: Goal,
    evaluate: Callable[[Any, str], dict[str, float]],
    processor: Any,
) -> dict[str, Any]:
    """Trains until the epochs or steps are done or validation stops getting better; keeps the best model.

    Goes on from the run's last checkpoint where it resumes one. A SIGTERM or SIGINT ends the step that is being taken,
    saves a checkpoint and ends the program.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`.
        rows: the encoded training rows.
        collator: makes a batch of them; its `set_epoch` is told each epoch.
        config: how.
        run: where the log, the checkpoints and the best model go.
        goal: what is best.
        evaluate: validation metrics of the prepared model; the second argument describes the moment.
        processor: saved beside the model.

    Returns:
        The best validation metrics, the step they were measured at, steps taken and training rows per second.

    Raises:
        FloatingPointError: a loss is NaN or infinite; names the step, the parts of the loss and the rows.
        ValueError: the collator is not for this model, the rows lack a column or their labels, or share row numbers
            that masks are a function of, a sharded feature table under FSDP, updates of its rows alone on several
            processes that do not shard it, or larger contrastive batches of a model that contrasts nothing.
        Stopped: a signal came, and a checkpoint was saved; where it is not caught the program's exit code is
            `flip_hf.training.signals.EXIT_STOPPED`.
        OSError: a checkpoint or model could not be written; those that were there before are whole.
    """
    accelerator = run.accelerator
    check_collator(collator, model)
    check_training_rows(rows, collator)
    if "row" not in rows.column_names:
        raise ValueError(
            "the encoded rows lack the column 'row', by which errors name them: encode with processor.encode_dataset, "
            "or number them with rows.add_column('row', list(range(len(rows))))"
        )
    if config.contrastive_batches == "window" and "icl" not in getattr(model, "objectives", {}):
        raise ValueError(
            "training.contrastive_batches is 'window', but this model has no contrastive objective; it is for "
            "pretraining with a positive weight of icl in model.options.objectives"
        )
    sampler = LengthGroupedBatchSampler(
        text_lengths(rows),
        config.per_device_train_batch_size,
        config.seed,
        accelerator.num_processes,
        accelerator.process_index,
    )
    loader: Any = DataLoader(
        EncodedRows(rows, collator.columns),
        batch_sampler=sampler,
        collate_fn=WithRowNumbers(collator),
        num_workers=config.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
        # Else it draws a seed for its workers where the model draws its dropout.
        generator=torch.Generator(),
    )
    if model.sharded_parameters and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "training.shard_features and FSDP would both spread the feature table over processes: set shard_features "
            "to false, or launch without FSDP"
        )
    if config.feature_updates == "rows" and accelerator.num_processes > 1 and not model.sharded_parameters:
        raise ValueError(
            "training.feature_updates is 'rows', and processes that hold the whole table each would have to tell each "
            "other their rows: set training.shard_features to true, or feature_updates to 'dense'"
        )
    # A checkpoint is what one process has.
    is_resumable = not model.sharded_parameters and accelerator.distributed_type != DistributedType.FSDP
    if not is_resumable:
        logger.warning("parameters are spread over processes: this run saves no checkpoints and can't be resumed")
    if accelerator.device.type == "cpu":
        model.use_cpu_attention()
    if config.torch_compile:
        compile_text_encoder(model, accelerator.device)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    steps_per_epoch = -(-len(loader) // config.gradient_accumulation_steps)
    total_steps = min(config.num_train_epochs * steps_per_epoch, config.max_steps or sys.maxsize)
    schedule = build_schedule(optimizer, config, total_steps)
    evaluate_at = {
        round(steps_per_epoch * i / config.evaluations_per_epoch) for i in range(1, config.evaluations_per_epoch + 1)
    }

    run.record["goal"] = asdict(goal)
    if accelerator.process_index > 0:
        # All processes have built the same model. From here on each draws its own dropout and negatives.
        torch.manual_seed(config.seed + accelerator.process_index)
    state = TrainingState(accelerator, model, optimizer, schedule)
    saved = run.resume(state) if is_resumable else None
    progress = Progress() if saved is None else Progress.of(saved)
    windows = _windows_from(
        progress.step, steps_per_epoch, loader, sampler, collator, config.gradient_accumulation_steps
    )

    def stop_if_told(signals: StopSignals) -> None:
        if signals.any(accelerator):
            run.save_checkpoint(progress.step, state, asdict(progress), processor)
            run.close_trackers()
            logger.info("stopped at step %d, where a checkpoint is; --resume true goes on from it", progress.step)
            raise Stopped

    bar = progress_bar(total=total_steps, initial=progress.step, desc="training", unit="step", disable=not run.is_main)
    # Closing them ends the loader's workers now, and not when an error that refers to them is forgotten.
    with bar, StopSignals(is_resumable) as signals, closing(windows):
        while True:
            step, epoch = progress.step, (progress.step - 1) // steps_per_epoch
            # First, as a checkpoint may have been saved between a step and its evaluation.
            due = step == total_steps or step - epoch * steps_per_epoch in evaluate_at
            if due and progress.evaluated_step < step:
                metrics = evaluate(model, f"validation at step {step}")
                run.log("validation", {"step": step, "epoch": epoch, **metrics})
                if run.is_main:
                    bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
                progress.evaluated_step = step
                if goal.better(metrics[goal.metric], progress.best.get(goal.metric)):
                    progress.best, progress.best_step, progress.without_better = metrics, step, 0
                    run.save_model(model, processor, progress.result(total_steps))
                else:
                    progress.without_better += 1
                # It may have come while the rows were read.
                stop_if_told(signals)
            if step == total_steps or progress.without_better >= config.patience:
                return progress.result(total_steps)

            started = monotonic()
            epoch, window = next(windows)
            window = send_to_device(window, accelerator.device)
            model.train()
            values = _step(model, optimizer, window, config, run, step + 1)
            schedule.step()
            progress.step += 1
            num_rows = sum(len(numbers) for numbers, _ in window) * accelerator.num_processes
            seconds = monotonic() - started
            progress.rows, progress.seconds = progress.rows + num_rows, progress.seconds + seconds
            progress.meter.add(values, num_rows, seconds)
            bar.update()
            if progress.step % config.logging_steps == 0 or progress.step == total_steps:
                averages, progress.meter = progress.meter.averages(), Meter()
                bar.set_postfix({k: f"{v:.3g}" for k, v in averages.items() if k.endswith(("loss", "rows_per_second"))})
                now = {**learning_rates(optimizer), **memory_in_use(accelerator.device)}
                run.log("train", {"step": progress.step, "epoch": epoch, **averages, **now})

            # Before the evaluation, which may take longer than whoever sent the signal waits.
            stop_if_told(signals)
            if is_resumable and progress.step % config.save_steps == 0:
                run.save_checkpoint(progress.step, state, asdict(progress), processor)


def _windows_from(
    step: int, steps_per_epoch: int, loader: Any, sampler: LengthGroupedBatchSampler, collator: Any, size: int
) -> Generator[tuple[int, list[Any]], None, None]:
    """The epoch and the batches of each optimiser step after `step`, without end; rows before them are not loaded."""
    first_epoch, steps_done = divmod(step, steps_per_epoch)
    for epoch in itertools.count(first_epoch):
        sampler.set_epoch(epoch, steps_done * size)
        collator.set_epoch(epoch)
        with delayed_signals():
            batches = iter(loader)  # starts the workers
        for window in _windows(batches, size):
            yield epoch, window
        steps_done = 0


def _step(
    model: Any, optimizer: Any, window: Sequence[Any], config: TrainingSettings, run: RunFolder, step: int
) -> dict[str, float]:
    """One optimiser step over accumulated batches; returns what a log should show."""
    accelerator = run.accelerator
    # Every masked item of all batches and processes weighs the same, so the numbers must be known before any
    # gradient is. Gradients are averaged over processes: hence the division.
    batches = [batch for _, batch in window]
    totals = count_items(accelerator.unwrap_model(model), batches, accelerator)
    num_items = {name: total / accelerator.num_processes for name, total in totals.items()}

    over_window = config.contrastive_batches == "window"
    forwards = contrast_over_window(model, batches, accelerator) if over_window else [model] * len(window)

    values: dict[str, torch.Tensor] = {}
    for i, (numbers, batch) in enumerate(window):
        last = i == len(window) - 1
        with accelerator.no_sync(model) if not last else nullcontext():
            output = forwards[i](**batch, num_items_in_batch=num_items)
            loss = output.loss
            if config.feature_l2 and output.feature_penalty is not None:
                loss = loss + 0.5 * config.feature_l2 * output.feature_penalty / len(window)
            parts = {k: v.detach() for k, v in output.items() if k.endswith("loss")}
            if not torch.isfinite(loss.detach()):
                raise _not_finite(f"the loss is {loss.item()}", step, parts, [numbers], run)
            accelerator.backward(loss)
        for name, value in parts.items():
            values[name] = values.get(name, torch.zeros_like(value)) + value
        for name, value in (output.get("metrics") or {}).items():
            values[name] = values.get(name, torch.zeros_like(value)) + value / len(window)
    gradient_norm = clip_gradients(model, accelerator, config.max_grad_norm)
    if not torch.isfinite(gradient_norm):
        message = f"the gradient's norm is {gradient_norm.item()}"
        raise _not_finite(message, step, values, [numbers for numbers, _ in window], run)
    optimizer.step()
    optimizer.zero_grad()
    values["gradient_norm"] = gradient_norm
    averaged = accelerator.reduce(values, "mean")
    return {name: value.item() for name, value in averaged.items()}


def count_items(model: Any, batches: Iterable[Any], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """What the losses of one optimiser step are means over, by the part's name, float ().

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`, not wrapped.
        batches: the step's batches on this process.
        accelerator: adds up those of all processes.
    """
    counts: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, number in model.num_items(batch).items():
            counts[name] = counts.get(name, 0) + number.float()
    totals: dict[str, torch.Tensor] = accelerator.reduce(counts, "sum")
    return totals


def _not_finite(
    message: str, step: int, parts: dict[str, torch.Tensor], rows: Sequence[torch.Tensor], run: RunFolder
) -> FloatingPointError:
    losses = ", ".join(f"{name}={value.item():.4g}" for name, value in parts.items())
    return FloatingPointError(
        f"{message} at step {step}: {losses}; rows {torch.cat(list(rows)).tolist()}. The best model and "
        f"the last checkpoint so far, if there are any, are whole in {run.folder}; lower the learning rate or look at "
        "these rows"
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
