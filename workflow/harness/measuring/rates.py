"""How fast this machine copies between pinned host memory and the GPU, each way and both ways at once."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from harness.measuring.device import ON_THE_CPU
from harness.records.measured import TransferRates
from harness.records.run import TrainRecord

COPY_BYTES = 256 * 2**20
REPEATS = 5


def with_rates(record: TrainRecord, *, torch: Any = None) -> TrainRecord:
    """The record of a finished run with its machine's copy rates, or the reason why there are none.

    Args:
        record: of a run that ended in this process and whose memory is freed.
        torch: a stand-in for the package, for tests.
    """
    why = None
    if record.recipe["device"] != "cuda":
        why = ON_THE_CPU
    elif record.memory is not None and record.memory.foreign_why is not None:
        why = f"void: {record.memory.foreign_why}"
    rates = {"transfer_why": why} if why is not None else {"transfer": transfer_rates(torch=torch)}
    return record.model_copy(update=rates)


def transfer_rates(*, copy_bytes: int = COPY_BYTES, repeats: int = REPEATS, torch: Any = None) -> TransferRates:
    """Median rate of `repeats` copies after one warm-up copy, timed by CUDA events.

    Allocates twice `copy_bytes` of pinned host memory and as much on the current device; takes some tenths of a second.
    Do not call it within a measurement.

    Args:
        copy_bytes: size of one copy in one direction.
        repeats: number of timed copies.
        torch: a stand-in for the package, for tests.

    Returns:
        The rates; all None with the reason where the memory cannot be allocated.
    """
    if torch is None:
        import torch as real

        torch = real
    cuda = torch.cuda
    try:
        hosts = [torch.empty(copy_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        devices = [torch.empty(copy_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
        streams = [cuda.Stream() for _ in range(2)]

        def up() -> None:
            devices[0].copy_(hosts[0], non_blocking=True)

        def down() -> None:
            hosts[1].copy_(devices[1], non_blocking=True)

        seconds = [_median_seconds(cuda, streams, ways, repeats) for ways in ((up,), (down,), (up, down))]
    except RuntimeError as error:
        return TransferRates(
            copy_bytes=copy_bytes, host_to_device_bytes_per_s=None, device_to_host_bytes_per_s=None,
            both_ways_bytes_per_s=None, rates_why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        )  # fmt: skip
    return TransferRates(
        copy_bytes=copy_bytes,
        host_to_device_bytes_per_s=copy_bytes / seconds[0],
        device_to_host_bytes_per_s=copy_bytes / seconds[1],
        both_ways_bytes_per_s=2 * copy_bytes / seconds[2],
    )


def _median_seconds(cuda: Any, streams: list[Any], ways: tuple[Callable[[], None], ...], repeats: int) -> float:
    """Median time from the common start of all `ways`, each on its own stream, to the end of the last one."""
    found: list[float] = []
    for _ in range(repeats + 1):
        cuda.synchronize()
        begin = cuda.Event(enable_timing=True)
        begin.record()
        ends = []
        for way, stream in zip(ways, streams, strict=False):
            stream.wait_event(begin)
            with cuda.stream(stream):
                way()
                end = cuda.Event(enable_timing=True)
                end.record()
            ends.append(end)
        cuda.synchronize()
        found.append(max(begin.elapsed_time(end) for end in ends) / 1000)
    return median(found[1:])
