"""Memory that really runs out, in a process with a limit of its own, is a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.checking.tiny import tiny_inputs

PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from harness.checking.tiny import tiny_training
from harness.records.atomic import write_record
from harness.study.spec import Observation
from harness.training.loading import Inputs
from harness.training.loop import train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
recipe = {"batch_size": 4096, "micro_batch_size": 4096, "steps": 3, "warmup_steps": 0}

from baselines.full import Full
begin = Full.begin_step
def limited(self, step):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + 256 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    begin(self, step)
Full.begin_step = limited
record = train(
    tiny_training("full", {}, **recipe), name="big", lr=1e-3, lr_searched=False, seed=0,
    inputs=Inputs(model=folder / "model", rows=folder / "rows"), folder=folder / "run",
    state_folder=folder / "state", observation=None,
)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write_record(folder / "run" / "train.json", record)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")
def test_memory_that_really_runs_out_is_an_oom_record(tmp_path: Path) -> None:
    tiny_inputs(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "train.json").read_text(encoding="utf-8"))
    assert record["status"] == "oom"
    assert record["status_why"].startswith("in phase ")
    assert "can't allocate memory" in record["status_why"], record["status_why"]
