"""What each part can do without: the library needs torch alone, and measuring needs no table, figure or workflow."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import efficiency_data as data
import pytest
from bare_machine import modules_beside, without
from harness.__main__ import main
from harness.efficiency.record import CellRecord
from house import ROOT

MEASURING = ("torch", "transformers", "peft", "pydantic", "PyYAML")
"""Of a GPU machine that only measures; `nvidia-ml-py` is missing on purpose."""
PACKAGES = ("step", "measuring", "records", "efficiency", "study", "forecasting")
ARGUMENTS = ("--only", "tiny/lora/lean/4x1024", "--steps", "5", "--repeats", "1", "--warmup", "0", "--cores", "1")


def python(code: str, environment: object, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # type: ignore[call-overload, no-any-return]


LIBRARY = """
import sys
import torch
from torch import nn
from grass import Grass

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

model = Model()
optimizer = Grass(model, lr=1e-2, active_layers=2, sampler="uniform")
model(torch.ones(2, 4)).square().mean().backward()
optimizer.step()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_grass_imports_torch_and_numpy_alone_and_takes_a_step(tmp_path: Path) -> None:
    others = modules_beside(("torch", "numpy"))
    assert {"transformers", "pydantic", "pandas", "matplotlib", "peft", "lm_eval"} <= others
    done = python(LIBRARY, without(others, tmp_path))
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & (others | {"harness", "baselines"})


def test_a_training_process_does_without_scikit_learn() -> None:
    done = python("import sys, harness.training.loop; print(*sys.modules)", dict(os.environ))
    assert "transformers.generation.candidate_generator" in done.stdout.split(), done.stderr
    assert not {"sklearn", "scipy.stats"} & set(done.stdout.split())


def test_what_measures_is_imported_on_a_bare_machine(tmp_path: Path) -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / "workflow" / "harness" / package).glob("*.py"))]
    modules = [f"harness.{path.parent.name}.{path.stem}" for path in files if path.stem != "__init__"]
    others = modules_beside(MEASURING)
    assert {"pandas", "matplotlib", "scipy", "lm_eval", "snakemake", "pynvml", "datasets"} <= others
    code = f"import sys, {', '.join(modules)}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = python(code, without(others, tmp_path))
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & others


def efficiency(folder: Path, *more: str) -> list[str]:
    files = ("--config", str(folder / "efficiency.yaml"), "--published", str(ROOT / "config/published/grass.yaml"))
    return ["efficiency", *files, "--out", str(folder / "out"), *more]


def test_a_bare_machine_measures_keeps_its_records_and_says_where_tables_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.tiny_file(tmp_path)
    words = efficiency(tmp_path, "--device", "cpu", "--budget", "120", *ARGUMENTS)
    environment = without(modules_beside(MEASURING), tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "no tables and figures here (run `python -m harness efficiency --report` where pandas and matplotlib are)"
    assert "2 blocks measured in" in done.stderr
    assert said in done.stderr
    (path,) = (tmp_path / "out" / "records").glob("*--cpu--*.json")
    record = CellRecord.model_validate_json(path.read_bytes())
    assert (record.status, len(record.timing)) == ("ok", 1)
    assert record.predicted is not None
    assert not (tmp_path / "out" / "tables").exists()

    report = subprocess.run(
        [sys.executable, "-m", "harness", *efficiency(tmp_path, "--report")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert report.returncode == 2
    assert report.stderr.startswith("harness efficiency: the package ")
    assert report.stderr.endswith("is not installed: pip install 'grass-bench[bench]'\n")
    assert report.stderr.count("\n") == 1

    # here they are
    before = path.read_bytes()
    assert main(efficiency(tmp_path, "--report")) == 0
    assert "2 figures; all in" in capsys.readouterr().err
    assert (tmp_path / "out" / "tables" / "rehearsal.md").is_file()
    assert path.read_bytes() == before


def test_the_installed_command_is_the_same_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"grass-bench": "harness.__main__:main"}
    assert {requirement.partition(">=")[0] for requirement in project["dependencies"]} == {"torch", "numpy"}
