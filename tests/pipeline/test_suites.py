"""Suites of forgetting and tasks without suites, as Snakemake plans them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

pytestmark = pytest.mark.pipeline

FORGETTING = """\
forgetting:
  kept: {kind: generated, variant: three-step, seed: 2, rows: 8, scoring: number, max_new_tokens: 12}
  stock: {kind: lm-eval, task: arc_easy, limit: 4}
"""
SUITES = """\
    suites:
      two-step: {kind: generated, variant: two-step, seed: 2, rows: 20, scoring: number, max_new_tokens: 12}
"""


def planned(folder: Path, text: str) -> dict[str, int]:
    """Number of jobs by rule, of a dry run."""
    config = folder / "micro.yaml"
    config.write_text(text, encoding="utf-8")
    command = [
        sys.executable, "-m", "snakemake", "-n", "-s", str(ROOT / "Snakefile"), "--directory", str(folder),
        "--profile", str(ROOT / "profiles" / "default"), "--cores", "1", "--config", f"STUDY={config}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder, check=True)
    counted = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    return {rule: int(number) for rule, number in counted}


def test_every_suite_is_fetched_and_a_task_without_suites_is_not_scored(tmp_path: Path) -> None:
    micro = (ROOT / "tests" / "pipeline" / "micro.yaml").read_text(encoding="utf-8")
    assert SUITES in micro
    jobs = planned(tmp_path, micro + FORGETTING)
    assert (jobs["prefetch_suite"], jobs["train"], jobs["evaluate"]) == (3, 4, 4)
    jobs = planned(tmp_path, micro.replace(SUITES, ""))
    assert (jobs.get("prefetch_suite"), jobs["train"], jobs.get("evaluate"), jobs["page"]) == (None, 4, None, 1)
