"""Contrastive batches larger than what fits into memory with its graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from flip_hf.training.protocols import PreparedModel, PretrainingModel

_VIEWS = ("feature_ids", "input_ids", "attention_mask", "vectors", "vector_places")


def contrast_over_window(
    model: PreparedModel, batches: Sequence[Mapping[str, torch.Tensor]], accelerator: Accelerator
) -> list[Callable[..., Any]]:
    """The model's forward for each batch of an optimiser step, with all of them as the one contrastive batch.

    Gradient caching (Gao et al., RepL4NLP 2021, arXiv 2101.06983, Section 3.2): all batches are encoded without a
    graph, the contrastive loss over all their rows on all processes gives the gradient of each row's projected views,
    and each batch's forward encodes it again and continues from these. So memory holds the graph of one batch at a
    time, and the gradients are those of one batch with all the rows, at the price of one more clean forward pass.

    Each batch draws its dropout from a random stream of its own, the same in both passes.

    Args:
        model: a prepared `FlipForPreTraining` with ICL, in training mode.
        batches: as the collator made them, on the device.
        accelerator: what prepared the model.

    Returns:
        For each batch what to call in place of the model, with the same arguments.
    """
    unwrapped = accelerator.unwrap_model(model)
    if "contrastive_views" not in vars(unwrapped):
        # Where FSDP shards the parameters, they must be gathered for this method too.
        register_fsdp_forward_method(unwrapped, "contrastive_views")
    plain: PretrainingModel = unwrapped
    icl: Any = plain.objectives["icl"]
    seeds = torch.randint(2**63 - 1, (len(batches),)).tolist()
    views = []
    with torch.no_grad(), _running_statistics_kept(plain), accelerator.autocast():
        for batch, seed in zip(batches, seeds, strict=True):
            with _own_stream(seed, accelerator.device):
                views.append(plain.contrastive_views(**{name: batch[name] for name in _VIEWS if name in batch}))
    shares = icl.shares(views, [batch["feature_ids"] for batch in batches])
    return [
        partial(_forward_again, model, icl, share, seed, accelerator.device)
        for seed, share in zip(seeds, shares, strict=True)
    ]


def _forward_again(model: PreparedModel, icl: Any, share: Any, seed: int, device: torch.device, **inputs: Any) -> Any:
    # The share is no argument of the public forward, through which a wrapper such as DistributedDataParallel is called.
    with _own_stream(seed, device), icl.contrasted_as(share):
        return model(**inputs)


@contextmanager
def _own_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed; afterwards they go on where they were."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield


@contextmanager
def _running_statistics_kept(model: PreparedModel) -> Iterator[None]:
    """The second pass, and not the first, counts in the running statistics of batch normalisation."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
