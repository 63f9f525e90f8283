"""Finds out from a model's weights whether it was ever trained on clicks, so checkpoints need no flag for it.

The click logit of each tower has a bias that is initialised to zero. Pretraining leaves it at zero; training on clicks
changes it in the first step, with any optimiser.
"""

from typing import Any

import torch
from torch import nn

from flip_hf.nn.fusion import FUSION

_PRETRAINING_MODELS = ("FlipModel", "FlipForPreTraining")


def missing_click_training(model: Any) -> str | None:
    """Why the click logits of a `FlipForCTR` are not trained yet; None if any training loop has trained them."""
    reasons = []
    if not any(_has_learned(model, part) for part in _logit_parts(model)):
        if is_saved_without_clicks(model.config):
            reasons.append(f"was saved by {model.config.architectures[0]}, which does not learn clicks")
        elif not model.fresh_parameters:
            reasons.append("was never trained on clicks (the biases of its click logits are still zero)")
    fresh = {name.split(".")[0] for name in model.fresh_parameters}
    has_moved = "text_head" in fresh and _has_learned(model, "text_head.")
    if fresh and not has_moved and not ("fusion" in fresh and _fusion_has_moved(model)):
        reasons.append(f"lacks {', '.join(model.fresh_parameters)}, which were newly initialised")
    return " and ".join(reasons) or None


def is_saved_without_clicks(config: Any) -> bool:
    """Whether a checkpoint's configuration names a model class that does not learn clicks."""
    return (config.architectures or [""])[0] in _PRETRAINING_MODELS


def logit_biases(model: Any, part: str = "") -> dict[str, nn.Parameter]:
    """The biases of a `FlipForCTR`'s click logits by name; `part` is a prefix that restricts them to one tower."""
    # Found by name, not by module, because PEFT wraps modules.
    parts = tuple(name for name in _logit_parts(model) if name.startswith(part))
    return {name: p for name, p in model.named_parameters() if name.startswith(parts) and name.endswith("bias")}


def _logit_parts(model: Any) -> list[str]:
    """Name prefixes of the layers that compute the towers' click logits."""
    backbone = model.flip.backbone
    return [
        *([] if backbone is None else [f"flip.backbone.{backbone.logit_module}."]),
        *([] if model.config.mode == "id" else ["text_head."]),
    ]


def _has_learned(model: Any, part: str) -> bool:
    """Whether a bias differs from its value in a loaded checkpoint without clicks or, if none was loaded, from zero."""
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
