"""What goes wrong quietly in M2, each as a number held against a threshold.

54 runs of 18 estimators on MNIST with 100 labels ended far from the thresholds: with 9.8 to 10 effective classes, a
spread over y of 31 to 72 nats and a KL of z of 13.1 to 14.1 nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import Alarm, Evaluation, Weights

LEAST_CLASSES = 0.5  # of the labels' spread beyond one class, that predictions must have
LEAST_SPREAD = 1.0  # nats: the standard deviation of b(x,y) over y
LEAST_KL_Z = 0.1  # nats


def alarms(measured: Evaluation, labels: Tensor, weights: Weights) -> list[Alarm]:
    """Of an evaluation of images with these labels [N], -1 where unknown."""
    seen = measured.per_image
    assert seen is not None
    assert seen.bound_spread is not None
    assert measured.kl_z is not None
    found = [classes_collapsed(seen.q, labels)]
    if weights.labelled or weights.unlabelled:  # else p(x|y,z) and q(z|x,y) are not trained
        found += [generator_ignores_y(seen.bound_spread), z_unused(measured.kl_z)]
    return found


def classes_collapsed(q: Tensor, labels: Tensor) -> Alarm:
    """From q(y|x) [N, K] and labels [N], -1 where unknown: whether q is spread over far fewer classes than the labels.

    The spread is exp H(p) - 1, p the mean of q(y|x) or the labels' frequencies: K - 1 where classes are as frequent, 0
    where there is one. Images without a label do not count, unless none has one: then it is held against K classes.
    """
    known, num_classes = labels >= 0, q.shape[-1]
    if known.any():
        used = effective_classes(q[known].double().mean(dim=0))
        there = effective_classes(torch.bincount(labels[known], minlength=num_classes).double() / known.sum())
    else:
        used, there = effective_classes(q.double().mean(dim=0)), float(num_classes)
    return Alarm(
        "classes_collapsed",
        used - 1 < LEAST_CLASSES * (there - 1),
        f"q(y|x) has collapsed: it uses as many as {used:.1f} classes, where the labels are spread over {there:.1f}",
    )


def effective_classes(p: Tensor) -> float:
    """exp H(p), the number of equally frequent classes that would be as diverse, of frequencies p [K]."""
    return p.xlogy(p).sum().neg().exp().item()


def generator_ignores_y(spread: Tensor) -> Alarm:
    """From the standard deviations of b(x,y) over y [N], nats: whether y hardly changes the bound of an image."""
    mean = spread.double().mean().item()
    return Alarm(
        "generator_ignores_y",
        mean < LEAST_SPREAD,
        f"the generator ignores y: the bound differs by {mean:.2g} nats between classes, less than {LEAST_SPREAD:g}",
    )


def z_unused(kl_z: float) -> Alarm:
    """From the mean KL of q(z|x,y), nats per image: whether z says nothing about the image (posterior collapse)."""
    return Alarm("z_unused", kl_z < LEAST_KL_Z, f"z is unused: its KL is {kl_z:.2g} nats, less than {LEAST_KL_Z:g}")
