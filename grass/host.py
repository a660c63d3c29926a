"""The host side's one seam: all by which the library decides with numbers, and all that it wants of a device.

Whoever runs GRASS where these answers must be others (a forecast on tensors without values, a measurement that trains
the same layers in every variant, a meter that resets the allocator's peak) puts another `Host` in force, with one
statement: `with using(host): ...`. Methods that are no part of this library draw and read through it as well.

Ranks that compare themselves (`grass.distributed`) do not go through it: they read what collectives brought, and no
stand-in for one process can answer for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from grass.offload.arena import HostArena
from grass.offload.streams import CudaStreams, NoStreams, Streams

PIECE_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 22}
"""Entries updated at once. On a CPU the piece and its temporaries stay in the cache (5 MiB in fp32), and the calls for
a piece, some 30 us, stay small beside its arithmetic; elsewhere it is as large as keeps three fp32 temporaries below
48 MiB, so that few kernels are launched."""


class Host:
    """The usual answers: numbers are read, layers are drawn by chance, and devices are what they are."""

    # ------------------------------------------------------------ numbers

    def number(self, value: Tensor) -> float:
        """A number of a tensor with one entry; waits for the device."""
        return float(value)

    def numbers(self, values: Tensor) -> list[float]:
        """Numbers of a one-dimensional tensor, in one transfer; waits for the device."""
        return [float(value) for value in values.tolist()]

    def has_values(self, values: Tensor) -> bool:
        """Whether the numbers of a tensor can be read, at any time; nothing is read."""
        return not (isinstance(values, FakeTensor) or values.is_meta)

    def with_values(self) -> AbstractContextManager[None]:
        """Inside, tensors that are made have values: for arithmetic on numbers that the host knows already."""
        return nullcontext()

    # ------------------------------------------------------------ draws

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Which layers (or other units that are drawn among) train next.

        Args:
            layers: how many there are to draw among.
            count: how many are drawn, from 1 to `layers`.
            by_chance: draws by the caller's own law and generator; to be called once at most.

        Returns:
            `count` distinct numbers below `layers`, ascending.
        """
        return by_chance()

    # ------------------------------------------------------------ facilities of a device

    def streams(self, device: torch.device) -> Streams:
        """Queues for copies between `device` and the host: CUDA streams on CUDA, else none."""
        return CudaStreams(device) if device.type == "cuda" else NoStreams(device)

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> HostArena:
        """Host memory for moments; for the arguments see `HostArena`."""
        return HostArena(pin=pin, settle=settle)

    def piece_elements(self, device: torch.device) -> int:
        """Entries of a parameter on `device` that are updated at once."""
        return PIECE_ELEMENTS["cpu" if device.type == "cpu" else "other"]

    def allocated_bytes(self, device: torch.device) -> int | None:
        """Bytes that live tensors hold on `device`, by the caching allocator's count; None where nobody counts."""
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def peak_bytes(self, device: torch.device) -> int | None:
        """Largest `allocated_bytes` since the count was last reset (by anybody); None where nobody counts."""
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def obtainable_bytes(self, device: torch.device) -> int | None:
        """Bytes that this process could hold on `device` in all: what its allocator has, and what the driver would
        still give; None where device memory is host memory.
        """
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)


class HostAround(Host):
    """Answers as another host does; a subclass changes what it must and leaves the rest to that one."""

    def __init__(self, inner: Host) -> None:
        self.inner = inner

    def number(self, value: Tensor) -> float:
        """As `inner`."""
        return self.inner.number(value)

    def numbers(self, values: Tensor) -> list[float]:
        """As `inner`."""
        return self.inner.numbers(values)

    def has_values(self, values: Tensor) -> bool:
        """As `inner`."""
        return self.inner.has_values(values)

    def with_values(self) -> AbstractContextManager[None]:
        """As `inner`."""
        return self.inner.with_values()

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """As `inner`."""
        return self.inner.draw(layers, count, by_chance)

    def streams(self, device: torch.device) -> Streams:
        """As `inner`."""
        return self.inner.streams(device)

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> HostArena:
        """As `inner`."""
        return self.inner.arena(pin=pin, settle=settle)

    def piece_elements(self, device: torch.device) -> int:
        """As `inner`."""
        return self.inner.piece_elements(device)

    def allocated_bytes(self, device: torch.device) -> int | None:
        """As `inner`."""
        return self.inner.allocated_bytes(device)

    def peak_bytes(self, device: torch.device) -> int | None:
        """As `inner`."""
        return self.inner.peak_bytes(device)

    def obtainable_bytes(self, device: torch.device) -> int | None:
        """As `inner`."""
        return self.inner.obtainable_bytes(device)


# not a context variable: autograd runs hooks of a CUDA backward in threads of its own, which must get the same answers
_in_force: list[Host] = [Host()]


def current() -> Host:
    """The host in force. Ask for it at every question, and keep it nowhere: another one may be in force next time."""
    return _in_force[-1]


@contextmanager
def using(host: Host) -> Iterator[None]:
    """Put `host` in force in all threads of this process, until the block ends; blocks may be nested."""
    _in_force.append(host)
    try:
        yield
    finally:
        _in_force.pop()
