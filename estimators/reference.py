"""What the gradients of estimators are held against."""

from __future__ import annotations

from estimators.contract import Estimator
from estimators.joint import MOST
from estimators.local_expectations import IndeCateR
from estimators.marginalization import Marginalization


def reference(num_variables: int, num_classes: int) -> tuple[Estimator, bool]:
    """An unbiased estimator of small variance for N variables of K classes, and whether it is exact.

    Exact where there are few joint classes; else each variable is enumerated by itself, to be averaged over many draws.
    """
    if num_variables == 1 or num_classes**num_variables <= MOST:
        return Marginalization(), True
    return IndeCateR(), False
