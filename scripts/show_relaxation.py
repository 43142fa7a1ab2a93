"""Draws a picture of the Concrete (Gumbel-Softmax) distribution over three classes at several temperatures.

uv run python -m scripts.show_relaxation --probabilities 0.2,0.3,0.5 --temperatures 0.1,1,5 --output relaxation.pdf
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import ConfigError
from configs.wording import shown
from scripts.command import positive, refusing_bad_input

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help is quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

COLDEST, HOTTEST, MOST = 0.01, 100.0, 8  # temperatures: beyond, all is in the corners or in the centre
MOST_DRAWS, DOTS = 1_000_000, 2000  # dots of a panel: more would hide each other
CELLS = 120  # along a side, where the density is computed
BANDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # of density, each in its own colour
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(0.75)))  # where y1, y2, y3 = 1 lie in the plane
COLOURS, MARKERS = ("#0072B2", "#E69F00", "#009E73"), "os^"  # Okabe and Ito's: told apart by the colour-blind too
STYLE: dict[Any, Any] = {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 10}
STYLE |= {"axes.titlesize": "medium", "figure.titlesize": "medium", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}

DRAWS = (
    r"(a) Draws  $y_k=\mathrm{softmax}_k((\log\pi_k+g_k)\,/\,\tau)$,  $g_k\sim\mathrm{Gumbel}(0,1)$,"
    r"  in the colour of $k=\mathrm{argmax}\,y$"
)
DENSITY = (
    r"(b) Density  $p(y)=2\,\tau^2\,\prod_k\pi_k\,y_k^{-\tau-1}\;/\;(\sum_k\pi_k\,y_k^{-\tau})^3$"
    r"  with respect to $dy_1\,dy_2$ (uniform: 2)"
)
ROUNDED = r"(c) Rounded draws: $P(\mathrm{argmax}\,y=k)=\pi_k$ at every $\tau$"
MEAN = r"(d) Draws: $E[y_k]$ goes from $\pi_k$ to $1/3$ as $\tau$ grows"


def draws(logits: Tensor, temperatures: list[float], number: int, seed: int) -> list[Tensor]:
    """y ~ Concrete(pi, tau) [number, 3] for each tau, from noise of its own; logits [3] = log pi."""
    from data.randomness import keyed_generator
    from estimators.relaxations import gumbel, gumbel_softmax

    generators = [keyed_generator(logits.device, seed, "show_relaxation", index) for index in range(len(temperatures))]
    noise = [gumbel((number, 3), generator=generator) for generator in generators]
    return [gumbel_softmax(logits, g, temperature) for g, temperature in zip(noise, temperatures, strict=True)]


def rounded(y: Tensor) -> Tensor:
    """one_hot(argmax y) [N, 3] of draws y [N, 3]: its expectation is pi at every temperature."""
    from estimators.relaxations import one_hot

    return one_hot(y.argmax(dim=-1), 3)


def mean_and_error(values: Tensor) -> tuple[list[float], list[float]]:
    """The mean over draws of values [N, 3], and its standard error, 3 numbers each."""
    return values.mean(dim=0).tolist(), (values.var(dim=0, correction=0) / len(values)).sqrt().tolist()


def cell_centres(along: int) -> Tensor:
    """The centres y [along^2, 3] of the along^2 equal triangles that cut up the simplex."""
    import torch

    ij = torch.cartesian_prod(torch.arange(along), torch.arange(along)).double()
    upright, inverted = ij[ij.sum(dim=-1) < along] + 1 / 3, ij[ij.sum(dim=-1) < along - 1] + 2 / 3
    y12 = torch.cat([upright, inverted]) / along
    return torch.cat([y12, 1 - y12.sum(dim=-1, keepdim=True)], dim=-1)


def density(y: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """p(y) [...] at y [..., 3], with respect to dy1 dy2, in which the area of the simplex is 1/2."""
    from estimators.relaxations import concrete_log_density

    return concrete_log_density(y.log(), logits, temperature).exp()


def in_plane(y: Tensor) -> Tensor:
    """Points y [..., 3] of the simplex as points [..., 2] of an equilateral triangle with side 1."""
    return y @ y.new_tensor(CORNERS)


def draw_simplex(axes: Axes, temperature: float) -> None:
    """A triangle with named corners, and its temperature."""
    axes.fill(*zip(*CORNERS, strict=True), fill=False, edgecolor="0.3", linewidth=0.8, zorder=1.5)
    for k, (corner, offset, side) in enumerate(zip(CORNERS, (-4, -4, 3), ("top", "top", "bottom"), strict=True)):
        axes.annotate(f"$y_{k + 1}$", corner, (0, offset), textcoords="offset points", ha="center", va=side)
    axes.set_title(rf"$\tau={temperature:g}$", y=0.88)
    axes.set(aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.02, 0.89))
    axes.set_axis_off()


def draw_dots(axes: Axes, y: Tensor) -> None:
    """A dot a draw [N, 3], in the colour of the class that it rounds to."""
    across, up = in_plane(y).T.tolist()
    colours = [COLOURS[k] for k in y.argmax(dim=-1).tolist()]
    axes.scatter(across, up, c=colours, s=6, alpha=0.5, linewidths=0, zorder=2, clip_on=False, rasterized=True)


def draw_density(axes: Axes, logits: Tensor, temperature: float) -> Any:
    """Bands of density, the same for every panel; returns what a colour bar needs."""
    from matplotlib.colors import BoundaryNorm

    centres = cell_centres(CELLS)
    across, up = in_plane(centres).T.tolist()
    heights = density(centres, logits, temperature).tolist()
    norm = BoundaryNorm(BANDS, 256, extend="both")
    bands = axes.tricontourf(across, up, heights, levels=BANDS, norm=norm, cmap="viridis", extend="both")
    bands.set(edgecolor="face", linewidth=0.2)  # without it PDF and SVG show white hairlines between bands
    return bands


def draw_means(axes: Axes, temperatures: list[float], values: list[Tensor], probabilities: list[float]) -> None:
    """The mean of values [N, 3] with its standard error at each temperature; pi_k as a dashed line."""
    means, errors = zip(*map(mean_and_error, values), strict=True)
    for k, (colour, pi) in enumerate(zip(COLOURS, probabilities, strict=True)):
        places = [index + 0.12 * (k - 1) for index in range(len(temperatures))]
        heights, bars = [mean[k] for mean in means], [error[k] for error in errors]
        label = rf"$k={k + 1}$,  $\pi_{k + 1}={pi:.3g}$"
        axes.errorbar(places, heights, bars, fmt=MARKERS[k], color=colour, markersize=3, capsize=3, label=label)
        axes.axhline(pi, color=colour, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(range(len(temperatures)), [rf"$\tau={temperature:g}$" for temperature in temperatures])
    axes.set_xlim(-0.5, len(temperatures) - 0.5)


def picture(probabilities: list[float], temperatures: list[float], number: int, seed: int) -> Figure:
    """The whole figure: a column a temperature, and below them what happens to two means."""
    import torch
    from matplotlib.figure import Figure

    logits = torch.tensor(probabilities).log()
    y = draws(logits, temperatures, number, seed)
    width = max(8.0, 1.8 * len(y))  # inches
    triangle = 0.87 * min(2.2, width / len(y))
    heights = [triangle + 0.55, triangle + 1.1, 2.4]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    top.suptitle(DRAWS, x=0.01, ha="left")
    for axes, temperature, drawn in zip(top.subplots(1, len(y), squeeze=False)[0], temperatures, y, strict=True):
        draw_simplex(axes, temperature)
        draw_dots(axes, drawn[:DOTS])
    middle.suptitle(DENSITY, x=0.01, ha="left")
    panels = middle.subplots(1, len(y), squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        draw_simplex(axes, temperature)
        bands = draw_density(axes, logits, temperature)
    middle.colorbar(bands, ax=panels, location="bottom", ticks=BANDS, format="%g", aspect=60, shrink=0.7)
    left, right = bottom.subplots(1, 2, sharey=True)
    draw_means(left, temperatures, [rounded(drawn) for drawn in y], probabilities)
    left.set(title=ROUNDED, ylabel=rf"mean $\pm$ s.e. ($N={number}$)")
    draw_means(right, temperatures, y, probabilities)
    right.axhline(1 / 3, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    right.set(title=MEAN)
    bottom.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def numbers(text: str) -> list[float]:
    """An argument that must be numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text}") from None


