"""One job per GPU: leases held by real processes, and taken by every stage that computes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_gpu import PARTS, A, B
from harness.checking.tiny import tiny_training
from harness.measuring import gpu
from harness.measuring.gpu import (
    VISIBLE,
    Device,
    NoGpuError,
    gpu_lease,
    lease_for,
    lock_folder,
)
from harness.records.atomic import write_json
from harness.records.locks import try_lock
from harness.records.provenance import provenance
from harness.records.run import TrainRecord
from harness.study.jobs import RunJob, SearchJob
from harness.study.spec import Observation, Search

JOB = """
import json, os, sys
from pathlib import Path
from harness.measuring.gpu import Device, gpu_lease
devices = [Device(*fields) for fields in json.loads(sys.argv[1])]
say = lambda line: print("told:", line, flush=True)
with gpu_lease(lister=lambda: devices, folder=Path(sys.argv[2]), tell=say, poll_s=0.02) as device:
    print("holds", device.uuid, os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules, flush=True)
    sys.stdin.readline()
print("over", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""


class Job:
    """A process that takes a lease and holds it until it is told to end."""

    def __init__(self, devices: list[Device], folder: Path) -> None:
        fields = json.dumps([[d.index, d.uuid, d.name, d.gpu_uuid] for d in devices])
        environment = {key: value for key, value in os.environ.items() if key != VISIBLE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, fields, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def says(self) -> str:
        return self._lines.get(timeout=30)

    def is_silent(self) -> bool:
        try:
            self._lines.get(timeout=0.3)
        except queue.Empty:
            return True
        return False

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[Device]], Job]]:
    jobs: list[Job] = []

    def begin(devices: list[Device]) -> Job:
        jobs.append(Job(devices, tmp_path))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


# ---------------------------------------------------------------- real processes


def test_two_jobs_get_two_gpus_and_a_third_waits_and_gets_the_first_that_is_free(
    start: Callable[[list[Device]], Job],
) -> None:
    first = start([A, B])
    assert first.says() == "holds GPU-aa GPU-aa False", "CUDA_VISIBLE_DEVICES is set while torch is not imported"
    second = start([A, B])
    assert second.says() == "holds GPU-bb GPU-bb False"
    third = start([A, B])
    message = third.says()
    assert message.startswith("told: waiting for a GPU: GPU 0 (Card A) is held by process ")
    for job, name in ((first, "GPU 0 (Card A)"), (second, "GPU 1 (Card B)")):
        assert f"{name} is held by process {job.process.pid} since " in message
    assert f"({Path(sys.executable).name} -c" in message, "the holder's command"
    assert third.is_silent(), "it says so once"
    second.end()
    assert second.says() == "over None"
    assert third.says().startswith("told: GPU 1 (Card B) is free after ")
    assert third.says() == "holds GPU-bb GPU-bb False"


def test_a_killed_jobs_gpu_is_free_at_once(start: Callable[[list[Device]], Job]) -> None:
    first = start([A])
    first.says()
    second = start([A])
    assert "waiting" in second.says()
    first.kill()
    assert second.says().startswith("told: GPU 0 (Card A) is free")
    assert second.says() == "holds GPU-aa GPU-aa False"


def test_jobs_with_different_gpus_to_see_do_not_wait_for_one_another(start: Callable[[list[Device]], Job]) -> None:
    assert start([A]).says() == "holds GPU-aa GPU-aa False"
    assert start([B]).says() == "holds GPU-bb GPU-bb False"


# ---------------------------------------------------------------- in this process


@pytest.fixture
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.mark.parametrize("given", [None, "1", "GPU-b,GPU-a"])
def test_the_users_own_choice_is_kept_and_comes_back(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VISIBLE, given)
    with gpu_lease(lister=lambda: [A, B], folder=tmp_path) as device:
        assert device == (A if given is None else B)
        assert os.environ[VISIBLE] == device.uuid
    assert os.environ.get(VISIBLE) == given


@pytest.mark.usefixtures("_no_variable")
def test_a_process_that_already_computes_on_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="take the GPU lease before torch is used"), gpu_lease(lister=lambda: [A]):
        pass


@pytest.mark.usefixtures("_no_variable")
def test_a_second_lease_in_one_process_is_refused_instead_of_waiting_for_itself(tmp_path: Path) -> None:
    with (
        gpu_lease(lister=lambda: [A, B], folder=tmp_path),
        pytest.raises(RuntimeError, match=r"this process holds GPU 0 \(Card A\) already"),
        gpu_lease(lister=lambda: [A, B], folder=tmp_path),
    ):
        pass


@pytest.mark.usefixtures("_no_variable")
def test_once_cuda_is_in_use_the_lease_lasts_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[list[Device]], Job]
) -> None:
    with gpu_lease(lister=lambda: [A], folder=tmp_path):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert os.environ.pop(VISIBLE) == A.uuid
    assert "waiting" in start([A]).says(), "the context is still on the card"


