"""Run the contract suite on one method and print a table of its checks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import baselines
from baselines import find_method
from baselines.method import Method
from harness.errors import UserError
from harness.study.strict_yaml import Source, validate

if TYPE_CHECKING:
    from harness.checking.contract import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which method, and with which options."""
    parser.add_argument("file", help="baselines/<name>.py, or just the name")
    parser.add_argument("--options", metavar="JSON", help="options of the method, instead of its own EXAMPLES")


def run(arguments: argparse.Namespace) -> int:
    """Print a table an example, a row a check as it ends; 1 where the contract is broken somewhere."""
    name = _module(Path(arguments.file))
    try:
        method = find_method(name)
    except LookupError as error:
        raise UserError(str(error)) from error
    examples = list(method.EXAMPLES)
    if arguments.options is not None:
        examples = [_given(method, arguments.options)]
    missing = [package for package in method.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"baselines/{name}.py needs the package {', '.join(missing)}; install it to check the method")
    started = time.perf_counter()
    findings = [finding for options in examples for finding in _table(name, options)]
    broken = [finding for finding in findings if finding.detail is not None]
    held, seconds = len(findings) - len(broken), time.perf_counter() - started
    print(f"baselines/{name}.py: {held} of {len(findings)} checks hold ({seconds:.0f} s)")
    return 1 if broken else 0


def _table(name: str, options: dict[str, Any]) -> Iterator[Finding]:
    """Print the checks of one example: a Llama goes through all, the other families through some."""
    import torch

    from harness.checking.contract import CHECKS, FAMILY_CHECKS, Case, run_check
    from harness.checking.tiny import FAMILIES, tiny_inputs

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        cases = {f: Case(name, options, tiny_inputs(Path(scratch) / f, f), Path(scratch) / f) for f in FAMILIES}
        print(f"{name} {json.dumps(options)}\n{'':<32}{''.join(f'{family:<8}' for family in FAMILIES)}")
        for check in CHECKS:
            families = FAMILIES if check in FAMILY_CHECKS else FAMILIES[:1]
            findings = {family: run_check(check, cases[family]) for family in families}
            marks = [
                ("-" if family not in findings else "ok" if findings[family].detail is None else "BROKEN")
                for family in FAMILIES
            ]
            print(
                f"{check.__name__.replace('_', ' '):<32}{''.join(f'{mark:<8}' for mark in marks)}".rstrip(), flush=True
            )
            for family, finding in findings.items():
                if finding.detail is not None:
                    print(f"    {family}: {finding.detail}", flush=True)
            yield from findings.values()
        print()


def _given(method: type[Method], text: str) -> dict[str, Any]:
    """The options of the command line, checked."""
    try:
        options: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UserError(
            f'--options {text}: not JSON ({error}); write them as in {{"rank": 8}}, in single quotes'
        ) from error
    validate(method.Config, options, Source(Path("--options"), options, {}))
    return options


def _module(path: Path) -> str:
    """The module's name; a file outside `baselines/` cannot be a method."""
    home = Path(baselines.__path__[0]).resolve()
    if path.suffix == ".py" and path.resolve().parent != home:
        raise UserError(f"{path}: methods are files of the folder baselines/; put the file there")
    return path.stem
