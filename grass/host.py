"""The host interface: every value the library reads from a device, every draw, and every device facility it uses.

Code that needs other answers (a forecast on tensors without values, a benchmark that trains the same layers in every
variant, a meter that resets the allocator's peak) installs another `Host` with one statement: `with using(host): ...`.
Methods outside this library draw and read through this interface as well.

Comparisons between ranks (`grass.distributed`) do not use it: they read the results of collectives, which a replacement
in one process cannot provide for several.
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
"""Entries updated at once. On a CPU, the piece and its temporaries fit in the cache (5 MiB in fp32), and the call
overhead of a piece, about 30 us, is small beside its arithmetic. Elsewhere, the piece is as large as three fp32
temporaries within 48 MiB allow, so that few kernels are launched."""


class Host:
    """The default: values are read from tensors, layers are drawn at random, and devices are the real ones."""

    # ------------------------------------------------------------ numbers

    def number(self, value: Tensor) -> float:
        """Value of a one-entry tensor; waits for the device."""
        return float(value)

    def numbers(self, values: Tensor) -> list[float]:
        """Values of a one-dimensional tensor, in one transfer; waits for the device."""
        return [float(value) for value in values.tolist()]

    def has_values(self, values: Tensor) -> bool:
        """Whether the values of a tensor can be read, now or later; this reads nothing."""
        return not (isinstance(values, FakeTensor) or values.is_meta)

    def with_values(self) -> AbstractContextManager[None]:
        """Context in which new tensors have values: for arithmetic on numbers that the host already has."""
        return nullcontext()

    # ------------------------------------------------------------ draws

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Draw the layers (or other units) that train next.

        Args:
            layers: number of layers to draw from.
            count: number of layers drawn, from 1 to `layers`.
            by_chance: draws from the caller's distribution with its generator; called once at most.

        Returns:
            `count` distinct numbers below `layers`, ascending.
        """
        return by_chance()

    # ------------------------------------------------------------ facilities of a device

    def streams(self, device: torch.device) -> Streams:
        """Queues for copies between `device` and the host: CUDA streams on CUDA, synchronous copies elsewhere."""
        return CudaStreams(device) if device.type == "cuda" else NoStreams(device)

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> HostArena:
        """Host memory for moments; for the arguments see `HostArena`."""
        return HostArena(pin=pin, settle=settle)

    def piece_elements(self, device: torch.device) -> int:
        """Entries of a parameter on `device` that are updated at once."""
        return PIECE_ELEMENTS["cpu" if device.type == "cpu" else "other"]

    def allocated_bytes(self, device: torch.device) -> int | None:
        """Bytes of live tensors on `device`, as the caching allocator counts them; None on devices without a count."""
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def peak_bytes(self, device: torch.device) -> int | None:
        """Largest `allocated_bytes` since any code last reset the peak; None on devices without a count."""
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def obtainable_bytes(self, device: torch.device) -> int | None:
        """Bytes that this process could hold on `device`; None where device memory is host memory.

        They are those that its allocator has reserved, and those that the driver has free.
        """
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)


class HostAround(Host):
    """Delegates to another host; a subclass overrides only what differs."""

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


# not a context variable: autograd runs hooks of a CUDA backward in its own threads, which must see the same host
_in_force: list[Host] = [Host()]


def current() -> Host:
    """The current host. Call this for every use and do not store the result: the host may change between calls."""
    return _in_force[-1]


@contextmanager
def using(host: Host) -> Iterator[None]:
    """Make `host` the current one in all threads of this process until the block ends; blocks may be nested."""
    _in_force.append(host)
    try:
        yield
    finally:
        _in_force.pop()
