"""Which code decides what each kind of record says; named here once, for makers of records and for `plan`."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from baselines import find_method

ROWS = ("harness.inputs.rows", "harness.inputs.generated", "harness.inputs.prompts")
FOUND_MODEL = ("harness.inputs.models",)
PRETRAINED_MODEL = (
    *FOUND_MODEL,
    "harness.inputs.pretrain",
    "harness.inputs.generated",
    "harness.inputs.tokenizer",
    "harness.inputs.prompts",
)
EVALUATION = (
    "harness.evaluating",
    "harness.tasks",
    "harness.inputs.prompts",
    "harness.inputs.tokens",
    "harness.inputs.models",
)


@cache
def training(module: str) -> tuple[str, ...]:
    """Code behind a training run or a search of the method in `baselines.<module>`."""
    return (
        "grass",
        "baselines.method",
        *method_files(find_method(module).__module__),
        "harness.inputs.tokens",
        "harness.inputs.prompts",
        "harness.inputs.models",
        "harness.training",
        "harness.measuring.card",
        "harness.measuring.census",
        "harness.measuring.clock",
        "harness.measuring.device",
        "harness.measuring.host",
        "harness.measuring.meters",
        "harness.measuring.nvml",
    )


def forecast(module: str) -> tuple[str, ...]:
    """Code behind a forecast of the memory of a run of the method in `baselines.<module>`."""
    return (*training(module), "harness.efficiency", "harness.forecasting")


@cache
def method_files(module: str) -> tuple[str, ...]:
    """A method's file and those of other methods that it imports anywhere, however deep."""
    found, left = set(), [module]
    while left:
        name = left.pop()
        found.add(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        left += [i for i in imported - found if i.startswith("baselines.") and i != "baselines.method"]
    return tuple(sorted(found))
