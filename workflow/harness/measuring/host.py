"""Host memory of this process: the kernel's high-water mark, the proportional set, and the control group's peak.

Pinned memory may count as shared or as the driver's, and be missing from the resident set. So a method that pins memory
reports how much, see `baselines.method.Method.pinned_bytes`.
"""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")

Reading = tuple[int | None, str | None]
"""Bytes, or None and the reason."""


class HostMeter:
    """Peak resident set of this process, from the high-water mark that Linux keeps and lets a process reset."""

    def __init__(self, proc: Path = PROC) -> None:
        self._status, self._reset = proc / "status", proc / "clear_refs"
        self.why: str | None = None
        try:
            self.restart()
            self._read()
        except (OSError, LookupError) as error:
            self.why = f"the kernel's high-water mark cannot be reset here ({type(error).__name__})"

    def restart(self) -> None:
        """Reset the high-water mark to the present resident set."""
        if self.why is None:
            self._reset.write_text("5")

    def peak_bytes(self) -> int | None:
        """Peak resident set since the last restart."""
        return self._read() if self.why is None else None

    def _read(self) -> int:
        return _kilobytes(self._status.read_text(), "VmHWM:")


def proportional_set(proc: Path = PROC) -> Reading:
    """PSS now: like the resident set, but a page of a file that n processes share counts as an n-th.

    Pages of no file count whole: a process shares them only with the one that it was forked from, whose imports they
    hold, and would have them for itself if it had been started otherwise (`harness.workers`).

    The kernel walks all pages to compute it, 10 to 50 ms per GiB: do not call it inside a timed step.
    """
    try:
        text = (proc / "smaps_rollup").read_text()
        pss, whole = _kilobytes(text, "Pss:"), _kilobytes(text, "Anonymous:")
        try:
            return pss - _kilobytes(text, "Pss_Anon:") + whole, None
        except LookupError:  # before Linux 5.3: it has no workers either
            return pss, None
    except (OSError, LookupError) as error:
        return None, f"the kernel gives no smaps_rollup here ({type(error).__name__})"


def cgroup_peak(proc: Path = PROC, root: Path = CGROUPS) -> Reading:
    """Highest memory of the process's control group since it was made, version 2 or 1 of the interface.

    Other processes of the group and the page cache count too. So it is an upper bound of this process's use, provided
    that the group belongs to the job alone.
    """
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError as error:
        return None, f"no control groups here ({type(error).__name__})"
    candidates: list[Path] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        # in a container the path may be the host's; the mounted folder is then the container's own group
        if number == "0" and not controllers:
            candidates += [root / inside / "memory.peak", root / "memory.peak"]
        elif "memory" in controllers.split(","):
            name = "memory.max_usage_in_bytes"
            candidates += [root / "memory" / inside / name, root / "memory" / name]
    for file in candidates:
        try:
            return int(file.read_text()), None
        except (OSError, ValueError):
            continue
    return None, "the control group keeps no peak of its memory (needs Linux 5.19, or version 1 of the interface)"


def free_bytes(proc: Path = PROC, root: Path = CGROUPS, memory: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that this process can still take: what the kernel has free or can free, within its control group's limit.

    None where the kernel does not say.
    """
    try:
        free = _kilobytes(memory.read_text(), "MemAvailable:")
    except (OSError, LookupError):
        return None
    for folder in (root, *(root / path for path in _group_paths(proc))):
        try:
            limit, used = int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # without a limit, or version 1 of the interface
        # cached files count as used, and give way
        free = min(free, limit - used + int(pages.get("inactive_file", 0)))
    return max(0, free)


def _group_paths(proc: Path) -> list[str]:
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 2)[2].lstrip("/") for line in lines if line.startswith("0::")]


def _kilobytes(text: str, key: str) -> int:
    for line in text.splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)
