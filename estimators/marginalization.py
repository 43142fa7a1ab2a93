"""The exact expectation, by enumerating every class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from estimators.contract import CostFunction, Estimate, Estimator, at_least, categorical_kl
from estimators.joint import all_classes, check_joint, outer

FEW = 16  # classes, which are always evaluated at once, without asking what that takes
KEPT_BYTES = 256 * 2**20  # on a CPU, of what f keeps for its gradient; on a GPU, an eighth of its memory


class Marginalization(Estimator):
    """E_q[f] = sum_k q_k f(e_k) (Kingma et al. 2014, eq. 7): exact, at K calls of f per image.

    With N variables k goes over their K^N joint classes, 4,096 at most.
    `chunk` classes are evaluated at once; with fewer than K, f is evaluated once more in the backward pass instead of
    being kept, so that memory grows with `chunk` and not with K. Null is all of them if they are few or what f keeps
    is small, and else as many as keep it small. Raises ValueError for chunk < 1.
    """

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = None if chunk is None else at_least("chunk", chunk, 1)
        self._affordable: dict[torch.Size, int] = {}

    def prepare(self, context_size: int, num_variables: int, num_classes: int) -> None:
        # more would be a row of every image for every class, in memory that chunks are there to bound
        self.calls_once = check_joint(num_variables, num_classes) <= min(FEW, self.chunk or FEW)

    def depends_on(self, step: int) -> object:
        return None

    def forward(
        self, f: CostFunction, logits: Tensor, *, step: int, context: Tensor, generator: torch.Generator
    ) -> Estimate:
        classes = all_classes(logits)
        if logits.shape not in self._affordable:
            self._affordable[logits.shape] = self.chunk or affordable_chunk(f, classes)
        chunk = self._affordable[logits.shape]
        if chunk >= len(classes):
            costs = f(classes)
        else:
            costs = torch.cat(
                [
                    checkpoint(f, part, use_reentrant=False, preserve_rng_state=False)  # f draws nothing
                    for part in classes.split(chunk)
                ]
            )
        q = outer(logits.float().softmax(dim=-1), torch.mul)
        q = q.T.contiguous()  # so the gradient of the costs is laid out as they are
        value = (q * costs).sum(dim=0)
        return Estimate(
            value, categorical_kl(logits, self.log_prior), logits.new_zeros(()), {"evaluations": float(len(classes))}
        )


def affordable_chunk(f: CostFunction, classes: Tensor) -> int:
    """How many joint classes, of [K^N, B, N, K], can be evaluated at once, from what f keeps for one and for two.

    All of them if they are few or that is at most KEPT_BYTES; else half of what that allows, as the backward pass
    needs as much again.
    """
    num_classes, limit = len(classes), KEPT_BYTES
    if num_classes <= FEW:
        return num_classes
    if classes.device.type == "cuda":
        limit = torch.cuda.get_device_properties(classes.device).total_memory // 8
    each = kept_bytes(f, classes[:2]) - kept_bytes(f, classes[:1])
    return num_classes if each * num_classes <= limit else max(1, limit // (2 * each))


def kept_bytes(f: CostFunction, y: Tensor) -> int:
    """Bytes that f(y) keeps for its gradient."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        costs = f(y)  # held until all is counted, so that no storage is counted twice
    del costs
    return sum(storages.values())
