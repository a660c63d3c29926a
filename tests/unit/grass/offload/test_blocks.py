"""How a group's moments are cut, and the host memory that they are kept in."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_streams import RecordingStreams, Scripted, install
from grass_tiny import batch, grass_of, llama
from hypothesis import given
from hypothesis import strategies as st
from offload_runs import Setting, on_cpu, on_device, small_chunks, train
from torch import nn

from grass.offload.arena import HostArena
from grass.offload.blocks import CHUNK_BYTES, Block

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


def block_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Block:
    return Block(0, [nn.Parameter(torch.empty(shape)) for shape in shapes], dtype)


# -------------------------------------------------------------------------------- cuts


@given(
    shapes=shapes,
    piece=st.integers(1, 40),
    pieces=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_chunks_cover_every_entry_once_in_pieces_of_one_parameter_each(
    shapes: list[tuple[int, ...]], piece: int, pieces: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("grass.host.PIECE_ELEMENTS", {"cpu": piece, "other": piece})
        limit = 2 * dtype.itemsize * piece * pieces
        patched.setattr("grass.offload.blocks.CHUNK_BYTES", limit)
        block = block_of(shapes, dtype)
        chunks = block.chunks
    at = 0
    for chunk in chunks:
        assert chunk.start == at
        assert 0 < 2 * chunk.elements * dtype.itemsize <= limit
        for part in chunk.pieces:
            assert part.offset == at
            assert part.offset == block.offsets[part.parameter] + part.start
            assert part.start < part.end <= block.parameters[part.parameter].numel()
            at += part.end - part.start
        assert chunk.end == at
    assert at == block.elements == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_staging_buffer_holds_64_mib_at_most(device: str, dtype: torch.dtype) -> None:
    """A layer of Llama 2 7B, on a CPU and on anything else, where the pieces are larger."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3 + [(4096,)] * 2
    block = Block(0, [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes], dtype)
    with pytest.MonkeyPatch.context() as patched:
        entries = 1 << (18 if device == "cpu" else 22)
        patched.setattr("grass.host.PIECE_ELEMENTS", {"cpu": entries, "other": entries})
        sizes = [2 * chunk.elements * dtype.itemsize for chunk in block.chunks]
    piece = 2 * dtype.itemsize * entries
    assert max(sizes) <= max(CHUNK_BYTES, piece) <= 64 * 2**20
    # one piece more would not have fitted
    assert min(sizes[:-1]) > CHUNK_BYTES - piece
    assert sum(sizes) == block.nbytes


