"""The one training loop."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flip_hf.data.collators import EncodedRows
from flip_hf.data.sampling import LengthGroupedBatchSampler
from flip_hf.training.evaluation import text_lengths
from flip_hf.training.gradient_cache import contrast_over_window
from flip_hf.training.optimization import build_optimizer, build_schedule, clip_gradients, learning_rates
from flip_hf.training.run import Run
from flip_hf.training.run_config import TrainingConfig
from flip_hf.training.tracking import memory_in_use


@dataclass(frozen=True)
class Goal:
    """The validation metric by which the best model is chosen."""

    metric: str
    larger_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats the best so far; NaN, as of an AUC over one class, beats nothing at all."""
        if best is None or math.isnan(best):
            return True
        return value > best if self.larger_is_better else value < best


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
    config: TrainingConfig,
    run: Run,
    goal: Goal,
    evaluate: Callable[[Any, str], dict[str, float]],
    processor: Any,
) -> dict[str, Any]:
    """Trains until the epochs or steps are done or validation stops getting better; keeps the best model.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`.
        rows: the encoded training rows.
        collator: makes a batch of them; its `set_epoch`, if it has one, is told each epoch.
        config: how.
        run: where the log and the best model go.
        goal: what is best.
        evaluate: validation metrics of the prepared model; the second argument describes the moment.
        processor: saved beside the model.

    Returns:
        The best validation metrics, the step they were measured at, steps taken and training rows per second.

    Raises:
        FloatingPointError: a loss is NaN or infinite; names the step, the parts of the loss and the rows.
        ValueError: a sharded feature table under FSDP, or larger contrastive batches of a model that contrasts nothing.
    """
    accelerator = run.accelerator
    if config.contrastive_batches == "window" and "icl" not in getattr(model, "objectives", {}):
        raise ValueError(
            "training.contrastive_batches is 'window', but this model has no contrastive objective; it is for "
            "pretraining with a positive weight of icl in model.options.objectives"
        )
    sampler = LengthGroupedBatchSampler(
        text_lengths(rows), config.batch_size, config.seed, accelerator.num_processes, accelerator.process_index
    )
    loader: Any = DataLoader(
        EncodedRows(rows, collator.columns),
        batch_sampler=sampler,
        collate_fn=WithRowNumbers(collator),
        num_workers=config.workers,
    )
    if model.sharded_parameters and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "training.shard_features and FSDP would both spread the feature table over processes: set shard_features "
            "to false, or launch without FSDP"
        )
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    steps_per_epoch = -(-len(loader) // config.accumulation)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize)
    schedule = build_schedule(optimizer, config, total_steps)
    evaluate_at = {
        round(steps_per_epoch * i / config.evaluations_per_epoch) for i in range(1, config.evaluations_per_epoch + 1)
    }

    if accelerator.process_index > 0:
        # All processes have built the same model. From here on each draws its own dropout and negatives.
        torch.manual_seed(config.seed + accelerator.process_index)
    best: dict[str, float] = {}
    best_step = step = without_better = 0
    trained_rows, trained_seconds = 0, 0.0
    bar = tqdm(total=total_steps, desc="training", unit="step", disable=not run.is_main)
    meter = _Meter()
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(epoch)
        started = monotonic()
        for step_in_epoch, window in enumerate(_windows(loader, config.accumulation), start=1):
            window = send_to_device(window, accelerator.device)
            model.train()
            values = _step(model, optimizer, window, config, run, step + 1)
            schedule.step()
            step += 1
            num_rows = sum(len(numbers) for numbers, _ in window) * accelerator.num_processes
            seconds = monotonic() - started
            trained_rows, trained_seconds = trained_rows + num_rows, trained_seconds + seconds
            meter.add(values, num_rows, seconds)
            bar.update()
            if step % config.log_steps == 0 or step == total_steps:
                averages = meter.take()
                bar.set_postfix({k: f"{v:.3g}" for k, v in averages.items() if k.endswith(("loss", "rows_per_second"))})
                state = {**learning_rates(optimizer), **memory_in_use(accelerator.device)}
                run.log("train", {"step": step, "epoch": epoch, **averages, **state})

            done = step == total_steps
            if done or step_in_epoch in evaluate_at:
                metrics = evaluate(model, f"validation at step {step}")
                run.log("validation", {"step": step, "epoch": epoch, **metrics})
                if run.is_main:
                    bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
                if goal.better(metrics[goal.metric], best.get(goal.metric)):
                    best, best_step, without_better = metrics, step, 0
                    run.save_model(model, processor)
                else:
                    without_better += 1
                if done or without_better >= config.patience:
                    bar.close()
                    return {
                        "validation": best,
                        "best_step": best_step,
                        "steps": step,
                        "stopped_early": not done,
                        "rows_per_second": round(trained_rows / trained_seconds, 1),
                    }
            started = monotonic()
    raise AssertionError("the last step ends the run")


def _step(
    model: Any, optimizer: Any, window: Sequence[Any], config: TrainingConfig, run: Run, step: int
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
    gradient_norm = clip_gradients(model, accelerator, config.max_gradient_norm)
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
    message: str, step: int, parts: dict[str, torch.Tensor], rows: Sequence[torch.Tensor], run: Run
) -> FloatingPointError:
    losses = ", ".join(f"{name}={value.item():.4g}" for name, value in parts.items())
    return FloatingPointError(
        f"{message} at step {step}: {losses}; rows {torch.cat(list(rows)).tolist()}. The best model so far, if there "
        f"is one, is whole in {run.model_folder}; lower the learning rate or look at these rows"
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


class _Meter:
    """Averages over the steps since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps, self.rows, self.seconds = 0, 0, 0.0

    def add(self, values: dict[str, float], rows: int, seconds: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.rows, self.seconds = self.steps + 1, self.rows + rows, self.seconds + seconds

    def take(self) -> dict[str, float]:
        averages = {name: total / self.steps for name, total in self.sums.items()}
        averages["rows_per_second"] = round(self.rows / self.seconds, 1)
        self.__init__()  # type: ignore[misc]
        return averages
