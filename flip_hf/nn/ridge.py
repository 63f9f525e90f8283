"""Ridge regression that falls back to the mean if the inputs predict nothing."""

import torch

# Regularisation strengths from very weak to very strong, as multiples of the inputs' mean squared singular value.
_STRENGTHS = torch.logspace(-4, 4, 33, dtype=torch.float64)


def ridge_predictions(inputs: torch.Tensor, targets: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Predicts by a ridge regression whose strength is chosen by its exact leave-one-out error.

    If no strength has a lower leave-one-out error than the mean of the targets, the mean is the prediction.

    Args:
        inputs: float (N, C).
        targets: float (N, D).
        queries: float (Q, C).

    Returns:
        The predictions for the queries, float64 (Q, D).
    """
    x, y, q = inputs.double(), targets.double(), queries.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    n = len(x)
    mean_error = (y * n / max(n - 1, 1)).square().sum()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ y  # (K, D)
    best, prediction = mean_error, y_mean.expand(len(q), -1)
    for strength in _STRENGTHS.to(x.device) * s.square().mean():
        shrinkage = s.square() / (s.square() + strength)  # (K,)
        # Diagonal of the hat matrix, including the mean's share.
        leverage = u.square() @ shrinkage + 1 / n
        residuals = y - u @ (shrinkage.unsqueeze(1) * rotated)
        error = (residuals / (1 - leverage).clamp(min=1e-9).unsqueeze(1)).square().sum()
        if error < best:
            weights = vh.T @ ((s / (s.square() + strength)).unsqueeze(1) * rotated)  # (C, D)
            best, prediction = error, y_mean + (q - x_mean) @ weights
    return prediction
