"""All joint classes of N categorical variables, for estimators that enumerate some or all of them.

Joint class j of K^N is (k_1, .., k_N) with j = k_1 K^(N-1) + .. + k_N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from estimators.relaxations import one_hot

MOST = 4096  # joint classes of several variables, each a column of a table


def check_joint(num_variables: int, num_classes: int) -> int:
    """K^N. Raises ValueError where several variables have too many joint classes."""
    number = num_classes**num_variables
    if num_variables > 1 and number > MOST:
        raise ValueError(
            f"estimator must be one that does not enumerate joint classes: {num_classes}^{num_variables} are more than "
            f"{MOST}; all work but marginalization, sum_and_sample, unordered_set and sparsemax"
        )
    return number


def outer(rows: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """One entry for each joint class [B, K^N], its variables' entries in rows [B, N, K] combined."""
    first, *others = rows.unbind(dim=-2)
    for row in others:
        first = combine(first.unsqueeze(-1), row.unsqueeze(-2)).flatten(-2)
    return first


def classes_of(joint: Tensor, num_variables: int, num_classes: int) -> Tensor:
    """One-hot class vectors [..., N, K] of joint classes [...]."""
    if num_variables == 1:
        return one_hot(joint.unsqueeze(-1), num_classes)
    places = num_classes ** torch.arange(num_variables - 1, -1, -1, device=joint.device)
    return one_hot(joint.unsqueeze(-1) // places % num_classes, num_classes)


def all_classes(logits: Tensor) -> Tensor:
    """Every joint class for every image of logits [B, N, K], [K^N, B, N, K]."""
    batch, num_variables, num_classes = logits.shape
    if num_variables == 1:
        return torch.eye(num_classes, device=logits.device)[:, None, None].expand(-1, batch, -1, -1)
    joint = torch.arange(num_classes**num_variables, device=logits.device)
    return classes_of(joint, num_variables, num_classes).unsqueeze(1).expand(-1, batch, -1, -1)
