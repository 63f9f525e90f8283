"""The text encoder by torch.compile."""

import logging

import torch
from torch.nn import functional as F

from flip_hf.training.protocols import TrainableModel

logger = logging.getLogger(__name__)


def compile_text_encoder(model: TrainableModel, device: torch.device) -> bool:
    """Has the model's text encoder compiled where it is called first, for texts of any length.

    In place: parameters keep their names, and what is saved is the same.

    Args:
        model: `FlipForPreTraining` or `FlipForCTR`.
        device: where it will be.

    Returns:
        Whether it is: not where the model reads no text, nor where torch can't compile, which is logged.
    """
    text_model = model.base_model.text_model
    if text_model is None:
        return False
    try:
        torch.compile(F.gelu)(torch.zeros(2, device=device))
    # Of any type: it runs another compiler.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        logger.warning(
            "training.torch_compile: torch can't compile here, and the text encoder stays as it is (%s); on a CPU it "
            "needs a C++ compiler, on a GPU Triton",
            reason,
        )
        return False
    text_model.compile(dynamic=True)
    return True
