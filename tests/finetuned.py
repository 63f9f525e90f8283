"""Models that count as trained on clicks, without the training."""

import torch

from flip_hf.click_training import logit_biases


def finetuned(model):
    """The `FlipForCTR`, with the biases of its click logits off zero, as one step of any optimiser leaves them."""
    with torch.no_grad():
        for bias in logit_biases(model).values():
            bias += 0.01
    return model
