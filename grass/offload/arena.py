"""Host memory for moments, page-locked where the device can copy from it without staging."""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class HostArena:
    """All host memory for moments: page-aligned blocks, registered with CUDA so that copies need no staging buffer.

    A block is allocated when its group first trains, so host memory grows with the groups visited. `cudaHostRegister`
    pins exactly the bytes requested; `pin_memory()` would round each block up to a power of two.

    Args:
        pin: register blocks.
        settle: waits until no block is being copied; called before a block is released and before the arena is
            destroyed.
    """

    def __init__(self, *, pin: bool, settle: Callable[[], None]) -> None:
        self.pinned = pin
        """Whether blocks are pinned; False on devices without CUDA, and after CUDA first refuses to pin one."""
        self.nbytes = 0
        self._settle = settle
        self._registered: dict[int, Tensor] = {}
        # copies must be over and memory unregistered before it is unmapped
        weakref.finalize(self, _settle_and_unregister, settle, self._registered)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the blocks that are pinned."""
        return sum(block.nbytes for block in self._registered.values())

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Zeros of shape (2, elements) in host memory."""
        nbytes = 2 * elements * dtype.itemsize
        # an anonymous map is page-aligned and zero; the tensor keeps it alive
        block = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(2, elements)
        self.nbytes += nbytes
        if self.pinned:
            self._register(block)
        return block

    def release(self, block: Tensor) -> None:
        """Unpin and forget a block; its memory is freed with its last view."""
        self._settle()
        self.nbytes -= block.nbytes
        if self._registered.pop(block.data_ptr(), None) is not None:
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())

    def _register(self, block: Tensor) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
        if code == 0:
            self._registered[block.data_ptr()] = block
            return
        self.pinned = False
        _forget_last_error()
        warnings.warn(
            f"GRASS could not pin {block.nbytes:,} bytes of host memory for optimizer states (CUDA error {code}): "
            "copies from here on use pageable memory and wait for the host; raise the limit of locked memory "
            "(ulimit -l), or choose offload='resident'",
            stacklevel=2,
        )


def _forget_last_error() -> None:
    """Keep a failed registration from being raised at the next, unrelated kernel launch.

    The CUDA runtime keeps its last error until it is queried. Torch queries it after every launch, and its bindings
    offer no other way to query it (https://github.com/vllm-project/vllm/pull/50070), so a dummy launch raises it here.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _settle_and_unregister(settle: Callable[[], None], registered: dict[int, Tensor]) -> None:
    settle()
    for address in list(registered):
        torch.cuda.cudart().cudaHostUnregister(address)
    registered.clear()
