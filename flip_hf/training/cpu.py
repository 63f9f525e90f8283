"""What a training loop on a CPU computes otherwise than torch does, and faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flip_hf.nn.attention import CPU_ATTENTION
from flip_hf.nn.dropout import ByteDropout
from flip_hf.training.protocols import TrainableModel


@contextmanager
def fast_cpu_training(model: TrainableModel, device: torch.device) -> Iterator[None]:
    """In this context, a model's text encoder trains on a CPU by `ByteDropout` and `nn.attention.cpu_attention`.

    An attention implementation other than `"sdpa"` stays. Afterwards the text encoder is what it was. On other devices
    and for a model without a text encoder nothing changes.

    Args:
        model: a FLIP model, not wrapped.
        device: where it trains.
    """
    text_model: Any = model.base_model.text_model
    if text_model is None or device.type != "cpu":
        yield
        return
    # In place, so that whatever refers to the modules finds them changed, and finds them again afterwards.
    dropouts = [module for module in text_model.modules() if type(module) is nn.Dropout]
    attends = text_model._supports_attention_backend and text_model.config._attn_implementation == "sdpa"
    for dropout in dropouts:
        dropout.__class__ = ByteDropout
    if attends:
        text_model.set_attn_implementation(CPU_ATTENTION)
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.__class__ = nn.Dropout
        if attends:
            text_model.set_attn_implementation("sdpa")
