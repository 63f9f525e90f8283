"""Models that count as trained on clicks, without the training."""

import torch


def finetuned(model):
    """The `FlipForCTR`, with the biases of its click logits off zero, as one step of any optimiser leaves them."""
    with torch.no_grad():
        for bias in model._logit_biases().values():
            bias += 0.01
    return model
