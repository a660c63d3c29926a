"""Fine-tuning methods, one file each; `method.py` is the contract that all of them implement.

A method is found by its module's name, so it need not be registered anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baselines.method import Method


@cache
def find_method(module_name: str) -> type[Method]:
    """The one `Method` subclass defined in `baselines.<module_name>`; asked some times for every run of a plan.

    Raises:
        LookupError: no such module (the message lists those with a method), or not exactly one method in it.
    """
    if module_name not in _modules():
        known = ", ".join(method_names())
        raise LookupError(f"there is no method file baselines/{module_name}.py; there are: {known}")
    found = _methods_in(module_name)
    if len(found) != 1:
        raise LookupError(f"baselines/{module_name}.py must define exactly one Method, found {len(found)}")
    return found[0]


def method_names() -> list[str]:
    """Modules of this package that define a method, sorted; modules shared by methods are left out."""
    return [name for name in _modules() if _methods_in(name)]


def _modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _methods_in(module_name: str) -> list[type[Method]]:
    from baselines.method import Method

    module = importlib.import_module(f"baselines.{module_name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)]
    return [value for value in classes if value.__module__ == module.__name__ and value is not Method]
