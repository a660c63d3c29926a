from __future__ import annotations

from pathlib import Path

import pytest
from harness.checking.tiny import tiny_inputs
from harness.training.loading import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A random Llama of 4 layers and 64 rows, on disk."""
    return tiny_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
