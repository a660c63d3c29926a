"""docs/add-a-baseline.md, followed word by word in a copy of the project, ends in a row of every table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

GUIDE = (ROOT / "docs" / "add-a-baseline.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in ("baselines", "grass", "workflow", "profiles", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    for name, text in re.findall(r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(project: Path, command: str) -> str:
    words = [str(Path(sys.executable).parent / word.removeprefix(".venv/bin/")) if i == 0 else word
             for i, word in enumerate(command.split())]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(project / "workflow")])}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, command + "\n" + done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_method_is_under_sixty_lines(project: Path) -> None:
    assert len((project / "baselines" / "attention.py").read_text(encoding="utf-8").splitlines()) < 60


def test_its_commands_end_in_a_row_of_every_table(project: Path) -> None:
    commands = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)).splitlines()
    assert len(commands) == 3
    check, plan, _ = (run(project, command) for command in commands)
    assert re.search(r"(\d+) of \1 checks hold", check), check
    assert "attention" in plan
    tables = sorted((project / "results" / "mine" / "tables").glob("*.md"))
    without = [table.stem for table in tables if "attention" not in table.read_text(encoding="utf-8")]
    assert [table.stem for table in tables if table.stem not in without] == [
        "accuracy", "clean_accuracy", "efficiency", "heldout_loss", "importance_drift", "learning_rates", "runs",
    ], without  # fmt: skip
