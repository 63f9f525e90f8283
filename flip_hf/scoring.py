"""Turns rows into click logits and probabilities.

Evaluation calls `click_logits` with encoded rows and the Accelerator that prepared the model. The pipeline (and through
it Ray) and the prediction of files call a `ClickScorer` with tables of raw rows, chunk by chunk. A `ClickScorer` also
encodes the rows, counts their fallbacks and applies a text budget.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from flip_hf.data.collator_checks import check_collator
from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.dataset_encoding import RowEncoder
from flip_hf.data.encoded_rows import Collator, EncodedRows
from flip_hf.data.fallbacks import FallbackReport
from flip_hf.data.groups import GROUP_COLUMN
from flip_hf.data.sampling import text_lengths
from flip_hf.outputs import FlipForCTROutput
from flip_hf.progress import progress_bar


class ScoredModel(Protocol):
    """A FLIP model, or a wrapper around one such as DistributedDataParallel."""

    training: bool

    def __call__(self, **batch: Any) -> Any:
        """Runs `forward` on a batch, passed by keyword."""

    def eval(self) -> Any:
        """Switches to evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules, including the model itself."""


class ClickModel(ScoredModel, Protocol):
    """`FlipForCTR`, not wrapped."""

    @property
    def config(self) -> Any:
        """The `FlipConfig`."""

    def in_mode(self, mode: str) -> ScoredModel:
        """One tower of the model as a model of its own."""


Forward: TypeAlias = Callable[[dict[str, torch.Tensor]], FlipForCTROutput]
"""A function that runs a model on a batch without labels."""

LOGITS = ("logits", "id_logits", "text_logits")
"""Names of the logits in a joint model's output: its own, and those of each tower."""
_PROBABILITIES = dict(zip(("probability", "id_probability", "text_probability"), LOGITS, strict=True))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Click probabilities from logits, float64 (rows,); masked where the logits are masked."""
    # Not computed on the masked array, which would also mask NaN.
    values = np.asarray(logits, np.float64)
    with np.errstate(over="ignore"):
        result: np.ndarray = 1 / (1 + np.exp(-values))
    return np.ma.array(result, mask=logits.mask) if isinstance(logits, np.ma.MaskedArray) else result


def probability_names(mode: str) -> dict[str, str]:
    """Names of the probabilities that users read, each with the name of the logits that it is computed from.

    Args:
        mode: the model's mode. Only a joint model has probabilities of its towers, because a single tower's logits are
            the model's.
    """
    return dict(_PROBABILITIES if mode == "joint" else {"probability": "logits"})


def click_logits(
    model: ScoredModel,
    rows: Dataset | pa.Table,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator | None = None,
    description: str | None = None,
) -> dict[str, np.ndarray]:
    """Computes the logits of all towers that are built, in the order of the rows.

    Args:
        model: a `FlipForCTR`, prepared by the accelerator if there is one.
        rows: encoded rows; the text is not needed if the model does not read it.
        collator: makes the batches.
        batch_size: rows of a batch on each device. Rows of similar length share a batch.
        accelerator: the Accelerator that prepared the model. Its processes share the rows, and each gets the logits of
            all rows. Without one, this process scores the rows on the model's device.
        description: label of the progress bar; None shows no bar.

    Returns:
        `logits`, and `id_logits` and `text_logits` of the towers, float32 (rows,) each. If the rows have them, also
        `labels`, float32 (rows,), and `groups`, int64 (rows,), as `FlipProcessor.encode` numbers them.

    Raises:
        ValueError: the collator does not fit the model.
    """
    check_collator(collator, model)
    model.eval()

    def forward(batch: dict[str, torch.Tensor]) -> FlipForCTROutput:
        if accelerator is None:
            # An accelerator's data loader has moved the batch to the device already.
            batch = send_to_device(batch, next(model.parameters()).device)
        output: FlipForCTROutput = model(**batch)
        return output

    scores = _scored(forward, rows, collator, batch_size, accelerator, description)
    if GROUP_COLUMN in rows.column_names:
        # Read from the table, not from the batches: every process holds all rows, in the order of the logits.
        table = rows if isinstance(rows, pa.Table) else rows.select_columns([GROUP_COLUMN]).with_format("arrow")[:]
        scores["groups"] = table[GROUP_COLUMN].to_numpy()
    return scores


class ClickScorer:
    """Scores tables of raw rows.

    With a text budget it is a cascade: the ID-based tower of a joint model scores all rows, then both towers score the
    rows that the first one is least sure of. The texts of the other rows are not built.

    Args:
        model: a `FlipForCTR`, prepared by the accelerator if there is one.
        processor: the processor that was saved with the model.
        collator: makes batches for the model.
        accelerator: as in `click_logits`.
        forward: called with a batch instead of `call_model`, for example to move the batch to a device first.

    Attributes:
        report: the fallbacks of all scored rows; with a text budget, truncated texts are not counted.

    Raises:
        ValueError: the collator does not fit the model.
    """

    def __init__(
        self,
        model: ScoredModel,
        processor: RowEncoder,
        collator: Collator,
        accelerator: Accelerator | None = None,
        forward: Forward | None = None,
    ) -> None:
        check_collator(collator, model)
        self.report = FallbackReport(processor.vocabulary)
        self._model = model
        self._processor = processor
        self._collator = collator
        self._accelerator = accelerator
        self._forward = forward or self.call_model
        self._plain = cast(ClickModel, model if accelerator is None else accelerator.unwrap_model(model))
        self._mode: str = self._plain.config.mode

    def __call__(
        self,
        table: pa.Table,
        batch_size: int,
        *,
        text_budget: float | None = None,
        first_row: int = 0,
        source: str | None = None,
        description: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores some rows.

        Args:
            table: at least one row, as `FlipProcessor.select_columns` returns them.
            batch_size: rows of a batch on each device. Rows of similar length share a batch.
            text_budget: share of the rows whose text is read, from 0 to 1; by default the text of all rows is read.
            first_row: number of the first row, for error messages.
            source: where the rows come from, for error messages.
            description: as in `click_logits`.

        Returns:
            Logits of all towers that are built, by name, float32 (rows,) in the order of the rows. With a text budget,
            `text_logits` is masked for rows whose text was not read, and `logits` is the ID-based tower's for them.

        Raises:
            InputError: a value can't be an id.
            ValueError: `text_budget` is not between 0 and 1, or the model does not have both towers.
        """
        check_text_budget(text_budget, self._mode)
        reads_text = self._mode != "id" and text_budget is None
        encoded = self._processor.encode(
            table, first_row=first_row, with_text=reads_text, with_vectors=self._mode != "text", source=source
        )
        self.report.add(encoded, table.slice)
        if text_budget is None:
            return self._scored(encoded, self._collator, batch_size, description)
        logits = self._scored(encoded, self._id_collator, batch_size, description)
        logits["text_logits"] = np.ma.masked_all(len(table), np.float32)
        chosen = least_sure(logits["logits"], text_budget)
        if len(chosen):
            # These rows passed the first encoding, so they raise no errors, and their fallbacks are counted already.
            encoded = self._processor.encode(table.take(chosen))
            with_text = None if description is None else f"{description}, with their texts"
            for name, values in self._scored(encoded, self._collator, batch_size, with_text).items():
                logits[name][chosen] = values
        return logits

    def call_model(self, batch: dict[str, torch.Tensor]) -> FlipForCTROutput:
        """Runs the model on a batch; for a batch without texts, runs only a joint model's ID-based tower."""
        model = self._without_text if batch.keys().isdisjoint(("input_ids", "tower_vectors")) else self._model
        if model.training:
            # The caller may have trained it between two calls.
            model.eval()
        output: FlipForCTROutput = model(**batch)
        return output

    def _scored(
        self, encoded: pa.Table, collator: Collator, batch_size: int, description: str | None
    ) -> dict[str, np.ndarray]:
        return _scored(self._forward, encoded, collator, batch_size, self._accelerator, description)

    @cached_property
    def _id_collator(self) -> FlipCTRCollator:
        return FlipCTRCollator(self._processor, "id")

    @cached_property
    def _without_text(self) -> ScoredModel:
        if self._mode != "joint":
            return self._model
        tower = self._plain.in_mode("id")
        if self._accelerator is None:
            return tower
        prepared: ScoredModel = self._accelerator.prepare_model(tower, device_placement=True, evaluation_mode=True)
        return prepared


