"""Stand-in for bitsandbytes, which two official packages import for 8-bit optimizers that no test uses."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


@pytest.fixture(autouse=True)
def _bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.import_utils import is_bnb_available

    # peft remembers the answer, and so never meets the stand-in
    if is_bnb_available():
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
