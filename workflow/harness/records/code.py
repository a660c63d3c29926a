"""The code that a record depends on, and its hash, which every kind of record carries.

A record depends on the modules that make it and on everything these import, directly or not: the closure of a few root
modules, which are named below for each kind of record. Imports are read from the source, so no list of modules has to
be maintained, and a change of a method's file makes only that method's records stale. Uses only the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

Roots = tuple[str, ...]
"""Modules that make a record; their closure decides what it says."""

ROWS: Roots = ("harness.inputs.make_rows",)
FOUND_MODEL: Roots = ("harness.inputs.make_models",)
PRETRAINED_MODEL: Roots = ("harness.inputs.pretrain",)
STOCK_SUITE: Roots = ("harness.evaluating.stock_data",)
EVALUATION: Roots = ("harness.evaluating.score",)
PROBE: Roots = ("harness.training.probe",)
OVERLAP: Roots = ("harness.inputs.make_overlap",)


def training(module: str) -> Roots:
    """Root modules of a training run of the method in `baselines.<module>`."""
    return ("harness.training.loop", "harness.measuring.rates", f"baselines.{module}")


def search(module: str) -> Roots:
    """Root modules of a learning-rate search for that method."""
    return ("harness.training.search", f"baselines.{module}")


def run_forecast(module: str) -> Roots:
    """Root modules of a memory forecast for that method's runs."""
    return ("harness.forecasting.run_forecast", f"baselines.{module}")


def step_forecast(module: str) -> Roots:
    """Root modules of a memory forecast for one step, a cell of an efficiency study."""
    return ("harness.forecasting.forecast", "harness.step.flops", f"baselines.{module}")


def measurement(module: str) -> Roots:
    """Root modules of a measurement of the memory and speed of one step."""
    return ("harness.efficiency.measure", f"baselines.{module}")


EXCLUDED = (
    "grass.heatmap",
    "harness.errors",
    "harness.progress",
    "harness.records",
    "harness.sign",
    "harness.study",
    "harness.training.curves",
)
"""Modules and packages that record-making code imports, but that do not affect what a record says: a figure of the
library, messages to the user, progress lines and curves, how records are written (their schema has its own version),
and the job's specification, which is in the name of the record."""

DATA = (".j2", ".json", ".yaml")
"""Suffixes of files other than modules that a package reads, such as the tasks of lm-eval."""


@dataclass(frozen=True)
class Code:
    """The code behind a record."""

    sha256: str
    sources: Mapping[str, str]
    """First 12 digits of each file's own hash, by module; a data file is `<package>/<file>`."""


@cache
def code_of(roots: Roots) -> Code:
    """Today's code of a record that is made by these root modules.

    Raises:
        ModuleNotFoundError: a root module does not exist.
    """
    return _ours().code(roots)


@cache
def _ours() -> Tree:
    # located without importing them: `grass` would import torch
    specs = {name: importlib.util.find_spec(name) for name in ("grass", "baselines", "harness")}
    return Tree({name: Path(spec.origin).parent for name, spec in specs.items() if spec and spec.origin})


