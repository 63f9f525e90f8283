"""Faster replacements of torch's dropout and attention for training on a CPU."""

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
    """Context manager: on a CPU, the text encoder uses `ByteDropout` and `nn.attention.cpu_attention`.

    Only the attention implementation `"sdpa"` is replaced. The text encoder is restored when the context ends. Other
    devices, and models without a text encoder, are left unchanged.

    Args:
        model: a FLIP model that accelerate has not wrapped.
        device: device that the model trains on.
    """
    text_model: Any = model.base_model.text_model
    if text_model is None or device.type != "cpu":
        yield
        return
    # Change the modules in place, so that existing references to them see the change and its end.
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
