"""One job per GPU, whatever the number of jobs: a lease on a device, taken before torch is imported.

A lease is an flock on a file named after the device's UUID: the kernel releases it when the process ends, for whatever
reason. Leases separate the jobs of one user on one machine; `harness.measuring.nvml` detects other processes.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError
from harness.measuring.card import cuda_is_initialised, in_mig_mode, text_of
from harness.progress import duration, say
from harness.records.locks import POLL_S, holder, try_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"


class NoGpuError(UserError):
    """No GPU is available; the message is one sentence for the user."""


@dataclass(frozen=True)
class Device:
    """The device of one job: a GPU, or a MIG part of one."""

    index: int
    """Number of the GPU as in nvidia-smi: by PCI bus."""
    uuid: str
    """As CUDA_VISIBLE_DEVICES takes it: `GPU-...` or `MIG-...`."""
    name: str
    gpu_uuid: str
    """UUID of the GPU that a MIG part belongs to; a whole GPU's own UUID."""

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@contextmanager
def lease_for(device: str, *, count: int = 1) -> Iterator[Device | None]:
    """`count` leased GPUs, the first of them yielded, if a recipe's device is "cuda"; otherwise None, at once."""
    if device != "cuda":
        yield None
        return
    with gpu_lease(count=count) as leased:
        yield leased


@contextmanager
def gpu_lease(
    *,
    count: int = 1,
    lister: Callable[[], Sequence[Device]] | None = None,
    folder: Path | None = None,
    tell: Callable[[str], None] = say,
    poll_s: float = POLL_S,
) -> Iterator[Device]:
    """Hold one free GPU of those visible, or several, and make them all that CUDA will see in this process.

    Yields the first. Waits until enough are free, and holds none until then: two jobs that each held half of what they
    need would wait for ever. Once this process has a CUDA context, the lease lasts until the process ends, because the
    context holds memory on the card until then.

    Args:
        count: GPUs to hold.
        lister: returns all devices of the machine; by default `list_devices`.
        folder: of the lock files; by default the user's own, see `lock_folder`.
        tell: called with a line when waiting begins and ends.
        poll_s: seconds between two tries.

    Raises:
        NoGpuError: no GPU, or none that CUDA_VISIBLE_DEVICES lets through, or fewer than `count`.
        RuntimeError: this process has initialised CUDA already, or holds a lease.
    """
    if cuda_is_initialised():
        raise RuntimeError("CUDA is initialised in this process already: take the GPU lease before torch is used")
    given = os.environ.get(VISIBLE)
    devices = visible_devices(list_devices() if lister is None else lister(), given)
    if len(devices) < count:
        raise NoGpuError(f"gpus: {count} are asked for, and {len(devices)} can be seen here: ask for {len(devices)}")
    held = _wait(devices, count, lock_folder() if folder is None else folder, tell, poll_s)
    os.environ[VISIBLE] = ",".join(device.uuid for device, _ in held)
    try:
        yield held[0][0]
    finally:
        if not cuda_is_initialised():
            for _, lock in held:
                os.close(lock)
            os.environ.pop(VISIBLE)
            if given is not None:
                os.environ[VISIBLE] = given


