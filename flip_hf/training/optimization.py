"""The optimiser and its schedule."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from flip_hf.training.run_config import TrainingConfig


def parameter_groups(model: Any, config: TrainingConfig) -> list[dict[str, Any]]:
    """Groups by learning rate (text encoder or the rest) and weight decay (matrices other than embeddings, or not).

    Embeddings are not decayed: decay would also shrink the rows that a batch does not read. A group's `rate` is the
    name of the setting that its learning rate is.
    """
    text_model = model.base_model.text_model
    in_text_encoder = set() if text_model is None else {id(p) for p in text_model.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if model.base_model.feature_embeddings is not None:
        embeddings |= {id(p) for p in model.base_model.feature_embeddings.parameters()}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        rate = "text_learning_rate" if id(parameter) in in_text_encoder else "learning_rate"
        decay = config.weight_decay if parameter.ndim >= 2 and id(parameter) not in embeddings else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": getattr(config, rate), "weight_decay": decay, "rate": rate}
        for (rate, decay), params in groups.items()
    ]


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The present learning rates of an optimizer over `parameter_groups`, by the names of their settings."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def build_optimizer(model: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with the implementation that does all parameters in one pass."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=True)


def clip_gradients(model: Any, accelerator: Accelerator, max_norm: float) -> torch.Tensor:
    """Scales all gradients down to a norm, the same on every process.

    Args:
        model: prepared by `accelerator`.
        accelerator: what prepared the model.
        max_norm: of all gradients together.

    Returns:
        float (), the norm before.
    """
    own = list(accelerator.unwrap_model(model).sharded_parameters.values())
    if not own:
        norm: Any = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    # Each process sees its own rows of a sharded table and the same gradients of all else.
    others = [p for p in model.parameters() if all(p is not q for q in own)]
    of_rows = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
    of_others = torch.nn.utils.get_total_norm([p.grad for p in others if p.grad is not None]).square()
    norm = (accelerator.reduce(of_rows, "sum") + of_others).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*own, *others], max_norm, norm)
    return norm


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear rise, then a cosine down to zero at `total_steps`."""
    schedule: torch.optim.lr_scheduler.LRScheduler = get_cosine_schedule_with_warmup(
        optimizer, round(config.warmup_ratio * total_steps), total_steps
    )
    return schedule
