from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # a random model's layers matter alike, and GRASS says so; the warnings have tests of their own
        warnings.filterwarnings("ignore", message="GRASS ")
        yield
    torch.set_num_threads(threads)
