"""Temperature schedules, held to their formulas."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from estimators import schedules
from estimators.schedules import constant, cosine, exponential, geometric, linear

SHIPPED = Path(__file__).parent.parent / "configs" / "schedule"
ANNEALING = {
    "exponential": partial(exponential, rate=1e-3, minimum=0.1, every=100),
    "geometric": partial(geometric, start=2.0, end=0.125, steps=3000, every=100),
    "linear": partial(linear, start=2.0, end=0.25, steps=3000),
    "cosine": partial(cosine, start=2.0, end=0.25, steps=3000),
}


def test_constant_stays() -> None:
    assert [constant(step, value=0.7) for step in (0, 1, 10**9)] == [0.7] * 3


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.0),
        (99, 1.0),
        (100, math.exp(-0.1)),
        (199, math.exp(-0.1)),
        (2300, math.exp(-2.3)),
        (2400, 0.1),
        (10**9, 0.1),
    ],
)
def test_exponential(step: int, expected: float) -> None:
    assert ANNEALING["exponential"](step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 2.0), (799, 2 * 2**-0.9333333333333333), (1500, 0.5), (2250, 2 * 2 ** (-4 * 2200 / 3000)), (3000, 0.125)],
)
def test_geometric(step: int, expected: float) -> None:
    assert ANNEALING["geometric"](step) == pytest.approx(expected, rel=1e-12)


def test_geometric_is_the_exponential_that_ends_with_the_run() -> None:
    rate = math.log(2) / 3000
    for step in range(0, 4000, 7):
        expected = exponential(step, rate=rate, minimum=0.5, every=100)
        assert geometric(step, start=1.0, end=0.5, steps=3000, every=100) == pytest.approx(expected, rel=1e-12)


def test_geometric_comes_to_its_end_where_the_run_ends_between_two_updates() -> None:
    schedule = partial(geometric, start=1.0, end=0.5, steps=250, every=100)
    assert schedule(249) > 0.5 == schedule(250) == schedule(10**9)


@pytest.mark.parametrize("name", ["exponential", "geometric"])
def test_exponential_and_geometric_change_only_every_so_many_steps(name: str) -> None:
    values = [ANNEALING[name](step) for step in range(1000)]
    changes = [step for step in range(1, 1000) if values[step] != values[step - 1]]
    assert changes == list(range(100, 1000, 100))


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 2.0), (750, 1.5625), (1500, 1.125), (3000, 0.25), (3001, 0.25), (10**9, 0.25)]
)
def test_linear(step: int, expected: float) -> None:
    assert ANNEALING["linear"](step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2.0),
        (750, 0.25 + 1.75 * (1 + math.sqrt(0.5)) / 2),
        (1000, 0.25 + 1.75 * 0.75),
        (1500, 1.125),
        (3000, 0.25),
        (3001, 0.25),
        (10**9, 0.25),
    ],
)
def test_cosine(step: int, expected: float) -> None:
    assert ANNEALING["cosine"](step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ANNEALING)
def test_annealing_never_rises_and_stays_above_its_end(name: str) -> None:
    values = [ANNEALING[name](step) for step in range(5000)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[2000] > values[-1] > 0


def test_linear_and_cosine_may_also_rise() -> None:
    for schedule in (linear, cosine):
        assert schedule(0, start=0.5, end=1.0, steps=10) == 0.5
        assert 0.5 < schedule(5, start=0.5, end=1.0, steps=10) < schedule(10, start=0.5, end=1.0, steps=10) == 1.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("value", constant),
        ("minimum", partial(exponential, rate=1e-3, every=1)),
        ("start", partial(geometric, end=0.5, steps=10, every=1)),
        ("end", partial(geometric, start=1.0, steps=10, every=1)),
        ("start", partial(linear, end=0.5, steps=10)),
        ("end", partial(linear, start=1.0, steps=10)),
        ("start", partial(cosine, end=0.5, steps=10)),
        ("end", partial(cosine, start=1.0, steps=10)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_temperatures_are_refused_by_name(name: str, schedule: Callable[..., float], bad: float) -> None:
    """At every step, the first included: an estimator asks at step 0 when it is built."""
    for step in (0, 10**6):
        with pytest.raises(ValueError, match=f"^{name} must be > 0 and finite, got {bad}$"):
            schedule(step, **{name: bad})


@pytest.mark.parametrize(
    ("name", "schedule", "bad"),
    [
        ("rate", partial(exponential, minimum=0.5, every=1), -1e-3),
        ("rate", partial(exponential, minimum=0.5, every=1), math.nan),
        ("rate", partial(exponential, minimum=0.5, every=1), math.inf),
        ("every", partial(exponential, rate=1e-3, minimum=0.5), 0),
        ("every", partial(geometric, start=1.0, end=0.5, steps=10), 0),
        ("steps", partial(geometric, start=1.0, end=0.5, every=1), 0),
        ("steps", partial(linear, start=1.0, end=0.5), 0),
        ("steps", partial(cosine, start=1.0, end=0.5), -1),
    ],
)
def test_other_unusable_settings_are_refused_by_name(name: str, schedule: Callable[..., float], bad: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be >= .*got {bad}$"):
        schedule(0, **{name: bad})


def test_the_shipped_exponential_schedule_anneals() -> None:
    """Jang et al. 2017: from 1 to 0.5, updated every 2000 steps; it reaches the minimum at step 24,000."""
    shipped = instantiate(OmegaConf.load(SHIPPED / "exponential.yaml"))
    assert shipped.keywords == {"rate": 3e-5, "minimum": 0.5, "every": 2000}
    assert shipped(0) == shipped(1999) == 1.0
    assert shipped(2000) == shipped(3999) == pytest.approx(math.exp(-0.06))
    assert shipped(20_000) == pytest.approx(math.exp(-0.6))
    assert shipped(22_000) == pytest.approx(math.exp(-0.66))
    assert shipped(23_999) > 0.5
    assert shipped(24_000) == shipped(10**6) == 0.5


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_schedules_give_usable_temperatures(path: Path) -> None:
    steps = 50_000
    shipped = instantiate(OmegaConf.merge({"train": {"steps": steps}}, {"schedule": OmegaConf.load(path)})).schedule
    values = [shipped(step) for step in range(0, steps + 1, 1000)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] == (1.0 if path.stem == "constant" else 0.5)


def test_every_schedule_is_shipped() -> None:
    public = {
        name
        for name, value in inspect.getmembers(schedules, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == schedules.__name__
    }
    assert public == {path.stem for path in SHIPPED.glob("*.yaml")}