def check(given: argparse.Namespace) -> None:
    """Raises ConfigError for arguments of which no picture can be made."""
    pi, tau = given.probabilities, given.temperatures
    if len(pi) != 3 or not all(value > 0 for value in pi) or abs(sum(pi) - 1) > 1e-6:
        raise ConfigError(f"--probabilities must be three numbers > 0 that sum to 1, got {shown(pi)}")
    if len(tau) > MOST or not all(COLDEST <= value <= HOTTEST for value in tau):
        wanted = f"at most {MOST} numbers from {COLDEST:g} to {HOTTEST:g}"
        raise ConfigError(f"--temperatures must be {wanted}, got {shown(tau)}")
    if given.draws > MOST_DRAWS:
        raise ConfigError(f"--draws must be at most {MOST_DRAWS}, got {given.draws}")
    if given.output.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--output must end in .png, .pdf or .svg, got {given.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probabilities", type=numbers, default="0.2,0.3,0.5", help="pi, of the three classes")
    parser.add_argument("--temperatures", type=numbers, default="0.1,0.5,1,2,5", help="tau, a column each")
    parser.add_argument("--draws", type=positive, default=2000, help=f"at each temperature; {DOTS} are shown")
    parser.add_argument("--seed", type=int, default=0, help="makes the draws")
    parser.add_argument(
        "--output", type=Path, default=Path("relaxation.png"), help="a .png, .pdf or .svg file to write"
    )
    given = parser.parse_args()
    with refusing_bad_input():
        check(given)
        import matplotlib

        with matplotlib.rc_context(STYLE):
            picture(given.probabilities, given.temperatures, given.draws, given.seed).savefig(given.output, dpi=200)
        print(given.output)


if __name__ == "__main__":
    main()
