"""Memory of this process and of its GPU as the driver reports it, and other processes on that GPU.

NVML's list of processes fails in many ways that look like success: in a container the process ids are the host's; under
WSL and on some MIG devices there is no list. In each of these cases the figure is None with its own reason, never 0.
"""

from __future__ import annotations

import importlib
import os
import platform
import threading
from types import ModuleType
from typing import Any, Literal

from harness.measuring.card import Card, cuda_is_initialised
from harness.measuring.device import ON_THE_CPU
from harness.measuring.energy import EnergyMeter
from harness.records.measured import GpuRecord
from harness.records.units import GIB

POLL_S = 0.1
"""Seconds between samples. Torch's pool of reserved memory hardly shrinks, so slow sampling misses little of it."""
FOREIGN_BYTES = 256 * 2**20
"""If more than this is in use before our first allocation, and NVML lists no process, another process is on the GPU. A
CUDA context alone takes more than this, an idle card less."""
FOREIGN_WITH_RESERVED_BYTES = GIB
"""The same for drivers that count their own reserved memory as used, up to some 0.7 GiB on large cards."""

_NO_SAMPLE = "no sample was taken while the run was measured"


class NvmlMeter:
    """Device and process memory, sampled by a thread while `counting`; one peak of each for the whole run.

    Create it before this process initialises CUDA: memory in use by then is taken to belong to others.

    Args:
        device: the run's, "cpu" or "cuda".
        nvml: a stand-in for `pynvml`, for tests.
        poll_s: seconds between two samples.
    """

    def __init__(self, device: str, nvml: ModuleType | None = None, *, poll_s: float = POLL_S) -> None:
        self.process_peak_bytes: int | None = None
        self.device_peak_bytes: int | None = None
        self.why: str | None = None
        """Why no figure of the device is known."""
        self._delta_why: str | None = None
        self.foreign_why: str | None = None
        """The other process or memory seen on the GPU so far, in words."""
        self.counting = True
        """Whether samples raise the peaks; foreign processes are looked for in any case."""
        self.poll_s = poll_s
        self._pid = os.getpid()
        self._seen = False
        """Whether NVML ever listed this process."""
        self._process_why = ""
        self._before: int | None = None
        self._stop = threading.Event()
        self._card: Card | None = None
        self._thread: threading.Thread | None = None
        if device != "cuda":
            self.why = ON_THE_CPU
            return
        try:
            self._card = Card(nvml if nvml is not None else importlib.import_module("pynvml"))
            self._look_before()
        except Exception as error:  # noqa: BLE001  NVML's errors share no base with anything, and none may stop a run
            self.why = f"NVML: {error}"
            return
        if self._card.mig_part_unknown:
            self.why = (
                "CUDA_VISIBLE_DEVICES names a GPU in MIG mode, not one of its MIG devices: its figures are of all"
            )
            return
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def energy_meter(self) -> EnergyMeter:
        """A meter of the card's energy; without a card, it knows why."""
        return EnergyMeter(self._card, self.why)

    def _look_before(self) -> None:
        assert self._card is not None
        if cuda_is_initialised():
            self._delta_why = "this process had used the GPU before it was first looked at"
            return
        self._before = self._card.used_bytes()
        listed = self._processes()
        if listed and not self._card.mig_part_unknown:
            pids = ", ".join(str(p.pid) for p in listed)
            self._foreign(f"{len(listed)} compute process(es) were on the GPU before the run began (pid {pids})")

    def _processes(self) -> list[Any] | None:
        """Compute processes on the device; None where NVML gives no list."""
        assert self._card is not None
        try:
            return self._card.processes()
        except Exception as error:  # noqa: BLE001  as above
            self._process_why = f"NVML gives no list of processes ({error}{_where(self._card)})"
            return None

    def sample(self) -> None:
        """Take one sample: update the peaks, and look for other processes."""
        assert self._card is not None
        used, listed = self._card.used_bytes(), self._processes()
        mine = next((p for p in listed or [] if p.pid == self._pid), None)
        if self.counting:
            self.device_peak_bytes = max(used, self.device_peak_bytes or 0)
            if mine is not None and mine.usedGpuMemory is not None:
                self.process_peak_bytes = max(int(mine.usedGpuMemory), self.process_peak_bytes or 0)
        if listed is None:
            return
        others = [p.pid for p in listed if p.pid != self._pid]
        if mine is not None:
            self._seen = True
            if mine.usedGpuMemory is None:
                self._process_why = f"NVML lists this process without its memory{_where(self._card)}"
        elif not self._seen:
            self._process_why = f"NVML lists no process with this id (a container?){_where(self._card)}"
            others = others[1:]  # one of them may be this process under its host process id
        if others:
            self._foreign(f"another compute process was on the GPU during the run (pid {others[0]})")

    def sample_now(self) -> None:
        """Take one sample if there is a device to sample; a failure ends sampling and becomes the reason `why`."""
        if self._card is not None and self.why is None:
            self._sample_or_void()

    def restart(self) -> None:
        """Forget the peaks and the foreign processes seen so far."""
        self.process_peak_bytes = self.device_peak_bytes = self.foreign_why = None

    def _foreign(self, why: str) -> None:
        self.foreign_why = self.foreign_why or why

    def close(self) -> None:
        """Take a last sample, stop sampling, and check the memory that was in use before the run."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=10)
        self._thread = None
        self.sample_now()
        assert self._card is not None
        limit = FOREIGN_BYTES if self._card.reports_reserved_separately else FOREIGN_WITH_RESERVED_BYTES
        if not self._seen and self._before is not None and self._before > limit:
            self._foreign(
                f"{self._before:,} bytes of the GPU were in use before the run's first allocation, by nobody NVML lists"
            )

    def _poll(self) -> None:
        while not self._stop.wait(self.poll_s):
            if not self._sample_or_void():
                return

    def _sample_or_void(self) -> bool:
        try:
            self.sample()
            assert self._card is not None
            self._card.note_throttling()
        except Exception as error:  # noqa: BLE001  as above; a peak that covers half of a run is not the run's peak
            self.process_peak_bytes = self.device_peak_bytes = None
            self.why = f"NVML failed during the run: {error}"
            return False
        return True

    # ------------------------------------------------------------ what came of it

    @property
    def process_why(self) -> str | None:
        """Why the process's own peak is None; None where it is known."""
        if self.process_peak_bytes is not None:
            return None
        return self.why or self._process_why or _NO_SAMPLE

    @property
    def delta_peak_bytes(self) -> int | None:
        """The device's peak minus the memory in use before the run; None on a shared card."""
        if self.device_peak_bytes is None or self._before is None or self.foreign_why is not None:
            return None
        return max(0, self.device_peak_bytes - self._before)

    @property
    def delta_why(self) -> str | None:
        """Why `delta_peak_bytes` is None; None where it is known."""
        if self.delta_peak_bytes is not None:
            return None
        return self.why or self.foreign_why or self._delta_why or _NO_SAMPLE

    @property
    def source(self) -> Literal["process", "device delta"] | None:
        """Which figure gives the memory that this process held."""
        if self.process_peak_bytes is not None:
            return "process"
        return None if self.delta_peak_bytes is None else "device delta"

    def gpu_record(self) -> tuple[GpuRecord | None, str | None]:
        """The card before and after, or None with the reason. Call it at the end of the run."""
        if self._card is None:
            return None, self.why
        return self._card.record(), None


def _where(card: Card) -> str:
    hints = [hint for hint, here in (("under WSL", _wsl()), ("on a MIG device", card.mig)) if here]
    return f", {' '.join(hints)}" if hints else ""


def _wsl() -> bool:
    return "microsoft" in platform.release().lower()
