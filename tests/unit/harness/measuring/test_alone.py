"""Work in a fork: its result, its growth whoever allocates, and its failures."""

from __future__ import annotations

import mmap
import os
import signal

import pytest
import torch
from harness.measuring.alone import in_a_fork

MIB = 2**20


def libraries() -> None:
    """What the work runs, in small: a fork maps the pages of libraries anew, many at once on some systems."""
    torch.ones(MIB).fill_(1)
    torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.uint8).fill_(1)


def with_tensors() -> str:
    kept = torch.ones(64 * MIB // 4)
    passing = [torch.ones(32 * MIB // 4) for _ in range(2)]
    del passing
    again = [torch.ones(32 * MIB // 4) for _ in range(2)]
    return f"{kept.numel()} {len(again)}"


def beside_the_allocator() -> int:
    block = mmap.mmap(-1, 100 * MIB)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    return len(block)


def test_growth_is_what_was_alive_together() -> None:
    """Freed tensors go back: 64 + 2 x 32 MiB twice are 128 MiB, not 192."""
    result, grown = in_a_fork(with_tensors, first=libraries)
    assert result == f"{16 * MIB} 2"
    assert grown is not None
    assert 127 * MIB < grown < 132 * MIB


def test_memory_that_torch_never_sees_counts() -> None:
    """As GRASS keeps sleeping layers' moments."""
    result, grown = in_a_fork(beside_the_allocator, first=libraries)
    assert result == 100 * MIB
    assert grown is not None
    assert 99 * MIB < grown < 104 * MIB


def test_what_is_done_first_does_not_count() -> None:
    kept: list[torch.Tensor] = []
    _, grown = in_a_fork(with_tensors, first=lambda: kept.append(torch.ones(64 * MIB // 4)))
    assert grown is not None
    assert 127 * MIB < grown < 132 * MIB


def test_an_error_in_what_is_done_first_is_raised_here() -> None:
    def fails() -> None:
        raise ImportError("No module named 'badam'")

    with pytest.raises(ImportError, match="badam"):
        in_a_fork(with_tensors, first=fails)


def test_what_it_raises_is_raised_here() -> None:
    def fails() -> None:
        raise ImportError("No module named 'badam'")

    with pytest.raises(ImportError, match="badam"):
        in_a_fork(fails)


def test_an_error_that_cannot_travel_keeps_its_words() -> None:
    class OddError(Exception):
        pass

    def fails() -> None:
        raise OddError("odd")

    with pytest.raises(RuntimeError, match="OddError: odd"):
        in_a_fork(fails)


def test_a_killed_fork_is_an_error_and_no_wait() -> None:
    with pytest.raises(RuntimeError, match="ended with -9"):
        in_a_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))