def check_text_budget(text_budget: float | None, mode: str) -> None:
    """Raises ValueError if the text budget is not a share, or a model can't apply it.

    Args:
        text_budget: share of the rows whose text is read; None is no budget.
        mode: the model's mode.
    """
    if text_budget is None:
        return
    if mode != "joint":
        raise ValueError(f"text_budget={text_budget} needs a model with both towers; this one is in mode={mode!r}")
    if not 0 <= text_budget <= 1:
        raise ValueError(f"text_budget={text_budget} must be a share of the rows, from 0 to 1")


def least_sure(logits: np.ndarray, share: float) -> np.ndarray:
    """Returns the indices of the rows that a model is least sure of, int64 (chosen,), ascending.

    These are the rows with logits nearest to 0. Probabilities can't rank rows that the model is fairly sure of, because
    they round to 0 or 1.

    Args:
        logits: the ID-based tower's logits (rows,).
        share: share of the rows to choose; the number is rounded up.
    """
    order = np.argsort(np.abs(logits), kind="stable")
    chosen: np.ndarray = np.sort(order[: math.ceil(share * len(order))])
    return chosen


@torch.no_grad()
def _scored(
    forward: Forward,
    rows: Dataset | pa.Table,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator | None,
    description: str | None,
) -> dict[str, np.ndarray]:
    """Computes the result of `click_logits`, without groups."""
    order = np.arange(len(rows))
    if "input_ids" in rows.column_names:
        order = np.argsort(text_lengths(rows), kind="stable")
    batches = _batches(EncodedRows(rows, collator.columns), order, collator, batch_size, accelerator)
    if description is not None:
        is_main = accelerator is None or accelerator.is_main_process
        batches = progress_bar(batches, desc=description, disable=not is_main, leave=False)
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        labels = batch.pop("labels", None)
        output = forward(batch)
        found = {name: output[name] for name in LOGITS if name in output}
        if labels is not None:
            found["labels"] = labels
        if accelerator is not None:
            found = accelerator.gather_for_metrics(found)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.float().cpu().numpy())
    # For each row, the position at which it was scored.
    places = np.argsort(order)
    return {name: np.concatenate(values)[places] for name, values in parts.items()}


def _batches(
    rows: EncodedRows, order: np.ndarray, collator: Collator, batch_size: int, accelerator: Accelerator | None
) -> Iterable[dict[str, torch.Tensor]]:
    if accelerator is None:
        # Starting a data loader takes longer than scoring a single row.
        parts = (order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size))
        return (collator(rows.__getitems__(part)) for part in parts)
    loader: Any = DataLoader(rows, batch_size, sampler=order.tolist(), collate_fn=collator)
    # Not accelerator.prepare, which would keep the loader, and with it the rows, for the accelerator's lifetime.
    prepared: Iterable[dict[str, torch.Tensor]] = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
    )
    return prepared
