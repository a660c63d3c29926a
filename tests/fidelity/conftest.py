"""Stand-in for bitsandbytes, which two official packages import for 8-bit optimizers that no test uses."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture(autouse=True)
def _bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    for name in ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
        module = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["bitsandbytes.optim.optimizer"], "Optimizer2State", object, raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
