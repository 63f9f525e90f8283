"""Compilation of the text encoder with torch.compile."""

import logging

import torch
from torch.nn import functional as F

from flip_hf.training.protocols import TrainableModel

logger = logging.getLogger(__name__)


def compile_text_encoder(model: TrainableModel, device: torch.device) -> bool:
    """Marks the text encoder for compilation at its first call, with dynamic text lengths.

    It changes the model in place. Parameters keep their names, so saved files are the same.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`.
        device: device that the model will run on.

    Returns:
        True if the text encoder will be compiled; False if the model has no text encoder, or if torch can't compile on
        this machine (logged as a warning).
    """
    text_model = model.base_model.text_model
    if text_model is None:
        return False
    try:
        torch.compile(F.gelu)(torch.zeros(2, device=device))
    # torch.compile runs another compiler, so the error may be of any type.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        logger.warning(
            "training.torch_compile: torch can't compile on this machine (%s), so the text encoder runs uncompiled. "
            "Compiling needs a C++ compiler on a CPU, and Triton on a GPU",
            reason,
        )
        return False
    text_model.compile(dynamic=True)
    return True
