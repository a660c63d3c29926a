"""Energy by the driver's counter: what it is, and each reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from fake_gpu import FakeCuda, FakeNvml, NVMLError, gpu_meters
from harness.measuring.energy import SHORTEST_S, Joules, together
from harness.measuring.meters import Meters

ME, STRANGER = os.getpid(), 4711
MIG = (("GPU-a", "Card A", ("MIG-1", "MIG-2")),)


@pytest.fixture(autouse=True)
def _one_plain_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def card(*readings: int | Exception, **machine: Any) -> FakeNvml:
    nvml = FakeNvml(**machine)
    nvml.energy = {"GPU-a": iter(readings)}
    return nvml


def spans(nvml: FakeNvml, count: int = 1) -> list[Joules]:
    """What the meters say of as many spans, one after another."""
    meters = gpu_meters(FakeCuda(), nvml)
    found = []
    for _ in range(count):
        meters.start_energy()
        found.append(meters.stop_energy())
    meters.close()
    return found


def test_a_span_is_what_the_counter_moved_in_it_in_joules() -> None:
    # since the driver was loaded, 2**63 mJ are possible; between the spans the counter moves too
    begin = 2**63
    nvml = card(begin, begin + 1500, begin + 9000, begin + 9250)
    assert spans(nvml, 2) == [Joules(1.5), Joules(0.25)]


def test_the_counter_is_that_of_the_card_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    nvml = card(0, 1000, cards=(("GPU-a", "Card A", None), ("GPU-b", "Card B", None)))
    nvml.energy["GPU-b"] = iter([0, 7000])
    assert spans(nvml) == [Joules(7.0)]


def test_a_counter_that_goes_back_costs_its_span_alone() -> None:
    lost, later = spans(card(900_000, 12, 100, 400), 2)
    assert lost == Joules(None, "the card's energy counter went back, as when the driver is loaded anew")
    assert later == Joules(0.3)


def test_a_card_without_the_counter_says_so() -> None:
    (found,) = spans(FakeNvml())
    assert found == Joules(None, "the card's energy counter cannot be read (NVML: Not Supported)")


@pytest.mark.parametrize("readings", [(NVMLError("GPU is lost"), 5, 6, 7), (5, NVMLError("GPU is lost"), 6, 7)])
def test_a_reading_that_fails_leaves_no_half_of_a_span(readings: Sequence[int | Exception]) -> None:
    why = "the card's energy counter cannot be read (NVML: GPU is lost)"
    assert spans(card(*readings), 2) == [Joules(None, why)] * 2


@pytest.mark.parametrize("visible", ["MIG-2", "0"])
def test_a_part_of_a_card_has_no_energy(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (found,) = spans(card(0, 1000, cards=MIG))
    assert found.j is None
    assert "MIG" in str(found.why)


@pytest.mark.parametrize(
    ("mode", "known"),
    [("NONE", True), ("PASSTHROUGH", True), ("VGPU", False), ("HOST_VGPU", False)],
)
def test_a_virtual_card_has_energy_only_if_it_is_a_whole_one(mode: str, known: bool) -> None:
    nvml = card(0, 1000)
    nvml.virtualization = getattr(nvml, f"NVML_GPU_VIRTUALIZATION_MODE_{mode}")
    why = "the GPU is partitioned (vGPU), and its energy counter is of the whole card"
    assert spans(nvml) == [Joules(1.0) if known else Joules(None, why)]


def test_a_stranger_voids_the_energy_and_a_new_measurement_has_its_own() -> None:
    nvml = card(0, 1000, 2000, 3000, processes=[[], [(ME, 9), (STRANGER, 5)], [(ME, 9)]])
    meters = gpu_meters(FakeCuda(), nvml)
    meters.start_energy()
    meters.sample_driver()
    why = "void: another compute process was on the GPU during the run (pid 4711)"
    assert meters.stop_energy() == Joules(None, why)
    assert meters.energy_void_why == why
    meters.restart()
    meters.start_energy()
    meters.sample_driver()
    assert meters.stop_energy() == Joules(1.0)
    assert meters.energy_void_why is None
    meters.close()


def test_where_nobody_looks_for_strangers_any_more_there_is_no_energy() -> None:
    nvml = card(0, 1000)
    meters = gpu_meters(FakeCuda(), nvml)

    def lost(handle: str, version: int | None = None) -> Any:
        raise NVMLError("GPU is lost")

    meters.start_energy()
    nvml.nvmlDeviceGetMemoryInfo = lost  # type: ignore[method-assign]
    meters.sample_driver()
    assert meters.stop_energy() == Joules(None, "NVML failed during the run: GPU is lost")
    meters.close()


def test_without_a_gpu_there_is_a_reason() -> None:
    meters = Meters("cpu")
    meters.start_energy()
    assert meters.stop_energy() == Joules(None, "the run was on the CPU")


def test_a_span_too_short_for_the_counter_has_no_energy() -> None:
    assert Joules(3.0).over(SHORTEST_S) == Joules(3.0)
    why = f"1.99 s were measured, and the card's energy counter needs {SHORTEST_S:g} s"
    assert Joules(3.0).over(1.99) == Joules(None, why)
    # null, never 0
    assert Joules(0.0).over(9.0) == Joules(None, "the card's energy counter stood still for 9.00 s")
    assert Joules(None, "no card").over(0.0) == Joules(None, "no card")


def test_several_cards_are_their_sum_or_unknown() -> None:
    assert together([Joules(1.5), Joules(2.0), Joules(0.0)]) == Joules(3.5)
    assert together([Joules(1.5), Joules(None, "first"), Joules(None, "second")]) == Joules(None, "first")
