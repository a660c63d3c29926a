"""One block of one cell, in this process on a CPU: every outcome but a crash, and what is kept of a forecast."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import efficiency_data as data
import harness.measuring.meters
import pytest
import torch
from harness.efficiency.forecasts import make_forecast
from harness.efficiency.jobs import Reply
from harness.efficiency.measure import execute
from harness.efficiency.plan import Entry, plan
from harness.efficiency.spec import load_efficiency
from harness.efficiency.store import Store
from harness.measuring.host import proportional_set
from harness.measuring.meters import Meters
from harness.records.measured import largest
from harness.step.outcomes import is_out_of_memory, requested_bytes

from baselines.lora import Lora

OUT = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 3 MiB is free."


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    return data.tiny_entries(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def meters() -> Meters:
    return Meters("cpu")


# ---------------------------------------------------------------- outcomes


def test_on_a_cpu_device_memory_is_null_with_the_reason(entries: dict[str, Entry], meters: Meters) -> None:
    reply = execute(data.job(entries["grass-decoder"]), meters)
    assert reply.status == "ok"
    assert reply.memory is not None
    assert reply.memory.allocated_peak_bytes is reply.memory.nvml_process_peak_bytes is None
    assert set(reply.memory.device_allocated_peak_bytes.values()) == {None}
    assert reply.memory.device_why == reply.memory.nvml_why == "the run was on the CPU"
    assert reply.parameters == 35104


def test_a_record_has_what_the_host_held(
    entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSS is at most the resident set; nothing is pinned on a CPU, and LoRA cannot say."""
    monkeypatch.setattr(harness.measuring.meters, "proportional_set", proportional_set)  # other tests do without
    block, lora = (execute(data.job(entries[method]), meters).memory for method in ("grass-decoder", "lora"))
    assert block is not None
    shared, resident = largest(block.host_pss_bytes), largest(block.host_peak_bytes)
    assert shared is not None
    assert resident is not None
    assert 10 * 2**20 < shared <= resident
    assert (block.cgroup_peak_bytes is None) == (block.cgroup_peak_why is not None)
    assert (block.method_pinned_peak_bytes, block.method_pinned_why) == (0, None)
    assert (block.torch_pinned_peak_bytes, block.torch_pinned_why) == (None, "the run was on the CPU")
    assert lora is not None
    assert (lora.method_pinned_peak_bytes, lora.method_pinned_why) == (None, "the method did not say")


def test_a_cell_that_a_method_refuses_is_skipped_with_its_reason(meters: Meters, tmp_path: Path) -> None:
    study = load_efficiency(data.tiny_file(tmp_path, ("active_layers: 2", "active_layers: 9")))
    (group,) = plan(study, "cpu", ["tiny/grass-decoder/lean/4x1024"])
    reply = execute(data.job(group.entries[0]), meters)
    assert (reply.status, reply.why) == ("skipped", "active_layers 9 is above the model's 4 layers")
    assert reply.clean


@pytest.mark.parametrize(
    ("phase", "place"), [("load", "attach"), ("backward", "backward"), ("update", "end_step"), ("probe", "prepare")]
)
def test_out_of_memory_is_an_answer_with_phase_and_bytes(
    entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch, phase: str, place: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(OUT)

    monkeypatch.setattr(Lora, place, fail)
    reply = execute(data.job(entries["lora"]), meters)
    assert reply.status == "oom"
    assert reply.oom is not None
    assert (reply.oom.block, reply.oom.phase, reply.oom.requested_bytes) == ("memory", phase, 20 * 2**20)
    assert reply.why is not None
    assert reply.why.startswith(f"in phase {phase}: CUDA out of memory")


def test_out_of_memory_while_steps_are_timed_names_that_block(
    entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123456 bytes.")

    monkeypatch.setattr(Lora, "end_step", fail)
    reply = execute(data.job(entries["lora"], "timing"), meters)
    assert reply.oom is not None
    assert (reply.oom.block, reply.oom.phase, reply.oom.requested_bytes) == ("timing", "update", 123456)


def test_a_bad_program_raises(entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(Lora, "end_step", fail)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        execute(data.job(entries["lora"]), meters)


def test_somebody_else_on_the_gpu_voids_the_block(
    entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meters, "foreign_why", "another process (pid 7)")
    reply = execute(data.job(entries["lora"]), meters)
    assert (reply.status, reply.memory, reply.why) == ("ok", None, "void: another process (pid 7)")


def test_memory_that_does_not_come_back_ends_the_process(
    entries: dict[str, Entry], meters: Meters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meters, "clean", lambda self: False)
    assert not execute(data.job(entries["lora"]), meters).clean


@pytest.mark.parametrize(
    ("message", "nbytes"),
    [
        (OUT, 20 * 2**20),
        ("CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; ...)", 3 * 2**29),
        ("you tried to allocate 40000000000 bytes. Error code 12", 40_000_000_000),
        ("CUDA error: out of memory", None),
    ],
)
def test_bytes_are_read_from_an_allocators_message(message: str, nbytes: int | None) -> None:
    assert requested_bytes(message) == nbytes


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# ---------------------------------------------------------------- what is kept


def test_a_forecast_is_kept_with_what_it_is_of(entries: dict[str, Entry], tmp_path: Path) -> None:
    entry, store = entries["grass-decoder"], Store(tmp_path)
    record = make_forecast(data.job(entry, "forecast")).forecast
    assert record is not None
    assert record.peak_bytes is not None
    assert record.by_kind_bytes is not None
    assert record.by_phase_bytes is not None
    assert record.peak_bytes == sum(record.by_kind_bytes.values())
    assert record.peak_bytes == max(peak for phase, peak in record.by_phase_bytes.items() if phase != "load")
    assert record.by_kind_bytes["weights"] >= 2 * 35104
    assert record.packages["torch"] == importlib.metadata.version("torch")
    store.keep(record)
    assert store.forecast(entry) == record
    assert store.forecast(entries["lora"]) is None


def test_a_reply_survives_its_journey(entries: dict[str, Entry], meters: Meters) -> None:
    reply = execute(data.job(entries["lora"], "timing"), meters)
    assert Reply.model_validate_json(reply.model_dump_json()) == reply
