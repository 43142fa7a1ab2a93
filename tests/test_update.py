"""One step of training, and what a recording of it does at other steps: CUDA graphs, emulated on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimators.gumbel_softmax import GumbelSoftmax
from scripts.benchmark import compose_run, time_in_a_row
from scripts.gradient_quality import all_names
from tests.runs import CONV, FAMILIES, MLP, ROOT, SLOWLY, run
from training import update
from training.divergence import Diverged, FiniteGuard
from training.half import HalfWeights
from training.run import Run

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.lift_fresh)  # for the device, or for the host's memory
STEPS = 9


class Recording(TorchDispatchMode):
    """Records operations with the tensors that they ran on; a replay runs them again, into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.own: set[int] = set()  # storages that came to be while recording
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what others held

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and storage(tensor) not in self.own | self.before.keys():
                self.before[storage(tensor)] = tensor, tensor.detach().clone()
        outputs = operation(*args, **(kwargs or {}))
        produced = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        self.own |= {storage(tensor) for tensor in produced} - self.before.keys()
        self.calls.append((operation, args, kwargs or {}, produced))
        return outputs

    @torch.no_grad()
    def undo(self) -> None:
        """A graph is recorded without being run."""
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, places in self.calls:
            produced = [leaf for leaf in tree_leaves(operation(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for place, now in zip(places, produced, strict=True):
                if storage(place) != storage(now):
                    place.copy_(now)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Has recordings emulated, and lists them."""
    made: list[Recording] = []

    def record(work: Callable[[], Any], *generators: torch.Generator) -> tuple[Callable[[], None], Any]:
        made.append(Recording())
        drawn_from = [generator.get_state() for generator in generators]
        with made[-1]:
            result = work()
        made[-1].undo()
        for generator, state in zip(generators, drawn_from, strict=True):
            generator.set_state(state)
        return made[-1].replay, result

    monkeypatch.setattr(update, "record", record)
    monkeypatch.setattr(update, "branches", lambda works: [work() for _, work in works])
    monkeypatch.setattr(update, "beside", lambda stream, work: work())
    return made


def trained(kind: type[update.Update], line: str, estimator: str) -> tuple[Run, list[dict[str, float]]]:
    """A run after some steps, and the terms of each, as a GPU would do them: without looking at a number."""
    # a rate that float32 holds: a recorded step reads it from a tensor
    made = compose_run([*line.split(), "optimizer.lr=0.00390625"], estimator)
    guard = FiniteGuard(made.optimizer, made.parameters, made.device)
    guard.deferred = True
    step_once, terms = kind(made, guard), []
    for step in range(STEPS):
        result = step_once(step)
        made.step = step + 1
        made.add(result, guard.norm)
        terms.append({name: term.item() for name, term in result.terms.items()})
    guard.raise_if_diverged()
    return made, terms


def assert_replayed_is_the_same(line: str, estimator: str) -> None:
    (run_once, once), (replayed, again) = (
        trained(kind, line, estimator) for kind in (update.Update, update.ReplayedUpdate)
    )
    assert once == again
    for name, value in run_once.model.state_dict().items():
        assert torch.equal(value, replayed.model.state_dict()[name]), name
    for name, value in run_once.estimator.state_dict().items():
        assert torch.equal(value, replayed.estimator.state_dict()[name]), name
    assert run_once.take_means() == replayed.take_means()


@pytest.mark.parametrize("estimator", all_names())
def test_a_replayed_step_has_the_numbers_of_one_that_is_run(estimator: str, recordings: list[Recording]) -> None:
    assert_replayed_is_the_same(MLP, estimator)
    assert len(recordings) == (estimator != "sparsemax")  # how often that calls f depends on the numbers
    for operation, *_ in (call for recording in recordings for call in recording.calls):
        assert operation.overloadpacket not in WAITING, operation


def test_a_replayed_step_of_the_convolutional_networks_is_the_same(recordings: list[Recording]) -> None:
    assert_replayed_is_the_same(CONV, "gumbel_softmax")
    assert len(recordings) == 1


@pytest.mark.parametrize("estimator", ["gumbel_softmax(estimator.kl=relaxed {})", "reinmax({})"])
@pytest.mark.parametrize(
    "schedule",
    [
        f"{SLOWLY}estimator.temperature.rate=0.1 estimator.temperature.every=2",
        "schedule@estimator.temperature=linear estimator.temperature.steps=6",
        "schedule@estimator.temperature=cosine estimator.temperature.steps=6",
    ],
)
def test_a_step_is_recorded_once_for_all_temperatures(
    schedule: str, estimator: str, recordings: list[Recording]
) -> None:
    assert_replayed_is_the_same(MLP, estimator.format(schedule))
    assert len(recordings) == 1


@pytest.mark.parametrize(("every", "recorded"), [(5, 2), (1, 0)])  # steps 3 and 4, and 5 to 9
def test_a_step_is_recorded_anew_when_what_an_estimator_does_has_changed(
    every: int,
    recorded: int,
    recordings: list[Recording],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(GumbelSoftmax, "depends_on", lambda self, step: step // every)
    with caplog.at_level("WARNING", "catvae"):
        assert_replayed_is_the_same(MLP, "gumbel_softmax")
    assert len(recordings) == recorded
    said = [message for message in caplog.messages if "cuda_graph=true records no step" in message]
    assert len(said) == (recorded == 0)


class Half(update.Update):
    """As a GPU has it."""

    def __init__(self, run: Run, guard: FiniteGuard) -> None:
        super().__init__(run, guard)
        self.half = HalfWeights(run.model)


@pytest.mark.parametrize("line", [MLP, FAMILIES["categorical_mlp"]], ids=["mlp", "without labels"])
@pytest.mark.parametrize("estimator", ["gumbel_softmax", "score_function"])
def test_weights_rounded_at_once_give_the_bits_of_autocast(line: str, estimator: str) -> None:
    line = f"{line} precision=bf16"
    (run_once, once), (other, again) = (trained(kind, line, estimator) for kind in (update.Update, Half))
    assert once == again
    for name, value in run_once.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert all(parameter.dtype == torch.float32 for parameter in other.model.parameters())


@pytest.mark.parametrize("line", [MLP, CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize("estimator", ["marginalization", "relax"])
def test_gradients_of_weights_rounded_at_once_are_those_of_autocast_to_rounding(line: str, estimator: str) -> None:
    """Where one weight has several uses, their gradients add up in bf16."""
    found = []
    for kind in (update.Update, Half):
        made = compose_run([*line.split(), "precision=bf16"], estimator)
        kind(made, FiniteGuard(made.optimizer, made.parameters, made.device))(0)
        found.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 0.02 * gradient.norm(), name


def test_the_learning_rate_of_a_replayed_step_is_the_step_s(recordings: list[Recording]) -> None:
    line = f"{MLP} lr_factor=linear lr_factor.start=1 lr_factor.end=0.5 lr_factor.steps=8"
    assert_replayed_is_the_same(line, "marginalization")


def test_the_weight_of_the_kl_in_a_replayed_step_is_the_step_s(recordings: list[Recording]) -> None:
    assert_replayed_is_the_same(FAMILIES["categorical_mlp"] + " objective.kl_warmup=8", "score_function/leave_one_out")
    assert len(recordings) == 1


def test_the_weight_of_what_u_teaches_in_a_replayed_step_is_the_step_s(recordings: list[Recording]) -> None:
    fading = "model.distortion=0.5 objective.distortion_fades=2"
    assert_replayed_is_the_same(f"{MLP} objective.labels_first=3 {fading}", "marginalization")
    assert len(recordings) == 1


def changed_by_one_step(words: str) -> tuple[Tensor, Tensor]:
    """What SGD at a rate of 1 adds to all parameters, and the norm [] of their gradient as it is reported."""
    made = compose_run([*MLP.split(), "optimizer=sgd", "optimizer.lr=1", *words.split()], "marginalization")
    flat = torch.nn.utils.parameters_to_vector
    before = flat(made.parameters.values()).detach().clone()
    guard = FiniteGuard(made.optimizer, made.parameters, made.device)
    update.Update(made, guard)(0)
    return flat(made.parameters.values()).detach() - before, guard.norm


def test_a_long_gradient_is_shortened_to_the_limit_along_its_direction_and_a_short_one_left() -> None:
    step, norm = changed_by_one_step("")
    shortened, reported = changed_by_one_step("train.clip_gradient=0.5")
    left, _ = changed_by_one_step(f"train.clip_gradient={2 * norm}")
    assert norm > 1
    assert reported == norm  # TensorBoard has what it was
    assert shortened.norm().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(shortened, step * (0.5 / norm), rtol=1e-3, atol=1e-6)
    assert torch.equal(left, step)


def test_an_estimator_s_own_gradient_neither_shortens_nor_is_shortened() -> None:
    """RELAX's is that of the variance, which may be hundreds of times as long."""
    made = compose_run([*MLP.split(), "train.clip_gradient=0.5"], "relax")
    update.Update(made, FiniteGuard(made.optimizer, made.parameters, made.device))(0)
    own, of_model = (
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for module in (made.estimator, made.model)
    )
    assert of_model.norm().item() == pytest.approx(0.5, rel=1e-4)
    made = compose_run(MLP.split(), "relax")
    update.Update(made, FiniteGuard(made.optimizer, made.parameters, made.device))(0)
    assert torch.equal(own, torch.cat([p.grad.flatten() for p in made.estimator.parameters() if p.grad is not None]))


def test_a_gradient_is_shortened_in_a_replayed_step_too(recordings: list[Recording]) -> None:
    line = f"{MLP} train.clip_gradient=0.5"
    assert_replayed_is_the_same(line, "gumbel_softmax")
    sizes = []
    for words in (line, MLP):
        made, _ = trained(update.ReplayedUpdate, words, "gumbel_softmax")
        gradient = torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(0.5, rel=1e-4)
    assert sizes[1] > 1
    for operation, *_ in recordings[0].calls:
        assert operation.overloadpacket not in WAITING, operation


def test_a_bad_number_in_a_replayed_step_is_named_and_blocks_the_update(recordings: list[Recording]) -> None:
    made = compose_run(MLP.split(), "marginalization")
    guard = FiniteGuard(made.optimizer, made.parameters, made.device)
    guard.deferred = True
    step_once = update.ReplayedUpdate(made, guard)
    for step in range(6):
        step_once(step)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.batches.data.y_labelled.fill_(float("nan"))
    for step in range(6, 9):
        step_once(step)
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    with pytest.raises(Diverged, match=r"^labelled_bound is nan at step 6$"):
        guard.raise_if_diverged()


def test_every_thread_of_a_run_takes_numbers_below_the_normal_ones_for_zero() -> None:
    """Adam's means of a pixel that is always black come to 1e-38 after 800 steps, and stay, and are slow."""
    program = (
        "import torch\n"
        "from scripts.benchmark import compose_run\n"
        f"compose_run({MLP.split()}, 'gumbel_softmax')\n"
        "torch.set_num_threads(2)\n"
        "assert not (torch.full((2**20,), 1e-30) * 1e-10).any()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_replayed_steps_are_timed_beside_those_that_are_run(recordings: list[Recording]) -> None:
    seconds = time_in_a_row(MLP.split(), "gumbel_softmax", 4)
    assert set(seconds) == {"eager", "graph"}
    assert min(seconds.values()) > 0
    assert len(recordings) == 1


def test_a_graph_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    said = run(f"{MLP} cuda_graph=true", tmp_path / "run", code=2).err
    assert said == "catvae: cuda_graph must be false where no CUDA device trains, got true\n"
    assert not (tmp_path / "run").exists()
