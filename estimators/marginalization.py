"""The exact expectation, by enumerating every class."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.contract import CostFunction, Estimate, Estimator, categorical_kl


class Marginalization(Estimator):
    """E_q[f] = sum_k q_k f(e_k) (Kingma et al. 2014, eq. 7): exact, at K calls of f per image."""

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        batch, num_classes = logits.shape
        classes = torch.eye(num_classes, device=logits.device).unsqueeze(1).expand(-1, batch, -1)
        value = (logits.float().softmax(dim=-1).T * f(classes)).sum(dim=0)
        return Estimate(value, categorical_kl(logits), logits.new_zeros(()), {"evaluations": float(num_classes)})
