"""Where a record comes from: code, packages, inputs, machine. No torch is imported here."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

from harness.records.atomic import sha256
from harness.records.code import Roots, code_of
from harness.records.record import Provenance

process: Literal["fresh", "worker"] = "fresh"
"""How this process was born; `harness.workers.server` says so in a worker."""

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "numpy", "snakemake")


def provenance(*, roots: Roots, inputs: Mapping[str, Path], device: str = "cpu") -> Provenance:
    """Describe how a record was made.

    Args:
        roots: root modules of the code that made it, see `harness.records.code`.
        inputs: every file that was read, by role.
        device: "cpu" or the accelerator's name.
    """
    code = code_of(roots)
    commit, why, dirty = _git()
    torch = sys.modules.get("torch")
    return Provenance(
        source_sha256=code.sha256,
        sources=dict(code.sources),
        git_commit=commit,
        git_commit_why=why,
        git_dirty=dirty,
        packages=_versions(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {_processor()}",
        device=device,
        threads=torch.get_num_threads() if torch is not None else 1,
        process=process,
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        input_sha256={role: sha256(path) for role, path in sorted(inputs.items())},
    )


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _git() -> tuple[str | None, str | None, bool | None]:
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"git gave no answer ({type(error).__name__})", None
    return commit, None, bool(status)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
