"""Pages in a real browser: the comparison, and TensorBoard's tabs. Run with `uv run pytest -m browser -n 0`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import train
from scripts import compare
from tests.browser import PATIENCE, Browser, browser, free_port, is_installed, wait_until_served
from tests.runs import MLP, command

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not is_installed(), reason="needs Debian's packages chromium and chromium-driver"),
]
LINE = f"-m {MLP.replace('latent_size=2', 'latent_size=4')} train.steps=12"
ESTIMATORS = ("marginalization", "gumbel_softmax")
PHONE, DESKTOP = 390, 1400  # pixels
LEAST_TEXT = 11.9  # pixels; 12 less what zooming a figure rounds off
# the smallest text, after the scale of the figure that it is in
SMALLEST = """
const sizes = all("body *").filter(shown).filter(
  element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
).map(element => {
  const scale = element.ownerSVGElement ? element.getScreenCTM() : {a: 1, b: 0};
  return [parseFloat(getComputedStyle(element).fontSize) * Math.hypot(scale.a, scale.b), element.outerHTML];
});
return sizes.sort((a, b) => a[0] - b[0])[0];
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
CURVES = """
const curves = all("path, polyline").filter(shown).filter(path => {
  const style = getComputedStyle(path);
  return style.fill === "none" && style.stroke !== "none" && path.getTotalLength() > 30;
}).length;
return curves >= arguments[0] && curves;
"""
PICTURES = """
const pictures = all("img").filter(shown).filter(img => img.complete && img.naturalWidth > 30).length;
return pictures >= arguments[0] && pictures;
"""
SAYS = "const said = words(); return arguments[0].every(word => said.includes(word))"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: two estimators, two seeds."""
    folder = tmp_path_factory.mktemp("pages") / "sweep"
    ended = command(train.main, f"{LINE} estimator={','.join(ESTIMATORS)} seed=0,1 hydra.sweep.dir={folder}")
    assert ended.code == 0, ended.said
    return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tensorboard(sweep: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read the sweep."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(sweep), "--port", str(port)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_served(f"{url}/data/runs", server)
            for run in runs(sweep):
                wait_until_served(f"{url}/data/plugin/custom_scalars/layout?run={quote(run)}", server)
            yield url
        finally:
            server.terminate()


def runs(sweep: Path) -> list[str]:
    """The names that TensorBoard gives to the runs of a sweep."""
    return sorted(str(path.parent.relative_to(sweep)) for path in sweep.rglob("events.out.tfevents.*"))


def tab(window: Browser, url: str, name: str) -> None:
    window.resize(DESKTOP, 1000)
    window.open("about:blank")  # or the same page would only be told another name
    window.complaints()
    window.open(f"{url}/#{name}")


# ---- the comparison ----


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_comparison(width: int, sweep: Path, window: Browser, tmp_path: Path) -> None:
    ended = command(compare.main, f"{sweep} --output {tmp_path}/page")
    assert ended.code == 0, ended.said
    window.complaints()
    window.resize(width, 900)
    window.open((tmp_path / "page" / "compare.html").as_uri())
    assert window.run(CURVES, 2 * 2), "two means in each of two figures of curves"
    assert window.wait_for(PICTURES, 2) >= 2
    assert window.run(SAYS, list(ESTIMATORS))
    assert window.run(OVERFLOW) <= 0
    size, element = window.run(SMALLEST)
    assert size >= LEAST_TEXT, element
    assert window.complaints() == []


def test_a_bad_page_is_found_out(window: Browser, tmp_path: Path) -> None:
    """What the test of the comparison looks at is seen where it is wrong."""
    bad = "<p style='width: 900px'>wide</p><svg viewBox='0 0 700 9' width='350'><text font-size='12'>x</text></svg>"
    (tmp_path / "bad.html").write_text(f"{bad}<img src='none.png' width='99'/><script>none()</script>")
    window.resize(PHONE, 900)
    window.open((tmp_path / "bad.html").as_uri())
    assert window.run(OVERFLOW) > 0 or window.run("return document.documentElement.clientWidth") > PHONE
    assert window.run(SMALLEST)[0] == pytest.approx(6, abs=0.1)
    assert not window.run(CURVES, 1)
    assert not window.run(PICTURES, 1)
    complaints = "\n".join(window.complaints())
    assert "none is not defined" in complaints
    assert "none.png" in complaints


# ---- TensorBoard ----


def test_time_series_opens_on_j_and_accuracy(tensorboard: str, sweep: Path, window: Browser, tmp_path: Path) -> None:
    tab(window, tensorboard, "timeseries")
    window.wait_for("return all('scalar-card line-chart canvas').filter(shown).length >= 2")
    titles = window.run("return all('scalar-card .tag').filter(shown).map(tag => tag.innerText.replace(/\\s/g, \"\"))")
    assert titles[:2] == ["Overview/J", "Overview/accuracy"]
    assert not [title for title in titles if title.startswith("warning")]
    names = window.run("return all('tb-data-table-content-row').map(row => row.innerText).join()")
    assert all(run in names for run in runs(sweep)), names
    assert all(f"{estimator}, seed=" in names for estimator in ESTIMATORS)
    boxes = window.run("return all('scalar-card line-chart').map(chart => chart.getBoundingClientRect().toJSON())")
    for box in boxes[:2]:
        rows = slice(int(box["top"]), int(box["bottom"]))
        columns = slice(int(box["left"]), int(box["right"]))
        until_coloured(window, tmp_path / "chart.png", rows, columns, hues=2, pixels=20)
    assert window.complaints() == []


def test_scalars(tensorboard: str, sweep: Path, window: Browser) -> None:
    tab(window, tensorboard, "scalars")
    assert window.wait_for(CURVES, 2 * len(runs(sweep)))
    categories = window.run("return all('.category-name').map(name => name.innerText)")
    assert (categories[0], categories[-1]) == ("Overview", "warning")
    assert window.complaints() == []


def test_custom_scalars(tensorboard: str, sweep: Path, window: Browser) -> None:
    tab(window, tensorboard, "custom_scalars")
    assert window.wait_for(CURVES, len(runs(sweep)))
    assert window.wait_for(SAYS, ["Objective (nats per image)", "Accuracy", "Speed"])
    assert window.complaints() == []


def test_images(tensorboard: str, sweep: Path, window: Browser) -> None:
    tab(window, tensorboard, "images")
    assert window.wait_for(PICTURES, len(runs(sweep)))
    assert window.wait_for(SAYS, ["analogies", *runs(sweep)])
    assert window.complaints() == []


def test_hparams_shows_what_varied(tensorboard: str, sweep: Path, window: Browser) -> None:
    tab(window, tensorboard, "hparams")
    cells = "vaadin-grid-cell-content"
    window.wait_for(SAYS, [*ESTIMATORS, "Overview/J", "Overview/accuracy"])
    header = window.run(f"return all('{cells}').filter(shown).map(cell => cell.innerText.trim())")
    first = header.index("Show\nMetrics" if "Show\nMetrics" in header else "Show Metrics")
    assert header[first + 1 : first + 3] == ["estimator", "seed"]
    assert window.complaints() == []


def test_the_projector_opens_in_colours(tensorboard: str, window: Browser, tmp_path: Path) -> None:
    tab(window, tensorboard, "projector")
    until_coloured(window, tmp_path / "projector.png", slice(150, 840), slice(340, 1080), hues=6, pixels=200)
    assert window.complaints() == []


def until_coloured(window: Browser, path: Path, rows: slice, columns: slice, *, hues: int, pixels: int) -> None:
    """Waits until a part of the window has so many hues, of twelve, in so many pixels each."""
    until = time.monotonic() + PATIENCE
    while True:
        window.picture(path)
        with Image.open(path) as picture:
            hue, saturation, value = np.asarray(picture.convert("HSV"), dtype=int)[rows, columns].reshape(-1, 3).T
        counts = np.bincount(hue[(saturation > 100) & (value > 100)] * 12 // 256, minlength=12)
        if (counts >= pixels).sum() >= hues:
            return
        assert time.monotonic() < until, f"pixels by hue: {counts.tolist()}"


def test_text(tensorboard: str, window: Browser) -> None:
    tab(window, tensorboard, "text")
    assert window.wait_for(SAYS, ["data:", "name: digits", "effective weight per image"])
    assert window.complaints() == []
