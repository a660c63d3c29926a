"""Bytes of every live tensor storage, by phase and by kind: what a GPU's allocator would count.

A storage is counted from when an operator returns it, on real and on fake tensors alike, until Python's weak reference
to it dies. Sizes are rounded up to 512 bytes, as in CUDA's caching allocator. Memory that no operator returns is not
counted: buffers inside a kernel, fragmentation of the allocator, memory made from a Python buffer.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from harness.forecasting.memo import tensors

Kind = Literal["weights", "gradients", "optimizer states", "activations", "loss", "other"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer states", "activations", "loss", "other")
ROUNDING = 512


@dataclass(slots=True)
class _Storage:
    """One storage's lifetime, in event numbers (every allocation and every release is one event)."""

    nbytes: int
    kind: Kind
    born: int
    died: int | None = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """One phase, from its beginning to the beginning of the next."""

    phase: str
    label: str
    """The caller's label for the group of phases that this one belongs to."""
    peak_bytes: int
    at: int
    """Number of the event at which the peak was reached."""
    largest_elements: int
    """Entries of the largest storage allocated in this phase."""


class Tracker(TorchDispatchMode):
    """Counts device storages that are allocated inside the `with` block.

    A new storage gets the current default kind (`making`). `mark` corrects the kind once the purpose is known: a
    gradient counts as a temporary of backward until it is found in a parameter's `grad`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any] = _call
        """Calls an operator; for fake tensors, `harness.forecasting.memo.Memo` is faster."""
        self.now = 0
        """Bytes alive on the device."""
        self.peak = 0
        """Largest `now` since `restart`."""
        self.memory_was_read = False
        """Whether the tracked code asked how much memory is allocated."""
        self.making: Kind = "other"
        """Kind of the storages allocated from here on."""
        self.spans: list[Span] = []
        """Finished phases."""
        self._alive: dict[int, _Storage] = {}
        self._log: list[_Storage] = []
        self._events = 0
        self._on_host = False
        self._on_host_now: dict[int, int] = {}
        self._phase = self._label = ""
        self._span_peak = self._span_at = self._span_largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count new storages among its results."""
        if func is torch.ops.prim.device.default:
            # only fake tensors ask; autograd does so more often than it calls operators
            return args[0].fake_device
        result = self.call(func, args, kwargs or {})
        given = None
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive or key in self._on_host_now:
                continue
            if given is None:
                # a view of memory that is not counted (a mapped file, say) is not new memory either
                given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            if key not in given:
                self._see(storage, tensor.element_size())
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would wrap each call of an operator in one that keeps its compiler away, and none is here."""
        return False

    # ------------------------------------------------------------ phases

    def enter(self, phase: str, label: str = "") -> None:
        """End the current phase and begin another; collects garbage, so that reference cycles do not affect a peak."""
        gc.collect()
        self._close()
        self._phase, self._label = phase, label
        self._span_peak, self._span_at, self._span_largest = self.now, self._events, 0

    def restart(self) -> None:
        """Reset `peak` to the bytes alive now, as a meter does after a model is loaded."""
        self.peak = self.now

    def _close(self) -> None:
        if self._phase:
            self.spans.append(
                Span(
                    phase=self._phase,
                    label=self._label,
                    peak_bytes=self._span_peak,
                    at=self._span_at,
                    largest_elements=self._span_largest,
                )
            )

    @property
    def host(self) -> int:
        """Bytes alive on the host."""
        return sum(self._on_host_now.values())

    # ------------------------------------------------------------ kinds

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Set the kind of these tensors' storages, also for the past."""
        for tensor in tensors:
            storage = self._alive.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                storage.kind = kind

    def holds(self, tensor: Tensor) -> bool:
        """Whether this tensor's storage counts as device memory."""
        return tensor.untyped_storage()._cdata in self._alive

    def by_kind(self, at: int) -> dict[Kind, int]:
        """Bytes alive after event `at`, by kind."""
        found: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for storage in self._log:
            if storage.born <= at and (storage.died is None or storage.died > at):
                found[storage.kind] += storage.nbytes
        return found

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Storages allocated inside the block are host memory."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    # ------------------------------------------------------------ births and deaths

    def _see(self, storage: UntypedStorage, itemsize: int) -> None:
        key, exact = storage._cdata, storage.nbytes()
        if not exact:
            return
        if self._on_host:
            self._on_host_now[key] = exact
            weakref.finalize(storage, self._on_host_now.pop, key).atexit = False
            return
        nbytes = -(-exact // ROUNDING) * ROUNDING
        self._events += 1
        self._alive[key] = life = _Storage(nbytes, self.making, self._events)
        self._log.append(life)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        if self.now > self._span_peak:
            self._span_peak, self._span_at = self.now, self._events
        self._span_largest = max(self._span_largest, exact // itemsize)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self._events += 1
        life = self._alive.pop(key)
        life.died = self._events
        self.now -= life.nbytes


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator's result."""
    return func(*args, **kwargs)