@pytest.mark.usefixtures("_no_variable")
def test_a_run_on_several_gpus_holds_all_of_them(tmp_path: Path) -> None:
    with gpu_lease(count=2, lister=lambda: [A, B, *PARTS], folder=tmp_path) as first:
        assert (first, os.environ[VISIBLE]) == (A, "GPU-aa,GPU-bb")
        with pytest.raises(RuntimeError, match="this process holds GPU 0"):
            gpu._wait([A, B], 1, tmp_path, lambda line: None, 0.01)
    assert VISIBLE not in os.environ
    assert len(gpu._wait([A, B], 2, tmp_path, lambda line: None, 0.01)) == 2, "both are free again"


@pytest.mark.usefixtures("_no_variable")
def test_fewer_gpus_than_asked_for_are_refused_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(NoGpuError, match=r"^gpus: 3 are asked for, and 2 can be seen here: ask for 2$"),
        gpu_lease(count=3, lister=lambda: [A, B], folder=tmp_path),
    ):
        pass


@pytest.mark.usefixtures("_no_variable")
def test_who_waits_for_two_gpus_holds_none(tmp_path: Path, start: Callable[[list[Device]], Job]) -> None:
    class ToldError(Exception):
        pass

    def told(line: str) -> None:
        free = try_lock(gpu._lock_file(tmp_path, B))
        assert free is not None
        os.close(free)
        raise ToldError(line)

    assert "holds GPU-aa" in start([A]).says()
    with pytest.raises(ToldError, match=r"^waiting for 2 GPUs: GPU 0 \(Card A\) is held by process \d+ since [^;]*$"):
        gpu._wait([A, B], 2, tmp_path, told, 0.01)


def test_on_the_cpu_nothing_is_leased_and_nothing_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> list[Device]:
        raise AssertionError("devices were listed")

    monkeypatch.setattr(gpu, "list_devices", looked)
    with lease_for("cpu") as device:
        assert device is None


def test_locks_lie_in_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert lock_folder() == tmp_path / "grass-gpus"
    assert lock_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path))
    assert lock_folder() == tmp_path / f"grass-gpus-{os.getuid()}"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(NoGpuError, match="is not yours"):
        lock_folder()


# ---------------------------------------------------------------- the stages

STAGES = """
import json, sys
from harness.measuring import gpu
def leased(device, *, count=1):
    print(device, "torch" in sys.modules)
    raise SystemExit
gpu.lease_for = leased
from harness.__main__ import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit:
        pass
"""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_stage_that_computes_takes_its_lease_before_torch_is_imported(device: str, tmp_path: Path) -> None:
    training = tiny_training("full", {}, device=device)
    search = Search(grid=(1e-4, 1e-3, 1e-2), seeds=(7,), max_extensions=0)
    run = RunJob(training=training, lr=1e-3, search=None, seed=0, observation=Observation(every_steps=4, rows=8))
    specs = {}
    for stage, job in (("train", run), ("search", SearchJob(training=training, search=search))):
        specs[stage] = tmp_path / job.name / "spec.json"
        write_json(specs[stage], job.body())
    threads = ["--threads", "1"]
    commands = [
        ["train", "--spec", str(specs["train"]), *threads, "--checkpoint-every", "9"],
        ["search", "--spec", str(specs["search"]), "--checkpoint-every", "1", *threads],
    ]
    for name, checkpoint in (("scored", "model"), ("skipped", None)):
        record = TrainRecord(
            name="r", status="ok", model="m", task="t", method="full", module="full", options={}, seed=0,
            recipe=training.recipe.model_dump(mode="json"), recipe_changes=[], lr=None, lr_searched=False,
            steps_done=0, checkpoint=checkpoint, parameters=None, provenance=provenance(roots=(), inputs={}),
        )  # fmt: skip
        write_json(tmp_path / name / "train.json", record.model_dump(mode="json"))
        evaluate = ["evaluate", "--spec", "x", "--run", str(tmp_path / name), "--out", "x", *threads]
        commands.append([*evaluate, "--batch-size", "1"])
    found = subprocess.run([sys.executable, "-c", STAGES, json.dumps(commands)], capture_output=True, text=True)
    # a run without a checkpoint needs no GPU to be skipped
    expected = [f"{device} False"] * 3 + ["cpu False"]
    assert found.stdout.splitlines() == expected, found.stderr


def test_no_gpu_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunJob(
        training=tiny_training("full", {}, device="cuda"), lr=1e-3, search=None, seed=0,
        observation=Observation(every_steps=4, rows=8),
    )  # fmt: skip
    spec = tmp_path / run.name / "spec.json"
    write_json(spec, run.body())
    arguments = ["train", "--spec", str(spec), "--threads", "1", "--checkpoint-every", "9"]
    environment = {**os.environ, VISIBLE: ""}
    found = subprocess.run(
        [sys.executable, "-m", "harness", *arguments], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "GPU" in found.stderr


def test_a_device_is_named_as_people_do() -> None:
    assert str(A) == "GPU 0 (Card A)"
    with pytest.raises(AttributeError):
        A.index = 3  # type: ignore[misc]


def test_a_holder_that_has_not_written_its_name_yet_is_still_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.delenv(VISIBLE, raising=False)
    other = (tmp_path / f"{A.uuid}.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        other.close()

    with gpu_lease(lister=lambda: [A], folder=tmp_path, tell=tell, poll_s=0.01) as device:
        assert device == A
    assert told[0] == "waiting for a GPU: GPU 0 (Card A) is held"
    assert told[1].startswith("GPU 0 (Card A) is free after ")