def lock_folder() -> Path:
    """The user's own folder for lock files, made where it is absent: in XDG_RUNTIME_DIR, else in the temp folder.

    Raises:
        NoGpuError: the folder is somebody else's.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK):
        folder = Path(runtime, "grass-gpus")
    else:
        folder = Path(tempfile.gettempdir(), f"grass-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoGpuError(f"the folder of GPU locks {folder} is not yours: set XDG_RUNTIME_DIR or TMPDIR to one that is")
    return folder


def _wait(
    devices: Sequence[Device], count: int, folder: Path, tell: Callable[[str], None], poll_s: float
) -> list[tuple[Device, int]]:
    """`count` devices with their locks."""
    started, told = time.monotonic(), False
    while True:
        held: list[tuple[Device, int]] = []
        for device in devices:
            lock = try_lock(_lock_file(folder, device))
            if lock is not None:
                held.append((device, lock))
            if len(held) == count:
                if told:
                    free = f"{held[0][0]} is" if count == 1 else f"{count} GPUs are"
                    tell(f"{free} free after {duration(time.monotonic() - started)}")
                return held
        for _, lock in held:
            os.close(lock)
        if not told:
            told = True
            what = "a GPU" if count == 1 else f"{count} GPUs"
            mine = {device for device, _ in held}
            others = [_holder_of(folder, device) for device in devices if device not in mine]
            tell(f"waiting for {what}: {'; '.join(others)}")
        time.sleep(poll_s)


def _lock_file(folder: Path, device: Device) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', device.uuid)}.lock"


def _holder_of(folder: Path, device: Device) -> str:
    """Description of the process that holds a device.

    Raises:
        RuntimeError: this process holds it, and would wait for itself.
    """
    held = holder(_lock_file(folder, device))
    if held is None:
        return f"{device} is held"
    if held[0] == os.getpid():
        raise RuntimeError(f"this process holds {device} already: a job computes on one GPU")
    return f"{device} is held by {held[1]}"


# ---------------------------------------------------------------- which devices there are


def visible_devices(devices: Sequence[Device], visible: str | None) -> list[Device]:
    """The devices that CUDA_VISIBLE_DEVICES lets through, in its order.

    The value is read as CUDA reads it: numbers, UUIDs or the beginning of one, MIG ids; entries from a negative number
    on are ignored. The number or UUID of a GPU in MIG mode means all its parts. Numbers follow the PCI bus, as with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Args:
        devices: all of the machine.
        visible: the variable's value; None where it is not set.

    Raises:
        NoGpuError: there is no device, the value lets none through, or it names one that does not exist.
    """
    if not devices:
        raise NoGpuError("no GPU was found on this machine: set device: cpu in the recipe, or run where there is one")
    if visible is None:
        return list(devices)
    chosen: dict[str, Device] = {}
    for word in filter(None, map(str.strip, visible.split(","))):
        if word.startswith("-") or word == "NoDevFiles":  # Slurm's value for no GPU
            break
        named = [
            device
            for device in devices
            if (device.index == int(word) if word.isdigit() else word in _beginnings(device, len(word)))
        ]
        if not named:
            known = ", ".join(f"{device.index} = {device.uuid}" for device in devices)
            raise NoGpuError(f"{VISIBLE} names {word}, and there is no such GPU here; there are: {known}")
        chosen |= {device.uuid: device for device in named}
    if not chosen:
        raise NoGpuError(f"{VISIBLE} is {visible!r}, which hides every GPU: unset it, or set device: cpu in the recipe")
    return list(chosen.values())


def _beginnings(device: Device, length: int) -> tuple[str, str]:
    return device.uuid[:length], device.gpu_uuid[:length]


def list_devices() -> list[Device]:
    """Every GPU that this process may use, by NVML, or by `nvidia-smi -L` where NVML does not answer.

    Raises:
        NoGpuError: neither answers.
    """
    try:
        return devices_by_nvml(importlib.import_module("pynvml"))
    except Exception as error:  # noqa: BLE001  NVML's errors share no base; the reason is told below
        reason = str(error)
    program = shutil.which("nvidia-smi")
    if program is None:
        raise NoGpuError(f"no GPU was found: NVML says {reason!r}, and there is no nvidia-smi; install the driver")
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    if listed.returncode:
        said = (listed.stderr or listed.stdout).strip()
        raise NoGpuError(f"no GPU was found: NVML says {reason!r}, nvidia-smi {said!r}; check the driver")
    return devices_by_smi(listed.stdout)


def devices_by_nvml(nvml: ModuleType) -> list[Device]:
    """All GPUs that this process may open; a GPU in MIG mode is replaced by its parts."""
    api: Any = nvml
    api.nvmlInit()
    found: list[Device] = []
    index = 0
    for number in range(api.nvmlDeviceGetCount()):
        try:
            handle = api.nvmlDeviceGetHandleByIndex(number)
        except api.NVMLError_NoPermission:
            continue  # belongs to another job on this node: CUDA does not count it either
        uuid, name = text_of(api.nvmlDeviceGetUUID(handle)), text_of(api.nvmlDeviceGetName(handle))
        if in_mig_mode(api, handle):
            for part in _mig_parts(api, handle):
                found.append(Device(index, text_of(api.nvmlDeviceGetUUID(part)), f"{name}, MIG", uuid))
        else:
            found.append(Device(index, uuid, name, uuid))
        index += 1
    return found


def _mig_parts(api: Any, handle: Any) -> Iterator[Any]:
    for place in range(api.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield api.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except api.NVMLError_NotFound:
            continue  # MIG slots may be empty


def devices_by_smi(text: str) -> list[Device]:
    """The same from the output of `nvidia-smi -L`."""
    found: list[Device] = []
    index, name, gpu = 0, "", ""
    for line in text.splitlines():
        whole = re.match(r"GPU (\d+): (.+) \(UUID: (GPU-[^)]+)\)", line)
        part = re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line)
        if whole:
            index, name, gpu = int(whole[1]), whole[2], whole[3]
            found.append(Device(index, gpu, name, gpu))
        elif part:
            found = [device for device in found if device.uuid != gpu]
            found.append(Device(index, part[1], f"{name}, MIG", gpu))
    return found
