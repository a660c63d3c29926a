"""What makes a record of an efficiency cell stale: the cell, and the code behind it. No torch here."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from harness.records.code import method_files
from harness.step.spec import Cell

_STEP = ("grass", "baselines.method", "harness.step.loss", "harness.step.cell", "harness.step.draws")
_MEASURING = (
    "harness.efficiency.arithmetic",
    "harness.efficiency.chance",
    "harness.measuring.meters",
    "harness.efficiency.measure",
    "harness.measuring.device",
    "harness.efficiency.timing",
    "harness.efficiency.utilisation",
    "harness.step.worst_case",
)
_FORECASTING = ("harness.forecasting",)


def measured_by(cell: Cell) -> tuple[str, ...]:
    """Modules and packages whose code decides what is measured of a cell."""
    return (*_STEP, *method_files(cell.method_class().__module__), *_MEASURING)


def forecast_by(cell: Cell) -> tuple[str, ...]:
    """The same for its forecast."""
    return (*_STEP, *method_files(cell.method_class().__module__), *_FORECASTING)


def cell_sha256(cell: Cell, **more: Any) -> str:
    """Hash of a cell, and of whatever else was asked for."""
    asked = {"cell": cell.model_dump(mode="json"), **more}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@cache
def code_sha256(sources: tuple[str, ...]) -> str:
    """Hash of code without comments, docstrings and blank lines, the same under every version of Python.

    A forecast made on one machine is read beside a measurement made on another; `harness.records.provenance` hashes
    what `ast.unparse` prints, which differs from version to version.
    """
    total = hashlib.sha256()
    for source in sorted(sources):
        for file in _files(source):
            total.update(_bare(file.read_text(encoding="utf-8")).encode())
    return total.hexdigest()


def _files(source: str) -> list[Path]:
    spec = importlib.util.find_spec(source)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source for {source!r}")
    if spec.submodule_search_locations:
        return sorted(Path(spec.origin).parent.rglob("*.py"))
    return [Path(spec.origin)]


def _bare(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(text)):
        # a string that is a statement of its own says something to people alone
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
