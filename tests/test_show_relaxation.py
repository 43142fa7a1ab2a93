"""The picture of the Concrete distribution: the numbers it shows, that it is written, and what is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from scripts import show_relaxation as show
from tests.runs import command

PROBABILITIES = [0.2, 0.3, 0.5]
PI = torch.tensor(PROBABILITIES)
LOGITS = PI.log()
TEMPERATURES = [0.1, 0.5, 1.0, 2.0, 5.0]
ALONG = 200
CELL = 0.5 / ALONG**2  # the area of a cell in dy1 dy2


@pytest.fixture(scope="module")
def y() -> list[Tensor]:
    return show.draws(LOGITS, TEMPERATURES, 20_000, seed=0)


def triangle_area(a: Tensor, b: Tensor, c: Tensor) -> float:
    return float(torch.linalg.det(torch.stack([b - a, c - a]))) / 2


def test_the_simplex_is_an_equilateral_triangle_of_side_1() -> None:
    corners = show.in_plane(torch.eye(3, dtype=torch.float64))
    assert corners.tolist() == [list(corner) for corner in show.CORNERS]
    assert torch.pdist(corners).tolist() == pytest.approx([1.0, 1.0, 1.0])
    centre = show.in_plane(torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.linalg.norm(corners - centre, dim=-1).tolist() == pytest.approx([1 / math.sqrt(3)] * 3)
    assert triangle_area(*corners) == pytest.approx(math.sqrt(3) / 2 * 0.5)  # sqrt(3)/2 of its area in dy1 dy2


@pytest.mark.parametrize("along", [1, 2, 7])
def test_the_cells_have_their_centres_inside_and_fill_the_simplex_evenly(along: int) -> None:
    centres = show.cell_centres(along)
    assert centres.shape == (along**2, 3)
    assert len(centres.mul(3 * along).round().unique(dim=0)) == along**2
    assert bool((centres > 0).all())
    assert torch.allclose(centres.sum(dim=-1), torch.ones(along**2, dtype=torch.float64))
    assert torch.allclose(centres.mean(dim=0), torch.full((3,), 1 / 3, dtype=torch.float64))


# near a corner the density goes as distance^(tau - 2), which the cells resolve the better the hotter it is
@pytest.mark.parametrize(("temperature", "tolerance"), [(1.0, 1e-2), (2.0, 1e-3), (5.0, 1e-4)])
def test_the_density_integrates_to_1(temperature: float, tolerance: float) -> None:
    total = show.density(show.cell_centres(ALONG), LOGITS, temperature).sum() * CELL
    assert float(total) == pytest.approx(1, abs=tolerance)


def test_the_density_is_the_one_written_above_its_panels() -> None:
    y, tau = show.cell_centres(9), 0.7
    pi = PI.double()
    expected = 2 * tau**2 * (pi * y ** (-tau - 1)).prod(dim=-1) / (pi * y**-tau).sum(dim=-1) ** 3
    assert torch.allclose(show.density(y, LOGITS, tau), expected, rtol=1e-5)


@pytest.mark.parametrize("index", [2, 3, 4], ids=lambda index: f"{TEMPERATURES[index]:g}")
def test_the_density_is_the_one_that_the_draws_have(index: int, y: list[Tensor]) -> None:
    """By the mean of y, and by the share of draws with y3 > 1/2."""
    centres = show.cell_centres(ALONG)
    weight = CELL * show.density(centres, LOGITS, TEMPERATURES[index]).unsqueeze(-1)
    for values, drawn in [(centres, y[index]), ((centres > 0.5).double(), (y[index] > 0.5).double())]:
        mean, error = map(torch.tensor, show.mean_and_error(drawn))
        # besides the draws' own error, 1e-2 of the mass is lost in the corners at tau = 1
        assert bool((((values * weight).sum(dim=0) - mean).abs() < 4 * error + 5e-3).all())


def test_rounding_keeps_the_probabilities_at_every_temperature(y: list[Tensor]) -> None:
    for drawn in y:
        mean, error = show.mean_and_error(show.rounded(drawn))
        assert sum(mean) == pytest.approx(1)
        assert error == pytest.approx([math.sqrt(p * (1 - p) / len(drawn)) for p in mean], rel=1e-3)
        assert all(abs(m - p) < 4 * e for m, p, e in zip(mean, PROBABILITIES, error, strict=True))


def test_the_mean_of_the_draws_does_not(y: list[Tensor]) -> None:
    largest = [show.mean_and_error(drawn)[0][2] for drawn in y]
    assert largest == sorted(largest, reverse=True)
    mean, error = show.mean_and_error(y[-1])
    assert all(abs(m - p) > 4 * e for m, p, e in zip(mean, PROBABILITIES, error, strict=True))


def test_every_panel_has_noise_of_its_own_that_the_seed_gives() -> None:
    first, second = show.draws(LOGITS, [1.0, 1.0], 5, seed=3)
    assert not torch.equal(first, second)
    assert torch.equal(first, show.draws(LOGITS, [1.0], 5, seed=3)[0])
    assert not torch.equal(first, show.draws(LOGITS, [1.0], 5, seed=4)[0])


# the last: extremes, a single draw, and nothing in any band of density
@pytest.mark.parametrize(
    "line", ["--temperatures 0.5,2", "--temperatures 0.01 --draws 1 --probabilities 1e-30,1e-60,1"]
)
def test_it_writes_a_picture(line: str, tmp_path: Path) -> None:
    path = tmp_path / "relaxation.png"
    ended = command(show.main, f"{line} --output {path}")
    assert (ended.code, ended.said) == (0, f"{path}\n")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 8 * 200  # inches, dots an inch
        assert 0.7 < image.height / image.width < 1.1
        assert image.info["dpi"] == pytest.approx((200, 200), rel=1e-3)


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    path = tmp_path / "relaxation.pdf"
    assert command(show.main, f"--temperatures 1 --draws 10 --output {path}").code == 0
    assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--probabilities 0.5,0.5", "three numbers > 0 that sum to 1, got [0.5, 0.5]"),
        ("--probabilities 0.2,0.3,0.4", "three numbers > 0 that sum to 1, got [0.2, 0.3, 0.4]"),
        ("--probabilities 0,0.5,0.5", "three numbers > 0 that sum to 1, got [0.0, 0.5, 0.5]"),
        ("--probabilities=-0.5,0.5,1", "three numbers > 0 that sum to 1, got [-0.5, 0.5, 1.0]"),
        ("--probabilities 0.2,0.3,nan", "three numbers > 0 that sum to 1, got [0.2, 0.3, nan]"),
        ("--probabilities a,b,c", "numbers separated by commas, got a,b,c"),
        ("--temperatures 0", "from 0.01 to 100, got [0.0]"),
        ("--temperatures 1,inf", "from 0.01 to 100, got [1.0, inf]"),
        ("--temperatures nan", "from 0.01 to 100, got [nan]"),
        ("--temperatures 1,,2", "numbers separated by commas, got 1,,2"),
        ("--temperatures 1,2,3,4,5,6,7,8,9", "at most 8 numbers"),
        ("--draws 0", "an integer >= 1, got 0"),
        ("--draws 1000000000000", "at most 1000000, got 1000000000000"),
        ("--seed x", "invalid int value: 'x'"),
        ("--output relaxation.jpg", "must end in .png, .pdf or .svg, got relaxation.jpg"),
        ("--output relaxation", "must end in .png, .pdf or .svg, got relaxation"),
        ("--temperatures 1 --draws 1 --output nowhere/relaxation.png", "nowhere/relaxation.png: No such file"),
    ],
)
def test_it_refuses_what_it_cannot_draw(line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command(show.main, line)
    assert ended.code == 2
    assert said in ended.err.splitlines()[-1], ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = command(show.main, "")
    assert ended.code == 2
    assert ended.err == "catvae: drawing this needs Matplotlib; it comes by: uv sync --extra figures\n"
