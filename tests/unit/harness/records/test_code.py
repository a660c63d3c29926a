"""The one hash of code: what it contains, what leaves it alone, and that every version of Python agrees on it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.records import code
from harness.records.code import EXCLUDED, Tree, code_of, imported_names, normalised_source
from house import ROOT

from baselines import method_names

FIXTURE = '''\
"""A module."""
from __future__ import annotations

import os  # why


class Empty(Exception):
    """Nothing but words."""


def f(x: int, *, name="a") -> str:
    """Says."""
    if x:
        # a remark, further to the left than what follows

        return (f"{x!r:>{8}} {name}"
                "b")
    """Says more, in
    two lines."""
    return rf"{x}\\d" + \\
        'c'; x = 1
'''
BARE = """\
 from __future__ import annotations
 import os
 class Empty ( Exception ) :
>< def f ( x : int , * , name = "a" ) -> str :
> if x :
> return ( f"{x!r:>{8}} {name}" "b" )
< return rf"{x}\\d" + 'c' ; x = 1"""


# ---------------------------------------------------------------- text


def test_comments_docstrings_and_layout_leave_no_trace() -> None:
    assert normalised_source(FIXTURE) == BARE
    assert normalised_source('def f(x):\n    """Says."""\n    return x  # why\n') == normalised_source(
        "# a remark\n\n\ndef f( x ):\n\treturn x\n"
    )
    assert normalised_source("a = '# no comment'\n") == " a = '# no comment'"
    assert normalised_source("f(1,\n  2)\n") == normalised_source("f(1, 2)\n")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("return_ = x", "return_ = y"),
        ("a = 'b  c'", "a = 'b c'"),
        ("a = f'{b}  c'", "a = f'{b} c'"),
        ("if a:\n    b\n    c\n", "if a:\n    b\nc\n"),
        ("if a:\n    if b:\n        c\n    d\n", "if a:\n    if b:\n        c\n        d\n"),
        ("a = '''b\nc'''", "a = '''b c'''"),
    ],
)
def test_what_the_code_does_leaves_a_trace(one: str, other: str) -> None:
    assert normalised_source(one) != normalised_source(other)


def test_every_version_of_python_gives_this_hash() -> None:
    """Computed under 3.11, 3.12 and 3.13, which take f-strings apart in different ways."""
    found = hashlib.sha256(normalised_source(FIXTURE).encode()).hexdigest()
    assert found == "415e8578f8466b9d4cf1547acbce4ff7c9e91a5c3e6442c7c949d9e6c55c0792"


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13"])
def test_other_versions_of_python_agree_on_all_of_our_code(python: str) -> None:
    """`records/code.py` needs the standard library alone, so that any interpreter there is can run it."""
    script = (
        "import runpy, sys; found = runpy.run_path(sys.argv[1]); root = found['Path'](sys.argv[2])\n"
        "folders = {'grass': root / 'grass', 'baselines': root / 'baselines', 'harness': root / 'workflow/harness'}\n"
        "print(found['Tree'](folders).code(found['measurement']('grass')).sha256)"
    )
    command = [python, "-c", script, str(Path(code.__file__)), str(ROOT)]
    if shutil.which(python) is None or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no {python} here")
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert there.strip() == code_of(code.measurement("grass")).sha256


# ---------------------------------------------------------------- closure


def test_imports_are_found_wherever_they_stand_and_those_for_type_checkers_are_none() -> None:
    text = """
import grass.loss, os
from typing import TYPE_CHECKING
import typing
from . import beside
from .near import thing
if TYPE_CHECKING:
    from grass import hidden
elif typing.TYPE_CHECKING:
    from grass import hidden_too
else:
    from baselines import seen
def f():
    with g():
        from harness.step import run as other
