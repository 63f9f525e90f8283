"""Attention for training text encoders on a CPU."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flip_hf.nn.dropout import ByteDropout

CPU_ATTENTION = "flip_cpu_training"
"""Name under which `cpu_attention` is registered with transformers' attention implementations."""


def cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention like transformers' `"sdpa"`, but faster for training with dropout on a CPU.

    torch has no fused kernel for that case, and computes it in single precision even if autocast passes bfloat16. This
    function keeps the input's precision and uses `ByteDropout`. Like torch, it keeps the attention weights in memory
    for the backward pass. In all other cases it calls `"sdpa"`.

    Args:
        module: the attention layer.
        query: float (B, heads, T, size).
        key: float (B, heads, T, size).
        value: float (B, heads, T, size).
        attention_mask: bool, true for positions that may be read, broadcast to (B, heads, T, T); None allows all.
        dropout: dropout probability.
        scaling: factor of the products; `size ** -0.5` by default.
        kwargs: as transformers passes them.

    Returns:
        float (B, T, heads, size), and None instead of the attention weights.
    """
    is_plain = not module.training or not dropout or query.device.type != "cpu" or torch.compiler.is_compiling()
    is_causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    # For a causal layer without a mask, "sdpa" builds the mask itself.
    is_plain |= (attention_mask is None and is_causal) or key.shape[1] != query.shape[1]
    if is_plain or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.mT
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(
            ~attention_mask, torch.finfo(scores.dtype).min
        )
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    # Autocast would convert to single precision, in which torch's softmax accumulates anyway.
    with torch.autocast("cpu", enabled=False):
        weights = ByteDropout(dropout)(scores.softmax(dim=-1))
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
