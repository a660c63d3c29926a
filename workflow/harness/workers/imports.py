"""What the stages import while they run: a worker imports it before its first job, and installing compiles it.

`python -m harness.workers.imports` imports it for all stages.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable


def import_for(stages: Iterable[str]) -> list[str]:
    """Import the stages and what their `IMPORTS` name, in their `ENVIRONMENT`; returns the names."""
    modules = [importlib.import_module(f"harness.stages.{stage}") for stage in stages]
    for module in modules:
        os.environ.update(getattr(module, "ENVIRONMENT", {}))
    names = [name for module in modules for name in getattr(module, "IMPORTS", ())]
    for name in names:
        importlib.import_module(name)
    return names


if __name__ == "__main__":
    # by name, as above: the stages stand above the workers
    import_for(module.name for module in pkgutil.iter_modules(importlib.import_module("harness.stages").__path__))
