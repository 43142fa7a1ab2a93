"""docs/guarantees.md names tests that exist; dependencies are locked; a run talks to nobody."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.runs import MLP, ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text()
OFFLINE = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)

sys.addaudithook(refuse)
"""


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


def test_every_promise_has_a_proof() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert len(rows) > 20
    assert all("::test_" in row.split(" | ")[1] for row in rows)


def test_every_locked_file_has_a_hash() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    others = [package for package in lock["package"] if "editable" not in package["source"]]
    assert len(others) > 30
    for package in others:
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        assert files, package["name"]
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]) for file in files), package["name"]


def test_a_run_opens_no_connection(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)

    def said(*command: str) -> str:
        ended = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
        )
        return ended.stderr

    caught = said("-c", "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 9))")
    assert "NETWORK socket.connect" in caught
    assert "NETWORK" not in said("train.py", *MLP.split(), "train.steps=2", f"hydra.run.dir={tmp_path / 'run'}")


def test_no_server_is_started() -> None:
    """Nothing outside the tests imports what serves."""
    serving = {"http", "socketserver", "tensorboard.program", "tensorboard.manager", "tensorboard.notebook"}
    for path in [
        ROOT / "train.py",
        *(
            p
            for d in ("configs", "data", "estimators", "models", "scripts", "training")
            for p in (ROOT / d).rglob("*.py")
        ),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                assert not serving & {".".join(parts[:n]) for n in (1, 2)}, (path, name)