def test_every_mode_cuts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of stochastic rounding follow from the cuts."""
    cuts = []
    for mode in ("resident", "move", "auto"):
        model, opt = on_device(Setting(), monkeypatch, RecordingStreams(), offload=mode)
        train(Setting(), model, opt, last=4)
        cuts.append([block.chunks for block in opt.states.blocks])
    assert cuts[0] == cuts[1] == cuts[2]
    assert max(map(len, cuts[0])) > 3


# -------------------------------------------------------------------------------- host memory


class Cudart:
    """The CUDA runtime as far as the arena knows it."""

    def __init__(self, refuses: Callable[[], bool] = lambda: False) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[str] = []
        self._refuses = refuses

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802  the runtime's own name
        self.calls.append("register")
        if self._refuses():
            return 304
        assert address not in self.registered
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append("unregister")
        del self.registered[address]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def test_a_block_is_pinned_zero_and_counted_until_it_is_given_back(cudart: Cudart) -> None:
    arena = HostArena(pin=True, settle=lambda: cudart.calls.append("settle"))
    blocks = [arena.take(1000, torch.float32), arena.take(7, torch.bfloat16)]
    assert [(b.shape, b.dtype) for b in blocks] == [((2, 1000), torch.float32), ((2, 7), torch.bfloat16)]
    assert not any(b.any() for b in blocks)
    assert arena.nbytes == 8000 + 28
    assert cudart.registered == {b.data_ptr(): b.nbytes for b in blocks}
    assert all(b.data_ptr() % 4096 == 0 for b in blocks)
    arena.release(blocks[0])
    assert arena.nbytes == 28
    assert cudart.registered == {blocks[1].data_ptr(): 28}
    assert cudart.calls[-2:] == ["settle", "unregister"], "no copy may be under way"
    blocks[0].fill_(1)  # whoever still has a view keeps the memory


def test_nothing_stays_registered_after_the_arena_is_gone(cudart: Cudart) -> None:
    arena = HostArena(pin=True, settle=lambda: cudart.calls.append("settle"))
    kept = arena.take(10, torch.float32)
    arena.take(20, torch.float32)
    assert len(cudart.registered) == 2
    del arena
    gc.collect()
    assert cudart.registered == {}
    assert cudart.calls[-3:] == ["settle", "unregister", "unregister"]
    assert not kept.any()


def test_a_refusal_to_pin_falls_back_to_pageable_memory_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Cudart(refuses=lambda: len(fake.registered) == 1)
    forgotten = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr("grass.offload.arena._forget_last_error", lambda: forgotten.append(fake.calls[-1]))
    arena = HostArena(pin=True, settle=lambda: None)
    arena.take(10, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        blocks = [arena.take(1000, torch.float32), arena.take(10, torch.float32)]
    assert [str(w.message) for w in caught] == [
        "GRASS could not pin 8,000 bytes of host memory for optimizer states (CUDA error 304): copies from here on "
        "use pageable memory and wait for the host; raise the limit of locked memory (ulimit -l), or choose "
        "offload='resident'"
    ]
    assert forgotten == ["register"], "else the next kernel would raise the runtime's last error"
    assert not arena.pinned
    assert arena.nbytes == 80 + 8000 + 80
    assert fake.calls.count("register") == 2
    for block in blocks:
        assert not block.any()
        arena.release(block)
    assert fake.calls.count("unregister") == 0


def test_the_error_of_a_refusal_is_raised_where_nobody_minds(monkeypatch: pytest.MonkeyPatch) -> None:
    from grass.offload.arena import _forget_last_error

    launched = []

    def launch(*shape: int, device: str) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch, "ones", launch)
    _forget_last_error()
    assert launched == ["cuda"]


@pytest.mark.parametrize("mode", ["resident", "move"])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_what_is_registered_is_what_the_groups_hold(
    mode: str, state: Any, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through changes of layers, a load, and the end of the optimizer."""
    small_chunks(monkeypatch)
    install(monkeypatch, RecordingStreams(1), RecordingStreams(2), pins=True)
    model: Any = llama()
    opt = grass_of(model, sampler="uniform", offload=mode, state=state)

    def held() -> dict[int, int]:
        hosts = [block.host for block in opt.states.blocks if block.host is not None]
        assert opt.states.offload is not None
        assert opt.states.offload.arena.nbytes == sum(host.nbytes for host in hosts)
        return {host.data_ptr(): host.nbytes for host in hosts}

    for step in range(7):
        train(Setting(), model, opt, step, step + 1)
        assert cudart.registered == held()
    opt.load_state_dict(opt.state_dict())
    assert cudart.registered == held()
    train(Setting(), model, opt, 7, 10)
    assert cudart.registered == held()
    opt.states.release()
    assert cudart.registered == {}


def test_an_optimizer_that_is_dropped_takes_its_hooks_memory_and_copies_along(
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a backward pass whose step never came: chunks are on their way into memory that others may get."""
    streams = RecordingStreams(1, Scripted(now=0, most=1 << 20), eagerness=0.0)
    setting = Setting(sampler="importance")
    small_chunks(monkeypatch)
    install(monkeypatch, streams, pins=True)
    model: Any = llama()
    opt = setting.build(model, offload="move")
    train(setting, model, opt, last=5)
    copies = len(streams.copies)
    model(**batch(5)).loss.backward()
    assert len(streams.copies) > copies
    assert streams.pending
    assert cudart.registered
    layers = model.model.layers
    assert all(layer._forward_pre_hooks for layer in layers)
    assert opt.states.offload is not None
    arena = opt.states.offload.arena
    del opt
    gc.collect()
    assert not streams.pending, "the buffers are gone"
    del arena
    assert cudart.registered == {}
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(**batch(6)).loss.backward()


def test_on_a_cpu_moments_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = on_cpu(Setting(), monkeypatch)
    train(Setting(), model, opt, last=4)
    assert opt.states.offload is not None
    assert not opt.states.offload.arena.pinned
    assert [record.moved_bytes for record in opt.history] == [0] * 4
    assert opt.states.hooks is None
