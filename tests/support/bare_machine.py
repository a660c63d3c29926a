"""A machine that lacks packages, played by a subprocess: they cannot be imported there, and no library finds them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

OURS = {"grass-bench"}
_BLOCK = """\
import importlib.util, sys

MISSING = {missing!r}

def is_missing(name):
    return name.partition(".")[0] in MISSING

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if is_missing(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
# libraries ask this whether a package is there, and are told that it is not
really = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_missing(name) else really(name, package)
"""


def needed_by(distributions: Iterable[str]) -> set[str]:
    """These distributions with all that they need, without extras; names are normalised."""
    found: set[str] = set()
    left = [_normal(name) for name in distributions]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another system or Python
            continue
        found.add(name)
        left += [
            _normal(re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0]) for text in wanted if "extra ==" not in text
        ]
    return found


def modules_beside(distributions: Iterable[str]) -> set[str]:
    """Top-level modules that are installed here and belong to none of these distributions, nor to what they need."""
    allowed = needed_by(distributions) | OURS
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not allowed & {_normal(owner) for owner in owners}
    }


def without(modules: set[str], folder: Path) -> Mapping[str, str]:
    """The environment of Python processes, and of those that they start, that lack these modules."""
    (folder / "sitecustomize.py").write_text(_BLOCK.format(missing=sorted(modules)), encoding="utf-8")
    path = [str(folder), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
