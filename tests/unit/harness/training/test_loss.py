"""The old name of the training loss."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from harness.step import loss
from house import ROOT

OLD = "harness.training.loss"


def test_the_old_name_still_serves_and_says_the_new_one() -> None:
    sys.modules.pop(OLD, None)
    with pytest.warns(DeprecationWarning, match=r"is harness\.step\.loss now"):
        old = importlib.import_module(OLD)
    assert set(old.__all__) == {"chunked_token_loss", "label_tokens", "token_loss"}
    assert all(getattr(old, name) is getattr(loss, name) for name in old.__all__)


def test_nothing_of_ours_uses_the_old_name() -> None:
    files = [f for folder in ("grass", "baselines", "workflow", "docs/figures") for f in (ROOT / folder).rglob("*.py")]
    users = [f for f in files if re.search(r"harness\.training(\.| import )loss", f.read_text(encoding="utf-8"))]
    assert [str(f.relative_to(ROOT)) for f in users] == ["workflow/harness/training/loss.py"]
