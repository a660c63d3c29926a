"""The device that a measurement ran on, as the device described itself."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from harness.records.measured import GpuRecord, TransferRates
from harness.records.record import Record

DeviceKind = Literal["cuda", "cpu"]


class StrictRecord(Record):
    """A record without conversions."""

    model_config = ConfigDict(strict=True)


class DeviceRecord(StrictRecord):
    """What a cell ran on."""

    kind: DeviceKind
    name: str
    total_bytes: int | None
    total_bytes_why: str | None = None
    compute_capability: str | None = Field(default=None, description="of CUDA; null on a CPU")
    torch_cuda: str | None = Field(default=None, description="CUDA that torch was built with; null on a CPU")
    alloc_conf: str = Field(description="PYTORCH_ALLOC_CONF; empty where it is not set")
    threads: int
    card: GpuRecord | None
    card_why: str | None = None
    transfer: TransferRates | None
    transfer_why: str | None = None
