"""Where a record comes from: code, packages, inputs, machine. No torch is imported here."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from harness.records.atomic import sha256
from harness.records.run import Provenance

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "numpy", "snakemake")


def provenance(*, sources: Sequence[str], inputs: Mapping[str, Path], device: str = "cpu") -> Provenance:
    """Describe the making of a record.

    Args:
        sources: modules or packages whose code made it, e.g. `("grass", "baselines.grass")`.
        inputs: every file that was read, by role.
        device: "cpu" or the accelerator's name.
    """
    commit, why, dirty = _git()
    torch = sys.modules.get("torch")
    return Provenance(
        source_sha256=source_sha256(tuple(sources)),
        git_commit=commit,
        git_commit_why=why,
        git_dirty=dirty,
        packages=_versions(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {_processor()}",
        device=device,
        threads=torch.get_num_threads() if torch is not None else 1,
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        input_sha256={role: sha256(path) for role, path in sorted(inputs.items())},
    )


@cache
def source_sha256(sources: tuple[str, ...]) -> str:
    """Hash of the code of modules and packages, comments, docstrings and layout left out.

    A record whose hash differs from today's was made by other code: `plan` calls it stale. The text hashed is what
    `ast.unparse` prints, which may differ between Python versions, so the version is part of the hash.
    """
    total = hashlib.sha256(f"{sys.version_info.major}.{sys.version_info.minor}".encode())
    for source in sorted(sources):
        for file in _files(source):
            total.update(_bare(file).encode())
    return total.hexdigest()


def _files(source: str) -> list[Path]:
    spec = importlib.util.find_spec(source)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source for {source!r}")
    if spec.submodule_search_locations:
        return sorted(p for p in Path(spec.origin).parent.rglob("*") if p.suffix in {".py", ".yaml", ".j2"})
    return [Path(spec.origin)]


def _bare(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            first = body[0] if body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(body) > 1:
                node.body = body[1:]
    return ast.unparse(tree)


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
