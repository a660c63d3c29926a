"""Of two jobs with one output, the second waits: the first may have outlived the Snakemake that started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from further import a_few
from harness.records.locks import try_lock
from house import ROOT

SMALL = ROOT / "results" / "published" / "small"


@pytest.mark.parametrize(
    ("stage", "out", "output"),
    a_few(
        [
            ("tables", "tables", "tables"),
            ("figures", "figures", "figures.json"),
            ("page", "report.html", "report.html"),
        ],
        one_in=3,
    ),
)
def test_the_second_writer_waits_and_leaves_what_it_finds(stage: str, out: str, output: str, tmp_path: Path) -> None:
    lock = tmp_path / f".{output}.lock"
    held = try_lock(lock)
    assert held is not None
    config = ["--config", str(ROOT / "config" / "small.yaml"), "--frames", str(SMALL)]
    command = [sys.executable, "-m", "harness", stage, *config, "--out", str(tmp_path / out)]
    second = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert second.stderr is not None
    assert "does this job; waiting for it to end" in second.stderr.readline()
    (tmp_path / output).write_text("of the first one")
    lock.unlink()
    os.close(held)
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {output: "of the first one"}
