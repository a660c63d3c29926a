"""The command itself, on the tiny model and a CPU: what it imports, writes, says, and takes up after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import efficiency_data as data
import pytest
from harness.__main__ import main
from harness.efficiency.plan import plan
from harness.efficiency.record import CellRecord
from harness.efficiency.spec import load_efficiency
from harness.efficiency.store import Store

FORBIDDEN = ("lm_eval", "datasets", "snakemake")
"""A machine that only measures may lack them."""
_BLOCK = f"""\
import importlib.util, sys

def is_missing(name):
    return name.partition(".")[0] in {FORBIDDEN!r}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if is_missing(name):
            raise ModuleNotFoundError(f"{{name}} is not to be imported here", name=name)

sys.meta_path.insert(0, Blocker())
# libraries ask this whether a package is there, and are told that it is not
really = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_missing(name) else really(name, package)
"""


def command(folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "harness", "efficiency", "--device", "cpu", "--out", str(folder / "out")),
        *("--config", str(folder / "efficiency.yaml"), "--published", str(data.ROOT / "config/published/grass.yaml")),
        *("--only", "tiny/lora/lean/4x1024", "--only", "tiny/grass-decoder/lean/4x1024"),
        *("--steps", "5", "--repeats", "2", "--warmup", "0", "--cores", "1"),
        *more,
    ]


def environment(folder: Path) -> dict[str, str]:
    """Packages as on a machine that only measures: every Python process here, workers too, is without the others."""
    (folder / "sitecustomize.py").write_text(_BLOCK, encoding="utf-8")
    path = [str(folder), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def records(folder: Path) -> dict[str, CellRecord]:
    paths = (folder / "out" / "records").glob("*--cpu--*.json")
    found = [CellRecord.model_validate_json(path.read_bytes()) for path in paths]
    return {record.cell.label: record for record in found}


def test_a_killed_run_loses_the_block_in_progress_and_the_next_one_finishes(tmp_path: Path) -> None:
    """SIGKILL in the middle; then the rest, and all tables beside forecasts of before, with packages blocked."""
    study = load_efficiency(data.tiny_file(tmp_path))
    for group in plan(study, "cpu", ["tiny/lora/lean/4x1024", "tiny/grass-decoder/lean/4x1024"]):
        for entry in group.entries:
            Store(tmp_path / "out").keep(data.forecast_record(entry, 1.0))
    env = environment(tmp_path)
    first = subprocess.Popen(command(tmp_path), env=env, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    lines = [first.stderr.readline() for _ in range(3)]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stderr.close()
    assert "tiny/lora/lean/4x1024, memory: no device memory (the run was on the CPU)" in lines[0], lines
    time.sleep(0.2)
    before = records(tmp_path)
    blocks = sum((r.memory is not None) + len(r.timing) for r in before.values())
    assert 3 <= blocks < 6
    assert not list((tmp_path / "out" / "records").glob(".*.part"))

    second = subprocess.run(command(tmp_path), env=env, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stderr
    found = re.search(r"(\d+) blocks measured in \d+ s, (\d+) needed none, 0 not measured", second.stderr)
    assert found is not None
    # these are real times: where they differ, both cells are timed again, twice at most
    further = int(found[1]) - (6 - blocks)
    assert further in (0, 2, 4)
    assert int(found[2]) == blocks
    after = records(tmp_path)
    assert after.keys() == {"lora", "grass-decoder"}
    for label, record in before.items():
        assert after[label].memory == record.memory
        assert after[label].timing[: len(record.timing)] == record.timing
    for record in after.values():
        assert (record.status, record.device.kind, len(record.timing)) == ("ok", "cpu", 2 + further // 2)
        assert record.memory is not None
        assert record.memory.allocated_peak_bytes is None
        assert record.predicted is not None
        assert record.predicted.allocated_peak_bytes == data.GIB
        assert record.predicted.relative_error_why == "no device memory was measured"
        assert {"torch", "transformers", "peft"} <= record.provenance.packages.keys()
    _check_report(tmp_path / "out")


def _check_report(out: Path) -> None:
    """A rehearsal has forecasts, a table of its own, and no figure of a GPU anywhere."""
    assert {p.stem for p in (out / "tables").glob("*.csv")} == {
        "memory", "throughput", "offload", "targets", "published", "rehearsal",
    }  # fmt: skip
    assert (out / "tables" / "throughput.csv").read_text(encoding="utf-8").strip() == ""
    assert "not measured on a GPU" in (out / "tables" / "throughput.md").read_text(encoding="utf-8")
    assert {p.stem for p in (out / "figures").iterdir()} == {"memory--tiny", "speed-and-memory--tiny"}
    assert "forecast, not measured on a GPU" in (out / "figures" / "memory--tiny.svg").read_text(encoding="utf-8")
    coverage = json.loads((out / "coverage.json").read_text(encoding="utf-8"))
    assert (coverage["device"], coverage["not_measured"], coverage["errors"]) == ("cpu", [], [])
    for path in out.rglob("*"):
        if path.suffix in (".json", ".md", ".csv", ".svg"):
            assert str(out.parent) not in path.read_text(encoding="utf-8"), path


def test_no_torch_is_imported_before_the_device_is_leased(tmp_path: Path) -> None:
    """Without a budget the command only reports, with no worker: whatever it imports, it imports itself."""
    data.tiny_file(tmp_path)
    arguments = command(tmp_path, "--budget", "1")[3:]
    code = (
        f"import sys; from harness.__main__ import main; code = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'peft', 'lm_eval', 'datasets', 'snakemake'} & set(sys.modules); "
        "sys.exit(f'{code}, imported {heavy}' if code or heavy else 0)"
    )
    env = environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "0 blocks measured" in done.stderr
    assert "not measured: tiny" not in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--steps", "7"], "--steps 7: a multiple of 5 of at least 5 is wanted"),
        (["--warmup", "3"], "--warmup 3: a multiple of 5 of at least 0 is wanted"),
        (["--repeats", "0"], "--repeats 0: a whole number of at least 1 is wanted"),
        (["--budget", "0"], "--budget 0: a number of seconds above 0 is wanted"),
        (["--budget", "-1"], "--budget -1: a number of seconds above 0 is wanted"),
        (["--only", "tiny/galore"], "--only tiny/galore: no cell is called so; they are called like tiny/lora/lean/4"),
        (["--only", "tny/*/*/*"], "--only tny/*/*/*: there is no model tny; it is one of tiny"),
        (["--only", "tiny/galore/*/*"], "--only tiny/galore/*/*: there is no method galore; it is one of lora, grass"),
        (["--only", "*/*/slow/*"], "--only */*/slow/*: there is no settings slow; it is one of lean"),
        (["--out", "/dev/null/out"], "--out /dev/null/out: nothing can be written there (Not a directory)"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.tiny_file(tmp_path)
    assert main([*command(tmp_path)[3:], *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_machine_without_a_gpu_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("harness.measuring.gpu.list_devices", list)
    data.tiny_file(tmp_path)
    monkeypatch.setattr("harness.measuring.gpu.cuda_is_initialised", lambda: False)
    arguments = [word for word in command(tmp_path)[3:] if word not in ("--device", "cpu")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "no GPU was found on this machine" in said
    assert "--forecast" in said