class Tree:
    """The source files of some packages, each read once.

    Args:
        folders: of the top-level packages, by name; imports of other packages are not followed.
        apart: modules that do not count, see `EXCLUDED`.
    """

    def __init__(self, folders: Mapping[str, Path], apart: Sequence[str] = EXCLUDED) -> None:
        self._folders, self._apart = folders, apart
        self._imports: dict[str, frozenset[str]] = {}
        self._hashes: dict[Path, str] = {}

    def code(self, roots: Iterable[str]) -> Code:
        """The code of the closure of `roots`.

        Raises:
            ModuleNotFoundError: a root module does not exist.
        """
        files: dict[str, Path] = {}
        for module in self.closure(roots):
            path = self._file(module)
            assert path is not None
            files[module] = path
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            files |= {f"{package}/{beside.name}": beside for beside in path.parent.iterdir() if beside.suffix in DATA}
        hashes = {name: self._hash(files[name]) for name in sorted(files)}
        whole = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
        return Code(
            sha256=hashlib.sha256(whole.encode()).hexdigest(),
            sources={name: digest[:12] for name, digest in hashes.items()},
        )

    def closure(self, roots: Iterable[str]) -> list[str]:
        """The roots and every module that they import, directly or not, also by imports inside functions.

        A parent package counts only if something is imported from it: `import grass.loss` runs `grass/__init__.py`,
        but that file does not affect what `grass.loss` computes.

        Raises:
            ModuleNotFoundError: a root module does not exist.
        """
        left = list(roots)
        for root in left:
            if self._file(root) is None:
                raise ModuleNotFoundError(f"no source for {root!r}")
        found: set[str] = set()
        while left:
            module = left.pop()
            if module not in found and not any(module == name or module.startswith(f"{name}.") for name in self._apart):
                found.add(module)
                left += self._imported_by(module)
        return sorted(found)

    def _file(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        if top not in self._folders:
            return None
        path = self._folders[top].joinpath(*rest)
        return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)

    def _imported_by(self, module: str) -> frozenset[str]:
        if module not in self._imports:
            path = self._file(module)
            assert path is not None
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            names = imported_names(path.read_text(encoding="utf-8"), package=package)
            self._imports[module] = frozenset(name for name in names if self._file(name) is not None)
        return self._imports[module]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            text = path.read_text(encoding="utf-8")
            self._hashes[path] = hashlib.sha256(
                (normalised_source(text) if path.suffix == ".py" else text).encode()
            ).hexdigest()
        return self._hashes[path]


def imported_names(text: str, *, package: str) -> set[str]:
    """Every imported name that may be a module; imports under `if TYPE_CHECKING` are left out.

    Args:
        text: source of the importing module.
        package: package of that module, to resolve relative imports.
    """
    found = set()
    for node in _executed(ast.parse(text).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def _executed(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            yield from _executed(node.orelse)
        elif not isinstance(node, ast.expr):  # no import is in an expression, and most nodes are
            yield node
            yield from _executed(ast.iter_child_nodes(node))


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


_FSTRING_START, _FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))
"""Token kinds at both ends of an f-string: since Python 3.12 it is several tokens, before it was one string token."""
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


def normalised_source(text: str) -> str:
    """The part of a module's source that affects what it does; the same under every version of Python.

    One line per logical line: its tokens, separated by spaces, after a `>` for each block that opens before it and a
    `<` for each that closes. Comments, blank lines, line wrapping and docstrings do not appear.
    """
    found: list[str] = []
    line: list[str] = []
    borders, acts = "", False
    for kind, word in _tokens(text):
        if kind == tokenize.NEWLINE:
            if acts:
                found.append(" ".join([borders, *line]))
                borders = ""
            line, acts = [], False
        elif kind in (tokenize.INDENT, tokenize.DEDENT):
            borders += ">" if kind == tokenize.INDENT else "<"
        else:
            line.append(word)
            acts = acts or kind != tokenize.STRING
    return "\n".join(found)


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Kind and text of every token but layout; an f-string counts as a name, so it is not taken for a docstring."""
    lines, depth, start = text.split("\n"), 0, (0, 0)
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == _FSTRING_START:
            start = start if depth else token.start
            depth += 1
        elif token.type == _FSTRING_END:
            depth -= 1
            if not depth:
                yield tokenize.NAME, _between(lines, start, token.end)
        elif not depth and token.type not in _LAYOUT:
            is_f = token.type == tokenize.STRING and "f" in token.string[: token.string.index(token.string[-1])].lower()
            yield tokenize.NAME if is_f else token.type, token.string


def _between(lines: Sequence[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from one (line, column) to another; lines count from 1."""
    (first, left), (last, right) = start, end
    inside = list(lines[first - 1 : last])
    inside[-1] = inside[-1][:right]
    inside[0] = inside[0][left:]
    return "\n".join(inside)
