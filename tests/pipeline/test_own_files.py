"""A user's files are known by their content: neither a newer date nor another folder makes a job run again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

pytestmark = pytest.mark.pipeline

GENERATED = {
    "{kind: generated, family: arithmetic, seed: 1, train_rows: 96, validation_rows: 24}": (
        '{kind: files, paths: ["${SUMS}/train.jsonl"], seed: 1, train_rows: 8, validation_rows: 4}'
    ),
    "{kind: generated, variant: two-step, seed: 2, rows: 20, scoring: number, max_new_tokens: 12}": (
        '{kind: files, path: "${SUMS}/test.jsonl", scoring: number, max_new_tokens: 12}'
    ),
}


def data(folder: Path, *, first: int = 0) -> Path:
    folder.mkdir()
    rows = [{"instruction": f"{n} + 1?", "output": str(n + 1), "answer": str(n + 1)} for n in range(first, first + 16)]
    for name, some in (("train", rows[:12]), ("test", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def made(folder: Path, sums: Path, *words: str) -> list[str]:
    """Rules that have a job, where nothing but rows and suite is to be made, from the files in `sums`."""
    command = [
        sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder), "--cores", "1",
        "--profile", str(ROOT / "profiles" / "default"), "--config", f"STUDY={folder / 'own.yaml'}", f"SUMS={sums}",
        "--until", "prefetch_rows", "prefetch_suite",
    ]  # fmt: skip
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=400, cwd=folder, check=True)
    return sorted(set(re.findall(r"^(prefetch_\w+) +1$", done.stdout + done.stderr, re.MULTILINE)))


def test_only_other_content_makes_rows_and_suites_anew(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "pipeline" / "micro.yaml").read_text(encoding="utf-8")
    for generated, own in GENERATED.items():
        assert text.count(generated) == 1
        text = text.replace(generated, own)
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    assert made(tmp_path, data(tmp_path / "here")) == ["prefetch_rows", "prefetch_suite"]
    moved = data(tmp_path / "there")
    for file in moved.iterdir():
        os.utime(file, (4e9, 4e9))
    assert made(tmp_path, moved) == []
    assert made(tmp_path, data(tmp_path / "changed", first=50), "-n") == ["prefetch_rows", "prefetch_suite"]
