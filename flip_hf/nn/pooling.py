"""Pooling of token states into one vector per text."""

from collections.abc import Callable

import torch


def cls_pooling(token_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The first token's state: float (B, T, C), int64 (B, T) -> float (B, C)."""
    return token_states[:, 0]


def mean_pooling(token_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, without padding: float (B, T, C), int64 (B, T) -> float (B, C)."""
    weights = attention_mask.to(token_states.dtype).unsqueeze(-1)  # (B, T, 1)
    return (token_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def last_pooling(token_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The state of the last token before the padding: float (B, T, C), int64 (B, T) -> float (B, C)."""
    rows = torch.arange(len(token_states), device=token_states.device)
    return token_states[rows, attention_mask.sum(dim=1) - 1]


TEXT_POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": cls_pooling,
    "mean": mean_pooling,
}
