"""The direction of imports, those inside functions too: each package knows what is below it, and nothing above."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW: dict[str, set[str]] = {  # docs/architecture.md
    "data": set(),
    "estimators": set(),
    "models": {"data", "estimators"},
    "configs": {"data", "estimators", "models"},
    "training": {"data", "estimators", "models", "configs"},
    "scripts": {"data", "estimators", "models", "configs", "training"},
    "train": {"data", "estimators", "models", "configs", "training"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([ROOT / "train.py", *(path for name in BELOW for path in (ROOT / name).rglob("*.py"))])
}


def imported(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it; what is for the type checker alone is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & MODULES.keys()


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_what_is_below_it_alone(package: str) -> None:
    for name, path in MODULES.items():
        if name.partition(".")[0] == package:
            above = {other for other in imported(path) if other.partition(".")[0] not in {package, *BELOW[package]}}
            assert not above, f"{name} imports {', '.join(sorted(above))}"


def test_no_circle_of_imports() -> None:
    """Raises CycleError, which names one."""
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_a_circle_and_an_import_upwards_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def late():\n    from training.run import Run\n    import configs.check\n")
    assert imported(tmp_path / "wrong.py") == {"training.run", "configs.check"}
