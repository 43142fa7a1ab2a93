"""Between enumeration and sampling: a few classes exactly, and at most one draw for the rest.

With N variables the classes are their K^N joint ones, 4,096 at most.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from estimators.contract import CostFunction, Estimate, Estimator, at_least, kl_from, with_gradient_of
from estimators.joint import check_joint, classes_of, outer
from estimators.relaxations import LOG_ZERO, TINY, exponential, gumbel, log_probabilities

MOST_DRAWN = 12  # a second of sums a step


class SumAndSample(Estimator):
    """The `num_exact` most probable classes C summed, and a draw v ~ q(. | not C): unbiased (Liu et al. 2019).

    grad = sum_{k in C} (f_k - b) grad q_k + q(not C) (f(v) - b) grad log q(v), and sum_{k in C} q_k grad f_k
    + q(not C) grad f(v) for f's own parameters (their eq. 5 with the score function for the rest).

    Ours: b, the mean cost of the summed classes, which is no function of v and so leaves the mean as it is
    (sum_k grad q_k = 0). It takes away what the costs have in common, most of a bound; costs around zero vary less
    without it. With num_exact = K it is exact. Raises ValueError for num_exact < 1.
    """

    calls_once = True

    def __init__(self, num_exact: int = 1) -> None:
        super().__init__()
        self.num_exact = at_least("num_exact", num_exact, 1)

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        check_joint(num_variables, num_classes)

    def depends_on(self, step: int) -> object:
        return None

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        of_variables = log_probabilities(logits)
        log_q = outer(of_variables)
        exact = log_q.detach().topk(min(self.num_exact, log_q.shape[-1]), dim=-1).indices
        joint = exact  # classes that f is called at, [B, C] or [B, C + 1]
        weight = log_q.detach().gather(-1, exact).exp()
        if self.num_exact < log_q.shape[-1]:
            others = log_q.detach().scatter(-1, exact, -math.inf).exp()
            race = others / exponential(tuple(log_q.shape), generator=generator, rows=0)  # as argmax(log q + Gumbel)
            joint = torch.cat([exact, race.argmax(dim=-1, keepdim=True)], dim=-1)
            weight = torch.cat([weight, others.sum(dim=-1, keepdim=True)], dim=-1)
        costs = f(classes_of(joint.T, *logits.shape[1:]))
        fixed, of_exact = costs.detach().T, weight[:, : exact.shape[-1]]
        shares = of_exact / of_exact.sum(dim=-1, keepdim=True)  # 1 of one class, whose cost then cancels exactly
        baseline = (shares * fixed[:, : exact.shape[-1]]).sum(dim=-1, keepdim=True)
        surrogate = (weight * (fixed - baseline) * log_q.gather(-1, joint)).sum(dim=-1)  # grad q = q grad log q
        value = with_gradient_of((weight.T * costs).sum(dim=0), surrogate)
        metrics: dict[str, Tensor | float] = {"evaluations": float(len(costs))}
        return Estimate(value, kl_from(of_variables, self.log_prior), logits.new_zeros(()), metrics)


class UnorderedSet(Estimator):
    """`num_samples` different classes, drawn without replacement: unbiased (Kool et al. 2020).

    value = sum_{s in S} q(s) R(S, s) f(s) (their eq. 11), and with their built-in baseline (eq. 17)
    grad = sum_{s in S} R(S, s) grad q(s) (f(s) - sum_{s' in S} q(s') R^{-s}(S, s') f(s')),

    R(S, s) = P(S | s is drawn first) / P(S), and R^{-s} the same among the classes without s, where R^{-s}(S, s) = 1.
    With num_samples = K it is exact. Costs 2^num_samples small sums, of no more samples than there are classes. Raises
    ValueError for num_samples < 2, and where more than MOST_DRAWN would be drawn.
    """

    calls_once = True

    def __init__(self, num_samples: int = 2) -> None:
        super().__init__()
        self.num_samples = at_least("num_samples", num_samples, 2)

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        if min(self.num_samples, check_joint(num_variables, num_classes)) > MOST_DRAWN:
            raise ValueError(
                f"num_samples must be <= {MOST_DRAWN}, as it takes 2^num_samples sums, got {self.num_samples}"
            )

    def depends_on(self, step: int) -> object:
        return None

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        of_variables = log_probabilities(logits)
        log_q = outer(of_variables)
        size = min(self.num_samples, log_q.shape[-1])
        fixed = log_q.detach().double()
        noise = gumbel(tuple(log_q.shape), generator=generator, rows=0)
        drawn = (log_q.detach() + noise).topk(size, dim=-1).indices
        costs = f(classes_of(drawn.T, *logits.shape[1:]))
        members = fixed.gather(-1, drawn).T
        first, second = ratios(members, fixed.scatter(-1, drawn, -math.inf).logsumexp(dim=-1))
        log_weight = members + first
        baseline = ((members + second).exp() * costs.detach()).sum(dim=1)
        signal = log_weight.exp() * (costs.detach() - baseline)
        surrogate = (signal.float() * log_q.gather(-1, drawn).T).sum(dim=0)  # R grad q = q R grad log q
        value = with_gradient_of((log_weight.exp().float() * costs).sum(dim=0), surrogate)
        metrics: dict[str, Tensor | float] = {"evaluations": float(size)}
        return Estimate(value, kl_from(of_variables, self.log_prior), logits.new_zeros(()), metrics)


def ratios(members: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """log R(S, s) [k, B] and log R^{-s}(S, s') [k, k, B] (Kool et al. 2020, eqs. 10 and 16), by s, then s'.

    From log q of the members of S [k, B] and of all other classes together [B] (-inf where there are none). Let V(A)
    be the probability that draws without replacement, once they have taken A, go on to complete S: V(S) = 1 and
    V(A) = sum_{a in S \\ A} q(a) / (1 - q(A)) V(A + a). Then R(S, s) = V({s}) / V({}) and
    R^{-s}(S, s') = V({s, s'}) / V({s}).
    """
    everyone = frozenset(range(len(members)))
    log_v = {everyone: torch.zeros_like(log_rest)}
    for size in reversed(range(len(members))):
        for taken in map(frozenset, combinations(everyone, size)):
            left = sorted(everyone - taken)
            remaining = torch.stack([*(members[a] for a in left), log_rest]).logsumexp(dim=0)
            onward = torch.stack([members[a] + log_v[taken | {a}] for a in left]).logsumexp(dim=0)
            log_v[taken] = onward - remaining
    first = torch.stack([log_v[frozenset({s})] - log_v[frozenset()] for s in everyone])
    rows = [[log_v[frozenset({s, t})] - log_v[frozenset({s})] for t in everyone] for s in everyone]
    return first, torch.stack([torch.stack(row) for row in rows])


class SparsemaxSum(Estimator):
    """E_p[f] for p = sparsemax(logits), summed over p's support alone (Correia et al. 2020, section 3).

    With N variables p is the sparsemax of their joint classes' logits, sum_n logits_n.

    Exact for p, whose KL it reports; but evaluation takes softmax(logits) for q(y|x), and against that it is biased.
    f is called as often as the largest support among the images has classes; `support` is the mean size.
    """

    calls_once = True

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        check_joint(num_variables, num_classes)

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        p = sparsemax(outer(logits.float()))
        support = (p > 0).sum(dim=-1)
        calls = max(1, int(support.max()))  # the one place where an estimator waits for the device
        weight, order = p.sort(dim=-1, descending=True)
        costs = f(classes_of(order[:, :calls].T, *logits.shape[1:]))
        kl = (p * p.clamp(min=TINY).log()).sum(dim=-1) + math.log(p.shape[-1])
        if self.log_prior is not None:
            kl = kl - (p * (outer(self.log_prior.expand(logits.shape[1:])) + math.log(p.shape[-1]))).sum(dim=-1)
        metrics: dict[str, Tensor | float] = {"evaluations": float(calls), "support": support.float().mean()}
        return Estimate((weight[:, :calls].T * costs).sum(dim=0), kl, logits.new_zeros(()), metrics)


def sparsemax(logits: Tensor) -> Tensor:
    """The point of the simplex closest to logits [..., K] (Martins & Astudillo 2016, algorithm 1), in float32.

    p_k = max(0, l_k - t), t = (sum of the m largest logits - 1) / m, m the number of classes with p > 0.
    """
    shifted = (logits.float() - logits.float().max(dim=-1, keepdim=True).values).clamp(min=LOG_ZERO)
    descending = shifted.sort(dim=-1, descending=True).values
    sums = descending.cumsum(dim=-1) - 1
    count = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    size = (count * descending > sums).sum(dim=-1, keepdim=True).clamp(min=1)  # at least 1 but for NaN, left as it is
    return (shifted - sums.gather(-1, size - 1) / size).clamp(min=0)
