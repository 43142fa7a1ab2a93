"""The figures of the page as .svg files of their own, for a paper: in its light colours, with a title and a key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from scripts.comparison.figures import COLOURS, cut

TITLE, ROW = 28.0, 18.0  # pixels above a figure, and of a row of the key below it
LONGEST = 100  # letters of a title in the name of a file: systems take 255, and a group's name may be longer


def figure_files(page: str) -> dict[str, str]:
    """SVG by the name of its file, of every figure of a page, which is well-formed XML; once where it has two sizes."""
    root, files = ElementTree.fromstring(page), dict[str, str]()
    for section in root.iter("section"):
        key = [item for part in section.iter("ul") if part.get("class") == "key" for item in part.iter("li")]
        for drawing in section.iter("svg"):
            label = drawing.get("aria-label")
            if label is None or drawing.get("class") == "narrow":
                continue
            is_numbered = any("rank" in (text.get("class") or "") for text in drawing.iter("text"))
            stem = re.sub(r"[^a-z0-9]+", "_", label.partition(",")[0].lower())[:LONGEST].strip("_")
            name = next(name for name in _numbered(stem) if name not in files)
            files[name] = alone(drawing, label, key if is_numbered else [])
    return files


def _numbered(stem: str) -> Iterator[str]:
    """compare_STEM.svg, and for others of that name compare_STEM_2.svg and so on."""
    yield f"compare_{stem}.svg"
    for number in itertools.count(2):
        yield f"compare_{stem}_{number}.svg"


def alone(drawing: Element, title: str, key: list[Element]) -> str:
    """A drawing of the page as a file that needs nothing else."""
    width, height = map(float, drawing.get("viewBox", "").split()[2:])
    total = TITLE + height + ROW * len(key) + (8 if key else 0)
    box = f"0 0 {width:g} {total:g}"
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "width": f"{width:g}"})
    svg.set("height", f"{total:g}")
    _add(svg, "style").text = style()
    _add(svg, "rect", width="100%", height="100%", fill="#ffffff")
    _add(svg, "text", x="4", y="17", class_="name").text = title
    _add(svg, "g", transform=f"translate(0 {TITLE:g})").extend(drawing)
    for row, item in enumerate(key):
        y = TITLE + height + ROW * (row + 0.5)
        chip = next(span for span in item.iter("span") if "chip" in (span.get("class") or ""))
        number = chip.text or ""
        colour = (chip.get("class") or "").split()[-1]
        _add(svg, "circle", cx="16", cy=f"{y:g}", r="8", class_=f"dot {colour}")
        _add(svg, "text", x="16", y=f"{y + 3.5:g}", text_anchor="middle", class_=f"rank {colour}").text = number
        name = "".join(item.itertext()).removeprefix(number)
        _add(svg, "text", x="32", y=f"{y + 4:g}", class_="name").text = cut(name, int((width - 36) / 6.5))
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(svg, encoding="unicode") + "\n"


def _add(parent: Element, name: str, **attributes: str) -> Element:
    element = Element(name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    parent.append(element)
    return element


def style() -> str:
    """The rules for figures in the page's style sheet, without its variables, which few programs for drawings know."""
    css = (Path(__file__).parent / "page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w+)", css[: css.index("@media")]))
    rules = css.partition("/* figures */")[2].partition("/* end of figures */")[0]
    written = ["text { font: 12px Helvetica, Arial, sans-serif; }"]
    for selector, content in re.findall(r"([^{}]+)\{([^{}]+)\}", rules):
        if "--c:" in content:
            continue
        of_groups = range(COLOURS) if "var(--c)" in content else [None]
        for group in of_groups:
            selectors = [part.strip() + ("" if group is None else f".c{group}") for part in selector.split(",")]
            named = content.replace("var(--c)", f"var(--c{group})")
            values = re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], named)
            written.append(f"{', '.join(selectors)} {{{values}}}")
    return "\n".join(written)
