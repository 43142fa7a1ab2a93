"""What scripts.benchmark compares a step with: the arithmetic alone, a loop as first written, and Pyro."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from models.m2.model import Networks, gaussian_kl
from models.networks import GaussianHead, MLPClassifier
from training.run import Run

aten = torch.ops.aten
Step = Callable[[], object]
MakeStep = Callable[[Run, Networks, bool], Step]


def operations_of(step: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products and convolutions of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


class Products(TorchDispatchMode):
    """Collects the matrix products and convolutions that run under it, with their arguments."""

    KINDS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Step] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f.overloadpacket in self.KINDS:
            kept = [argument.clone() if isinstance(argument, Tensor) else argument for argument in args]
            self.calls.append(partial(f, *kept, **(kwargs or {})))
        return f(*args, **(kwargs or {}))


def seconds_of_products(step: Callable[[], object]) -> float:
    """On a CPU, what a step's products and convolutions take by themselves: each in its own shape, its best try."""
    with Products() as products:
        step()
    return sum(min(timed(call, torch.device("cpu")) for _ in range(12)) for call in products.calls)


def best_rate(run: Run) -> float:
    """Floating-point operations a second of square matrix products in the run's precision, the best size and try."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
        best = max(best, *(2 * size**3 / timed(lambda a=a, b=b: a @ b, run.device) for _ in range(12)))  # type: ignore[misc]
    return best


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class ImagesOneByOne(Dataset[tuple[Tensor, Tensor]]):
    """Images uint8 [N, C, H, W] and one-hot classes [N, K], converted one at a time, as ToTensor does."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.images, self.classes = images.cpu(), classes.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 255, self.classes[index]


def plain_loop(run: Run, networks: Networks, sampled: bool) -> Step:
    """A PyTorch loop as one writes it first: DataLoader, float32, a loop over classes or F.gumbel_softmax, loss.item().

    The networks are the run's own, called class by class.
    """
    settings, data, weights = run.config.train, run.batches.data, run.weights
    unused = torch.zeros(len(data.x_unlabelled), networks.num_classes)
    labelled = forever(ImagesOneByOne(data.x_labelled[:], data.y_labelled), settings.batch_size_labelled)
    unlabelled = forever(ImagesOneByOne(data.x_unlabelled[:], unused), settings.batch_size_unlabelled)
    modules: list[Any] = [networks.classifier, networks.inference, networks.generator]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    generator = torch.Generator(run.device).manual_seed(0)
    losses: list[float] = []

    def bound(x: Tensor, y: Tensor) -> Tensor:
        loc, scale = networks.inference(networks.inference.features(x), y.unsqueeze(0))
        z = loc + scale * torch.randn_like(scale)
        logits = networks.generator(y.unsqueeze(0), z)[0]
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(dim=-1)
        return log_likelihood - gaussian_kl(loc, scale)[0]

    def step() -> None:
        (x_labelled, y_labelled), (x_unlabelled, _) = next(labelled), next(unlabelled)
        x_labelled, y_labelled = torch.bernoulli(x_labelled).to(run.device), y_labelled.to(run.device)
        x_unlabelled = torch.bernoulli(x_unlabelled).to(run.device)
        log_q = networks.classifier(x_unlabelled, generator).log_softmax(dim=-1)
        if sampled:
            expected = bound(x_unlabelled, F.gumbel_softmax(log_q, tau=0.5))
        else:
            expected = torch.zeros(len(log_q), device=run.device)
            for k, y in enumerate(torch.eye(networks.num_classes, device=run.device)):
                expected = expected + log_q[:, k].exp() * bound(x_unlabelled, y.expand(len(log_q), -1))
        entropy = -(log_q.exp() * log_q).sum(dim=-1)
        classification = -F.cross_entropy(networks.classifier(x_labelled, generator), y_labelled)
        j = bound(x_labelled, y_labelled).mean() + (expected + entropy).mean() + weights.alpha * classification
        optimizer.zero_grad()
        (-j).backward()
        optimizer.step()
        losses.append(-j.item())

    return step


def forever(data: Dataset[tuple[Tensor, Tensor]], batch_size: int) -> Iterator[Any]:
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    for _ in repeat(None):
        yield from loader


class Concatenating(nn.Module):
    """One hidden layer over concatenated inputs, whose axes before the last are broadcast."""

    def __init__(self, sizes: Sequence[int], hidden: int, last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sum(sizes), hidden), nn.ReLU(), last)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward(self, *parts: Tensor) -> Any:
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.layers(torch.cat([part.expand(*shape, -1) for part in parts], dim=-1))


def concatenating(networks: Networks) -> Networks:
    """Fully connected networks of the same sizes over (x, y) and (y, z), as Pyro's own M2 has them (ss_vae_M2.py)."""
    assert isinstance(networks.classifier, MLPClassifier)
    (hidden, pixels), size, classes = (
        networks.classifier.hidden.weight.shape,
        networks.latent_size,
        networks.num_classes,
    )
    head, last = GaussianHead(hidden, size, "softplus"), nn.Linear(hidden, pixels)
    inference = Concatenating((pixels, classes), hidden, head)
    return Networks(networks.classifier, inference, Concatenating((classes, size), hidden, last), classes, size)


def pyro_generates(networks: Networks, name: str, x: Tensor, y: Tensor | None) -> None:
    """p(y) p(z) p(x|y,z) for a minibatch, as a part of a Pyro program."""
    import pyro
    import pyro.distributions as dist

    size, num_classes = networks.latent_size, networks.num_classes
    y = pyro.sample(f"y_{name}", dist.OneHotCategorical(probs=x.new_full((num_classes,), 1 / num_classes)), obs=y)
    z = pyro.sample(f"z_{name}", dist.Normal(x.new_zeros(size), x.new_ones(size)).to_event(1))
    logits = networks.generator(with_samples(y), with_samples(z)).reshape(*z.shape[:-1], -1)
    pyro.sample(f"x_{name}", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x.flatten(1))


