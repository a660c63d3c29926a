"""Every published table compiles, with booktabs and graphicx alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from house import ROOT

TABLES = sorted(ROOT.glob("results/published/*/tables/*.tex"))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (a TeX distribution)")
def test_tables_compile(tmp_path: Path) -> None:
    assert len(TABLES) > 30
    inputs = "\n".join(f"\\input{{{table}}}\\clearpage" for table in TABLES)
    (tmp_path / "all.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs,graphicx}}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if line.startswith("!")]
    log = (tmp_path / "all.log").read_text(encoding="latin-1")
    assert "Missing character" not in log
    assert f"({len(TABLES)} pages" in log.replace("\n", "")
