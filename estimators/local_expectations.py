"""Each variable enumerated by itself, the others as they were drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.contract import CostFunction, Estimate, Estimator, at_least, kl_from, with_gradient_of
from estimators.relaxations import gumbel, gumbel_max, log_probabilities


class IndeCateR(Estimator):
    """grad = mean_s sum_n sum_k grad q_n(k) f(y_s with y_n = k), y_s ~ q: unbiased (De Smet et al. 2023, theorem 1).

    The same draws of the other variables serve every n. The value, and the gradient of f's own parameters, are those
    of the mean over n of E_q_n[f(y_s with y_n)], which is unbiased as well. f is called N K times a draw; with N = 1
    it is exact. Raises ValueError for num_samples < 1.
    """

    calls_once = True

    def __init__(self, num_samples: int = 1) -> None:
        super().__init__()
        self.num_samples = at_least("num_samples", num_samples, 1)

    def depends_on(self, step: int) -> object:
        return None

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        batch, num_variables, num_classes = logits.shape
        log_q = log_probabilities(logits)
        y = gumbel_max(log_q.detach(), gumbel((self.num_samples, *logits.shape), generator=generator))
        costs = f(with_each_class(y).flatten(0, 2)).view(self.num_samples, num_variables, num_classes, batch)
        q = log_q.exp().permute(1, 2, 0)  # [N, K, B], as the costs of a draw
        value = (q.detach() * costs).sum(dim=(1, 2)).mean(dim=0) / num_variables
        local = (q * costs.detach()).sum(dim=(1, 2)).mean(dim=0)
        evaluations = float(self.num_samples * num_variables * num_classes)
        return Estimate(
            with_gradient_of(value, local),
            kl_from(log_q, self.log_prior),
            logits.new_zeros(()),
            {"evaluations": evaluations},
        )


def with_each_class(y: Tensor) -> Tensor:
    """One-hot y [S, B, N, K] with each variable n in turn set to each class k, [S, N, K, B, N, K]."""
    num_variables, num_classes = y.shape[-2:]
    is_set = torch.eye(num_variables, dtype=torch.bool, device=y.device).view(num_variables, 1, 1, num_variables, 1)
    to = torch.eye(num_classes, device=y.device).view(1, num_classes, 1, 1, num_classes)
    return torch.where(is_set, to, y[:, None, None])
