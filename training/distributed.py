"""One run of several processes, which torchrun starts: each has its rows of every minibatch, and the first one writes.

PyTorch's DistributedDataParallel averages the gradients of a forward pass. J is no forward pass of a module: estimators
take gradients inside it, leave parameters without one, and keep state that must be averaged too. So the processes
average one vector after the backward pass: gradients, J's terms, moving averages. All then have the same bits, diverge
in the same step, and go on alike.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from configs.check import number_of_processes
from estimators.shared import SharedGenerator
from models.contract import Objective
from training.interruption import ProcessLost

NO_LIMIT = timedelta(days=365)  # while the first process looks, or writes; one that is no more is noticed at once
DEVICE, SAID, NONE = "catvae/device", "catvae/said", "none"
AWHILE = 1.0  # seconds in which the first process, which writes the log, may say what ended the run


# ---- the beginning and the end ----


@functools.cache
def _store() -> Any:
    """Where the processes that torchrun has started meet."""
    return next(rendezvous("env://", timeout=NO_LIMIT))[0]


def begin(device: str) -> Together | None:
    """The first process has a run to do on such a device; returns when all have met, None where it is the only one."""
    if number_of_processes() == 1:
        return None
    _store().set(DEVICE, device)
    return Together(device)


def over() -> None:
    """The first process ends; where it had no run to do, the others need not wait for one."""
    with suppress(RuntimeError):  # the store may be gone already, and the others with it
        _store().compare_set(DEVICE, "", NONE)


def join() -> Together | None:
    """Waits for the first process, and joins it; None if there is no run to do."""
    _store().wait([DEVICE], NO_LIMIT)
    device = _store().get(DEVICE).decode()
    return None if device == NONE else Together(device)


def says() -> bool:
    """Whether this process is to say what ended the run: the first that asks is."""
    try:
        return int(_store().add(SAID, 1)) == 1
    except RuntimeError:  # the store went with the process that had it
        return True


class Together:
    """The processes of a run, once all have met."""

    DIVERGED = 1000  # beside the exit codes of signals: the first process found a number that is not finite

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), number_of_processes()
        uses_gpu = device != "cpu" and torch.cuda.is_available()
        if uses_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if uses_gpu else "gloo"
        store = PrefixStore("catvae", _store())
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        self.hosts: Any = dist.new_group(backend="gloo", timeout=NO_LIMIT)

    # ---- a step ----

    def generator(self, device: torch.device, *sizes: int) -> SharedGenerator:
        """Draws the noise of a whole minibatch of so many labelled and unlabelled images, each process its own rows."""
        return SharedGenerator(device, self.rank, self.size, *(size // self.size for size in sizes))

    def own(self, x: Tensor, y_labelled: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of the minibatch's images x [L + U, C, H, W] and labels [L, K]."""
        labelled = len(y_labelled)
        parts = (part.chunk(self.size)[self.rank] for part in (x[:labelled], x[labelled:]) if len(part))
        return torch.cat(list(parts)), y_labelled.tensor_split(self.size)[self.rank]

    def average(self, parameters: Iterable[Tensor], estimator: nn.Module, result: Objective) -> None:
        """Puts means over all processes in place of gradients, J's terms, and the estimator's moving averages.

        Those are means over images, and all processes have as many: the means are those of the whole minibatch.
        What an estimator reports besides is of each process's own images.
        """
        result.terms = {name: term.detach().clone() for name, term in result.terms.items()}
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = [buffer for buffer in estimator.buffers() if buffer.is_floating_point()]
        numbers = [*gradients, *buffers, *result.terms.values()]
        flat = torch.cat([number.reshape(-1) for number in numbers])
        add_up(flat)
        means = (flat / self.size).split([number.numel() for number in numbers])
        for number, mean in zip(numbers, means, strict=True):
            number.copy_(mean.view(number.shape))

    def share_batch_norm(self, model: nn.Module) -> None:
        """Has batch normalisation use the statistics of the whole minibatch."""
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = type("SharedBatchNorm", (SharedBatchNorm, type(module)), {})

    # ---- between steps ----

    def agree(self, code: int) -> int:
        """Waits for all; the largest code of any: 0, 128 + the signal that stops the run, or DIVERGED."""
        codes = torch.tensor(code)
        try:
            dist.all_reduce(codes, dist.ReduceOp.MAX, self.hosts)
        except RuntimeError as error:
            raise ProcessLost from error
        return int(codes)

    def part(self) -> None:
        """Ends what the processes have together, once all are done: the first evaluates when the others are."""
        self.agree(0)
        dist.destroy_process_group()

    def tell(self, what: Any) -> Any:
        """What the first process tells, of plain containers and tensors."""
        content = io.BytesIO()
        if self.rank == 0:
            torch.save(what, content)
        told = [content.getvalue()]
        try:
            dist.broadcast_object_list(told, group=self.hosts)
        except RuntimeError as error:
            raise ProcessLost from error
        return torch.load(io.BytesIO(told[0]), map_location="cpu", weights_only=True)


def add_up(numbers: Tensor) -> None:
    """Sums a tensor over all processes, in place."""
    try:
        dist.all_reduce(numbers)
    except RuntimeError as error:
        raise ProcessLost from error


class SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient of all their losses comes back."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        total = numbers.clone()
        add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        add_up(total)
        return total


class SharedBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the images of all processes, which PyTorch's own has on GPUs alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        over = [dim for dim in range(input.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
        x = input.float()
        number = number_of_processes() * x.numel() // x.shape[1]
        mean = SumOfAll.apply(x.sum(over)) / number
        centred = x - mean.view(shape)
        variance = SumOfAll.apply(centred.square().sum(over)) / number
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            weight = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), weight)
            self.running_var.lerp_(variance.detach() * number / (number - 1), weight)
        x = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)
