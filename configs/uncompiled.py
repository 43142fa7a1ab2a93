"""PyTorch's compiler stays unimported until somebody compiles."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


class Uncompiled(ModuleType):
    """Stands for the compiler as long as it is asked for no more than a break in what it would compile.

    Every optimizer imports it for that, in each step, and it takes as long to import as the rest of PyTorch, and 150 MB
    (docs/performance.md). Whoever asks for more, as torch.compile does, has it imported, and it takes its place.
    """

    def graph_break(self, msg: str = "") -> None:
        """Nothing is compiled, so nothing is broken off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module by what looks at all of them
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def leave_compiler_out() -> None:
    """Optimizers made from here on do without the compiler, unless it is there already."""
    import torch

    if COMPILER in sys.modules:
        return
    sys.modules[COMPILER] = Uncompiled(COMPILER)
    for method in vars(torch.optim.Optimizer).values():
        if own := getattr(method, "__wrapped__", None):  # by torch._disable_dynamo, which looks for this first
            own.__dynamo_disable = own