def pyro_infers(networks: Networks, name: str, x: Tensor, y: Tensor) -> None:
    """q(z|x,y) for a minibatch, as a part of a Pyro guide."""
    import pyro
    import pyro.distributions as dist

    loc, scale = networks.inference(networks.inference.features(x), with_samples(y))
    shape = (*torch.broadcast_shapes(y.shape[:-1], (len(x),)), networks.latent_size)
    pyro.sample(f"z_{name}", dist.Normal(loc.reshape(shape), scale.reshape(shape)).to_event(1))


def pyro_draws_class(networks: Networks, name: str, x: Tensor, sampled: bool, generator: torch.Generator) -> Tensor:
    """y ~ q(y|x) for a minibatch, sampled or enumerated in parallel, as a part of a Pyro guide."""
    import pyro
    import pyro.distributions as dist

    infer: Any = {} if sampled else {"enumerate": "parallel"}
    y: Tensor = pyro.sample(f"y_{name}", dist.OneHotCategorical(logits=networks.classifier(x, generator)), infer=infer)
    return y


def register_with_pyro(networks: Networks) -> None:
    import pyro

    for name in ("classifier", "inference", "generator"):
        pyro.module(name, getattr(networks, name))


def with_samples(y: Tensor) -> Tensor:
    return y.reshape(-1, *y.shape[-2:])


def pyro_svi(run: Run, networks: Networks, sampled: bool) -> Step:
    """M2 as a Pyro program: one SVI step with y enumerated in parallel, or sampled with the score function.

    It is given ready minibatches, and J as one program; float32.
    """
    import pyro
    import pyro.distributions as dist
    import pyro.optim
    from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

    pyro.clear_param_store()
    weights = run.weights
    generator = torch.Generator(run.device).manual_seed(0)

    def program(x_labelled: Tensor, y_labelled: Tensor, x_unlabelled: Tensor) -> None:
        register_with_pyro(networks)
        labelled, unlabelled = len(x_labelled), len(x_unlabelled)
        with pyro.plate("labelled", labelled), pyro.poutine.scale(scale=weights.labelled / labelled):
            pyro_generates(networks, "labelled", x_labelled, y_labelled)
        with pyro.plate("unlabelled", unlabelled), pyro.poutine.scale(scale=weights.unlabelled / unlabelled):
            pyro_generates(networks, "unlabelled", x_unlabelled, None)
        with pyro.plate("classified", labelled), pyro.poutine.scale(scale=weights.alpha / labelled):
            logits = networks.classifier(x_labelled, generator)
            pyro.sample("label", dist.OneHotCategorical(logits=logits), obs=y_labelled)

    def guide(x_labelled: Tensor, y_labelled: Tensor, x_unlabelled: Tensor) -> None:
        labelled, unlabelled = len(x_labelled), len(x_unlabelled)
        with pyro.plate("labelled", labelled), pyro.poutine.scale(scale=weights.labelled / labelled):
            pyro_infers(networks, "labelled", x_labelled, y_labelled)
        with pyro.plate("unlabelled", unlabelled), pyro.poutine.scale(scale=weights.unlabelled / unlabelled):
            y = pyro_draws_class(networks, "unlabelled", x_unlabelled, sampled, generator)
            pyro_infers(networks, "unlabelled", x_unlabelled, y)

    elbo = Trace_ELBO(max_plate_nesting=1) if sampled else TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(program, guide, pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 1e-3}), loss=elbo)
    steps = iter(range(10**9))

    def step() -> None:
        x, y_labelled = run.batches(next(steps), generator)
        svi.step(x[: len(y_labelled)], y_labelled, x[len(y_labelled) :])

    return step


def pyro_example(run: Run, networks: Networks, sampled: bool) -> Step:
    """M2 as Pyro's own example trains it (ss_vae_M2.py --aux-loss): an SVI step for each minibatch and loss.

    The labelled images take a step of the ELBO and one of the classification loss, the unlabelled a step of the ELBO.
    It is given ready minibatches; float32.
    """
    import pyro
    import pyro.distributions as dist
    import pyro.optim
    from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

    pyro.clear_param_store()
    generator = torch.Generator(run.device).manual_seed(0)

    def program(x: Tensor, y: Tensor | None = None) -> None:
        register_with_pyro(networks)
        with pyro.plate("data", len(x)):
            pyro_generates(networks, "data", x, y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro_draws_class(networks, "data", x, sampled, generator)
            pyro_infers(networks, "data", x, y)

    def classify(x: Tensor, y: Tensor) -> None:
        register_with_pyro(networks)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=run.weights.alpha):
            pyro.sample("label", dist.OneHotCategorical(logits=networks.classifier(x, generator)), obs=y)

    optimizer = pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 1e-3})
    elbo = Trace_ELBO(max_plate_nesting=1) if sampled else TraceEnum_ELBO(max_plate_nesting=1)
    labelled = SVI(program, guide, optimizer, loss=Trace_ELBO())
    unlabelled = SVI(program, guide, optimizer, loss=elbo)
    classification = SVI(classify, lambda x, y: None, optimizer, loss=Trace_ELBO())
    steps = iter(range(10**9))

    def step() -> None:
        x, y_labelled = run.batches(next(steps), generator)
        x_labelled, x_unlabelled = x[: len(y_labelled)], x[len(y_labelled) :]
        labelled.step(x_labelled, y_labelled)
        classification.step(x_labelled, y_labelled)
        unlabelled.step(x_unlabelled)

    return step
