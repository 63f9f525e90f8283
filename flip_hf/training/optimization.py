"""The optimiser, gradient clipping and the learning-rate schedule."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from flip_hf.training.protocols import PreparedModel, TrainableModel
from flip_hf.training.settings import TrainingSettings


def parameter_groups(model: TrainableModel, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups the parameters by learning rate and weight decay.

    The text encoder has its own learning rate. Weight decay applies to matrices, but not to embeddings, because it
    would also shrink the rows that a batch does not read. A group's `rate` names the setting of its learning rate.
    """
    text_model = model.base_model.text_model
    in_text_encoder = set() if text_model is None else {id(p) for p in text_model.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if model.base_model.feature_embeddings is not None:
        embeddings |= {id(p) for p in model.base_model.feature_embeddings.parameters()}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        rate = "text_learning_rate" if id(parameter) in in_text_encoder else "learning_rate"
        decay = settings.weight_decay if parameter.ndim >= 2 and id(parameter) not in embeddings else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": getattr(settings, rate), "weight_decay": decay, "rate": rate}
        for (rate, decay), params in groups.items()
    ]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the current learning rates of an optimiser over `parameter_groups`, by the names of their settings."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


class LazyAdamW(torch.optim.AdamW):
    """AdamW that, for a sparse gradient, updates only the rows in the gradient.

    Other rows and their moments do not change, as in `torch.optim.SparseAdam`. The bias correction of the moments
    counts the steps of the whole parameter, not of each row. A parameter with sparse gradients can't have weight decay.
    Arguments as in `torch.optim.AdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; parameters with dense gradients come first."""
        if closure is not None:
            raise ValueError("LazyAdamW takes no closure")
        lazy = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if _is_sparse(p.grad)]
        for _, parameter, _ in lazy:
            parameter.grad = None
        super().step()
        for group, parameter, gradient in lazy:
            parameter.grad = gradient
            self._step_rows(group, parameter, gradient.coalesce())

    def _step_rows(self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if group["weight_decay"]:
            raise ValueError("a parameter with a sparse gradient can't have weight decay")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        rows, values = gradient.indices()[0], gradient.values()
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.index_add_(0, rows, mean / scale, alpha=-group["lr"] / (1 - beta1**step))


def _is_sparse(gradient: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return gradient is not None and gradient.layout == torch.sparse_coo


def build_optimizer(model: TrainableModel, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Builds fused AdamW, or `LazyAdamW` if `feature_updates` is "rows"."""
    if settings.feature_updates == "dense":
        return torch.optim.AdamW(parameter_groups(model, settings), fused=True)
    if model.base_model.feature_embeddings is not None:
        model.base_model.feature_embeddings.sparse = True
    return LazyAdamW(parameter_groups(model, settings), fused=True)


def clip_gradients(model: PreparedModel, accelerator: Accelerator, max_norm: float) -> torch.Tensor:
    """Scales all gradients down to a maximum norm, by the same factor on every process.

    Args:
        model: the model, prepared by `accelerator`.
        accelerator: the accelerator that prepared the model.
        max_norm: maximum norm of all gradients together.

    Returns:
        The norm before clipping, float ().
    """
    own = list(accelerator.unwrap_model(model).sharded_parameters.values())
    for parameter in model.parameters():
        if _is_sparse(parameter.grad):
            # Coalesce once, both for the norm and for the optimiser.
            parameter.grad = parameter.grad.coalesce()
    has_sparse = any(_is_sparse(p.grad) for p in model.parameters())
    if not own and not has_sparse:
        norm: Any = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    # Each process has the gradients of its own rows of a sharded table; all other gradients are the same everywhere.
    others = [p for p in model.parameters() if all(p is not q for q in own)]
    of_rows, of_others = (_norm(parameters).square() for parameters in (own, others))
    norm = (accelerator.reduce(of_rows, "sum") + of_others).sqrt()
    # torch's foreach implementation does not support sparse gradients.
    torch.nn.utils.clip_grads_with_norm_([*own, *others], max_norm, norm, foreach=False if has_sparse else None)
    return norm


def _norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm([g.values() if _is_sparse(g) else g for g in gradients])


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Builds a schedule with linear warmup, then cosine decay to zero at `total_steps`."""
    schedule: torch.optim.lr_scheduler.LRScheduler = get_cosine_schedule_with_warmup(
        optimizer, round(settings.warmup_ratio * total_steps), total_steps
    )
    return schedule
