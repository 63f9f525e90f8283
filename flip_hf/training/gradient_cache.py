"""Contrastive batches whose autograd graph would not fit into memory (gradient caching)."""

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
    """Returns one forward function per batch; together they contrast all rows of an optimiser step.

    This is gradient caching (Gao et al., RepL4NLP 2021, arXiv 2101.06983, Section 3.2). First, all batches are encoded
    without a graph. Then the contrastive loss over all rows of all processes gives the gradient of each row's projected
    views. Finally, each batch's forward function encodes the batch again and backpropagates from these gradients.

    Memory therefore holds the graph of one batch at a time. The gradients equal those of a single batch with all rows;
    the cost is one more forward pass over the unmasked rows.

    Each batch draws its dropout from its own random stream, which is the same in both passes.

    Args:
        model: a `FlipForPreTraining` with ICL, prepared by `accelerator`, in training mode.
        batches: the collator's batches, on the device.
        accelerator: the accelerator that prepared the model.

    Returns:
        For each batch, the function to call instead of the model, with the same arguments.
    """
    unwrapped = accelerator.unwrap_model(model)
    if "contrastive_views" not in vars(unwrapped):
        # FSDP must gather sharded parameters for this method as it does for forward.
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
    # Wrappers such as DistributedDataParallel are called through the public forward, which has no argument for `share`.
    with _own_stream(seed, device), icl.contrasted_as(share):
        return model(**inputs)


@contextmanager
def _own_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Draws random numbers from this seed; restores the previous random state afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield


@contextmanager
def _running_statistics_kept(model: PreparedModel) -> Iterator[None]:
    """Keeps the running statistics of batch normalisation unchanged; only the second pass should update them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
