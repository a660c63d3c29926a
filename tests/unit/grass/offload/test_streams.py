"""What of the streams can be looked at without a device."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grass.host import Host
from grass.offload.streams import CudaStreams, NoStreams


class _Copies(TorchDispatchMode):
    """Records the tensors of every copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.seen.append((args[0], args[1], args[2]))
        return function(*args, **(kwargs or {}))


def test_a_strided_chunk_is_copied_in_dense_rows_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strided copy between host and device would go through a temporary, and wait."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    streams = CudaStreams(torch.device("cuda"))
    block, buffer = torch.arange(20.0).view(2, 10), torch.zeros(2, 6)
    with _Copies() as copies:
        streams.copy("fetch", buffer[:, :4], block[:, 3:7])
    assert buffer.tolist() == [[3.0, 4.0, 5.0, 6.0, 0.0, 0.0], [13.0, 14.0, 15.0, 16.0, 0.0, 0.0]]
    assert len(copies.seen) == 2
    for target, source, non_blocking in copies.seen:
        assert target.is_contiguous()
        assert source.is_contiguous()
        assert non_blocking


def test_a_cpu_is_one_memory_and_anything_else_two() -> None:
    assert not Host().streams(torch.device("cpu")).apart
    assert NoStreams(torch.device("meta")).apart
    assert CudaStreams.apart


def test_without_streams_all_copying_time_is_exposed() -> None:
    streams = NoStreams(torch.device("cpu"))
    source = torch.ones(2, 1 << 20)
    streams.copy("return", torch.empty_like(source), source)
    seconds = streams.exposed()()
    assert seconds is not None
    assert seconds > 0
    assert streams.exposed()() == 0
