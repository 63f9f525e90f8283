"""Whether clicks have ever trained a model: its weights show it, so checkpoints need no mark.

Each tower's click logit has a bias that starts at zero. Clicks alone train it (pretraining leaves it at zero), and
every optimiser moves it in its first step.
"""

from typing import Any

import torch
from torch import nn

from flip_hf.nn.fusion import FUSION

_PRETRAINING_MODELS = ("FlipModel", "FlipForPreTraining")


def missing_click_training(model: Any) -> str | None:
    """Why the click logits of a `FlipForCTR` mean nothing yet; None once any training loop has trained them."""
    reasons = []
    if not any(_has_learned(model, part) for part in _logit_parts(model)):
        if is_saved_without_clicks(model.config):
            reasons.append(f"was saved by {model.config.architectures[0]}, which does not learn clicks")
        elif not model.fresh_parameters:
            reasons.append("was never trained on clicks (the biases of its click logits are zero, as at the start)")
    fresh = {name.split(".")[0] for name in model.fresh_parameters}
    has_moved = "text_head" in fresh and _has_learned(model, "text_head.")
    if fresh and not has_moved and not ("fusion" in fresh and _fusion_has_moved(model)):
        reasons.append(f"lacks {', '.join(model.fresh_parameters)}, which start afresh")
    return " and ".join(reasons) or None


def is_saved_without_clicks(config: Any) -> bool:
    """Whether a checkpoint's configuration names a model that does not learn clicks."""
    return (config.architectures or [""])[0] in _PRETRAINING_MODELS


def logit_biases(model: Any, part: str = "") -> dict[str, nn.Parameter]:
    """The biases of a `FlipForCTR`'s click logits by name; with `part` those whose tower has that prefix."""
    # Not by the modules: PEFT wraps them.
    parts = tuple(name for name in _logit_parts(model) if name.startswith(part))
    return {name: p for name, p in model.named_parameters() if name.startswith(parts) and name.endswith("bias")}


def _logit_parts(model: Any) -> list[str]:
    """Prefixes of the parameters that make the towers' click logits."""
    backbone = model.flip.backbone
    return [
        *([] if backbone is None else [f"flip.backbone.{backbone.logit_module}."]),
        *([] if model.config.mode == "id" else ["text_head."]),
    ]


def _has_learned(model: Any, part: str) -> bool:
    """Whether a bias is not what it was when a checkpoint without clicks was loaded, or else is not zero."""
    return any(
        p.is_meta or bool((p != model.biases_without_clicks.get(name, torch.zeros(1)).to(p)).any())
        for name, p in logit_biases(model, part).items()
    )


def _fusion_has_moved(model: Any) -> bool:
    start = FUSION[model.config.fusion](len(model.config.tabular_fields))
    start.init_parameters()
    return any(
        now.is_meta or not torch.equal(now.detach().cpu().float(), start.get_parameter(name.split(".")[-1]))
        for name, now in model.fusion.named_parameters()
    )
