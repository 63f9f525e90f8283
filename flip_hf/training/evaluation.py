"""Metrics of a model on validation and test rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader

from flip_hf.data.collator_checks import check_collator
from flip_hf.data.encoded_rows import Collator, EncodedRows
from flip_hf.data.groups import NO_GROUP
from flip_hf.data.sampling import LengthGroupedBatchSampler, text_lengths
from flip_hf.data.schema import Fallback
from flip_hf.fields import IGNORED_LABEL, FieldConfig
from flip_hf.metrics import compute_metrics
from flip_hf.metrics.ece import calibration_bins
from flip_hf.metrics.intervals import bootstrap_intervals
from flip_hf.progress import progress_bar
from flip_hf.scoring import LOGITS, click_logits, probabilities
from flip_hf.training.protocols import PreparedModel, PretrainingModel


def evaluate_ctr(
    model: PreparedModel, rows: Dataset, collator: Collator, batch_size: int, accelerator: Accelerator, description: str
) -> dict[str, float]:
    """Computes click metrics of a model; a joint model also gets metrics of each tower, such as `id_auc`.

    Metrics within groups (GAUC, UAUC) are included if the rows were encoded with `group_field`.
    """
    return ctr_metrics(click_logits(model, rows, collator, batch_size, accelerator, description))


def ctr_metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Computes the metrics of `evaluate_ctr` from the arrays that `click_logits` returned.

    Args:
        scores: the arrays from `click_logits`. With `groups`, the results include the metrics within groups, `gauc` and
            `uauc`, and for both towers also `id_gauc` and so on. Rows without a group count only in the other metrics.

    Raises:
        ValueError: some or all rows have no label, or the number of groups differs from the number of rows.
    """
    labels = _labels(scores)
    groups = np.ma.masked_equal(scores["groups"], NO_GROUP) if "groups" in scores else None
    both = "id_logits" in scores and "text_logits" in scores
    results: dict[str, float] = {}
    for name in LOGITS if both else LOGITS[:1]:
        metrics = compute_metrics(labels, probabilities(scores[name]), groups)
        results.update({name.removesuffix("logits") + metric: value for metric, value in metrics.items()})
    return results


def _labels(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    if "labels" not in scores:
        raise ValueError(
            "the rows have no labels, and an evaluation needs them: encode the rows with "
            "processor.encode_dataset(dataset, with_label=True)"
        )
    if (scores["labels"] == IGNORED_LABEL).any():
        raise ValueError("some rows have no label, and an evaluation needs one for each row: remove those rows")
    return scores["labels"].astype(np.int8)


def evidence(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Computes the test results that a run stores in its record.

    Args:
        scores: the arrays from `click_logits` for the test rows.

    Returns:
        A dict with `test`, the metrics of `ctr_metrics`; `test_rows`, the number of rows; `test_intervals`, 95%
        confidence intervals of the metrics that need no groups; and `test_calibration`, the bins of a reliability
        diagram. The last two are computed from the model's own logits, not from those of its towers.

    Raises:
        ValueError: the number of groups differs from the number of rows.
    """
    labels, clicks = _labels(scores), probabilities(scores["logits"])
    return {
        "test": ctr_metrics(scores),
        "test_rows": len(labels),
        "test_intervals": bootstrap_intervals(labels, clicks),
        "test_calibration": [asdict(found) for found in calibration_bins(labels, clicks)],
    }


def slice_masks(rows: Dataset, fields: Sequence[FieldConfig], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Selects slices of rows by whether their values are unseen (OOV).

    Each named field has a slice of the rows whose value of this field is unseen. The slice "seen" has the rows whose
    values of all named fields are seen.

    Args:
        rows: the encoded rows.
        fields: the processor's fields.
        names: names of the fields to slice by.

    Returns:
        Masks by the slice's name (`"user_id unseen"`, `"seen"`), bool (rows,); empty if `names` is empty.

    Raises:
        ValueError: a name is not the name of a field.
    """
    places = {f.name: i for i, f in enumerate(fields)}
    if unknown := [name for name in names if name not in places]:
        raise ValueError(f"{unknown[0]!r} is not a field; the fields are {', '.join(map(repr, places))}")
    if not names:
        return {}
    flags = np.stack(rows.with_format("numpy")["fallbacks"][:])
    unseen = {name: (flags[:, places[name]] & Fallback.OOV) != 0 for name in names}
    masks = {f"{name} unseen": mask for name, mask in unseen.items()}
    masks["seen"] = ~np.any(list(unseen.values()), axis=0)
    return masks


def slice_metrics(scores: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Computes the metrics of `evaluate_ctr` on slices of the rows.

    Each slice also has `rows`, its number of rows. An empty slice has nothing else.

    Args:
        scores: the arrays from `click_logits` for the rows.
        masks: the masks from `slice_masks` for the rows.
    """
    results: dict[str, dict[str, float]] = {}
    for name, mask in masks.items():
        results[name] = {"rows": int(mask.sum())}
        if mask.any():
            results[name] |= ctr_metrics({key: values[mask] for key, values in scores.items()})
    return results


@torch.no_grad()
def evaluate_pretraining(
    model: PreparedModel, rows: Dataset, collator: Collator, batch_size: int, accelerator: Accelerator, description: str
) -> dict[str, float]:
    """Computes the pretraining losses and metrics, each a mean over all items of all rows.

    The results of ICL depend on the batch size, so use the batch size of training. Batches are distributed as in
    training: each process has at least one row of each batch, and no row is counted twice. Arguments as in
    `click_logits`.
    """
    check_collator(collator, model)
    model.eval()
    sampler = LengthGroupedBatchSampler(
        text_lengths(rows), batch_size, 0, accelerator.num_processes, accelerator.process_index
    )
    loader: DataLoader[Any] = DataLoader(
        EncodedRows(rows, collator.columns), batch_sampler=sampler, collate_fn=collator
    )
    plain: PretrainingModel = accelerator.unwrap_model(model)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for batch in progress_bar(loader, desc=description, disable=not accelerator.is_main_process, leave=False):
        batch = send_to_device(batch, accelerator.device)
        output = model(**batch)
        items = plain.num_items(batch)
        found = {f"{name}_loss": output[f"{name}_loss"] for name in items} | output.metrics
        for name, value in found.items():
            number = next(count for objective, count in items.items() if name.startswith(f"{objective}_"))
            sums[name] = sums.get(name, torch.zeros((), device=number.device)) + value * number
            counts[name] = counts.get(name, torch.zeros((), device=number.device)) + number
    totals, numbers = accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum")
    results = {name: (totals[name] / numbers[name].clamp(min=1)).item() for name in totals}
    results["loss"] = sum(plain.config.objectives[name] * results[f"{name}_loss"] for name in plain.objectives)
    return results