"""
    found = imported_names(text, package="harness.training")
    assert {"grass.loss", "harness.training.beside", "harness.training.near", "harness.step.run"} <= found
    assert {"baselines.seen", "harness.training.near.thing"} <= found
    assert not any("hidden" in name for name in found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("grass", "baselines", "workflow/harness"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def tree(root: Path) -> Tree:
    return Tree({"grass": root / "grass", "baselines": root / "baselines", "harness": root / "workflow" / "harness"})


MADE_BY_METHODS = (code.training, code.search, code.run_forecast, code.step_forecast, code.measurement)
KINDS = {
    "rows": code.ROWS,
    "model": code.FOUND_MODEL,
    "own model": code.PRETRAINED_MODEL,
    "score": code.EVALUATION,
    **{f"{kind.__name__} {m}": kind(m) for kind in MADE_BY_METHODS for m in ("lora", "grass")},
}


def stale_after(root: Path, text: str, *files: str) -> set[str]:
    """Kinds of records whose hash changes when `text` is added to files of the copy, which are left as they were."""
    whole = {root / file: (root / file).read_text(encoding="utf-8") for file in files}
    for path, before in whole.items():
        path.write_text(before + text, encoding="utf-8")
    changed = tree(root)
    found = {kind for kind, roots in KINDS.items() if code_of(roots).sha256 != changed.code(roots).sha256}
    for path, before in whole.items():
        path.write_text(before, encoding="utf-8")
    return found


LORA, GRASS = ({f"{kind.__name__} {m}" for kind in MADE_BY_METHODS} for m in ("lora", "grass"))
RUNS = {f"{kind} {m}" for kind in ("training", "search") for m in ("lora", "grass")}


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        # a method's file makes its own records stale
        ("baselines/lora.py", LORA),
        ("baselines/grass.py", GRASS),
        ("baselines/lisa.py", set()),
        # so does a helper deep in the closure: the rounding of weights, in the contract's default optimizer
        ("grass/rounding.py", LORA | GRASS | {"score", "model", "own model"}),
        ("grass/offload/blocks.py", GRASS),
        ("workflow/harness/training/schedule.py", RUNS),
        ("workflow/harness/measuring/nvml.py", RUNS | {"measurement lora", "measurement grass"}),
        ("workflow/harness/inputs/prompts.py", RUNS | {"rows", "own model", "score"}
         | {"run_forecast lora", "run_forecast grass"}),
        ("workflow/harness/inputs/generated.py", {"rows", "own model"}),
        ("workflow/harness/inputs/pretrain.py", {"own model"}),
    ],
)  # fmt: skip
def test_a_change_makes_stale_what_it_decides(file: str, kinds: set[str], copy: Path) -> None:
    assert stale_after(copy, "CHANGED = 1\n", file) == kinds


def test_what_decides_nothing_of_a_record_makes_none_stale(copy: Path) -> None:
    others = (
        "workflow/harness/progress.py",
        "workflow/harness/records/run.py",
        "workflow/harness/records/measured.py",
        "workflow/harness/study/spec.py",
        "workflow/harness/study/sources.py",
        "workflow/harness/reporting/page.py",
        "workflow/harness/stages/train.py",
        "grass/heatmap.py",
    )
    assert stale_after(copy, "CHANGED = 1\n", *others) == set()


def test_a_remark_makes_nothing_stale(copy: Path) -> None:
    assert stale_after(copy, '\n\n# a remark\n"""And another."""\n', "baselines/grass.py") == set()


def test_a_task_file_of_lm_eval_makes_scores_stale(copy: Path) -> None:
    assert stale_after(copy, "other: 1\n", "workflow/harness/tasks/number.yaml") == {"score"}


def test_the_hashes_of_files_name_what_changed(copy: Path) -> None:
    before = tree(copy).code(code.EVALUATION)
    path = copy / "workflow" / "harness" / "evaluating" / "lm.py"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + "CHANGED = 1\n", encoding="utf-8")
    after = tree(copy).code(code.EVALUATION)
    path.write_text(whole, encoding="utf-8")
    assert before.sources.keys() == after.sources.keys()
    assert {n for n in after.sources if after.sources[n] != before.sources[n]} == {"harness.evaluating.lm"}
    assert {len(digest) for digest in after.sources.values()} == {12}
    assert "harness.tasks/base.yaml" in after.sources


def test_every_method_has_its_code_and_every_exception_is_there() -> None:
    for path in (ROOT / "baselines").glob("*.py"):
        if path.stem in method_names():
            assert f"baselines.{path.stem}" in code_of(code.training(path.stem)).sources
    folders = {"grass": ROOT / "grass", "baselines": ROOT / "baselines", "harness": ROOT / "workflow" / "harness"}
    assert Tree(folders, apart=()).closure(EXCLUDED)
    with pytest.raises(ModuleNotFoundError, match=r"no source for 'baselines\.none'"):
        code_of(("baselines.none",))


def test_hashing_imports_nothing_that_it_hashes() -> None:
    script = (
        "import sys; from harness.records import code; code.code_of(code.training('grass'))\n"
        "sys.exit(bool({'torch', 'grass', 'baselines', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
