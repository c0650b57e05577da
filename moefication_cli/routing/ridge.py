"""Ridge regression in closed form, with the bias left out of the penalty. Axes: T tokens, D inputs, E outputs."""

import torch
from torch import Tensor


def ridge(x_TD: Tensor, y_TE: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(w_ED, b_E) with y ~ x W^T + b; `damping` is relative to the inputs' mean variance."""
    x_mean_D, y_mean_E = x_TD.mean(0), y_TE.mean(0)
    centred_TD = x_TD - x_mean_D
    gram_DD = centred_TD.T @ centred_TD
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean() + 1e-6)
    w_DE = torch.linalg.solve(gram_DD, centred_TD.T @ (y_TE - y_mean_E))
    return w_DE.T.contiguous(), y_mean_E - x_mean_D @ w_DE
