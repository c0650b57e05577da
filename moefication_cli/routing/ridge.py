"""Ridge regression in closed form, with the bias left out of the penalty. Axes: T tokens, D inputs, E outputs."""

import torch
from torch import Tensor


def ridge(x_TD: Tensor, y_TE: Tensor, damping: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """(w_ED, b_E) with y ~ x W^T + b; `damping` is relative to the inputs' mean variance. Without `intercept` b is 0."""
    x_mean_D, y_mean_E = x_TD.mean(0) * intercept, y_TE.mean(0) * intercept
    centred_TD = x_TD - x_mean_D
    gram_DD = centred_TD.T @ centred_TD
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean() + 1e-6)
    w_DE = torch.linalg.solve(gram_DD, centred_TD.T @ (y_TE - y_mean_E))
    return w_DE.T.contiguous(), y_mean_E - x_mean_D @ w_DE
