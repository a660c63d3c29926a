"""Which devices there are: as NVML or nvidia-smi lists them, and as CUDA_VISIBLE_DEVICES lets them through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_gpu import PARTS, A, B, FakeNvml
from harness.measuring.gpu import (
    Device,
    NoGpuError,
    devices_by_nvml,
    devices_by_smi,
    list_devices,
    visible_devices,
)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, *PARTS]),
        ("1", [B]),
        ("1,0", [B, A]),
        (" 0 , 1 ", [A, B]),
        ("GPU-bb", [B]),
        ("GPU-b", [B]),  # CUDA takes the beginning of a UUID
        ("GPU-bb,0", [B, A]),
        ("MIG-2", [PARTS[1]]),
        ("2", PARTS),
        ("GPU-cc", PARTS),
        ("0,-1,1", [A]),  # as in CUDA: nothing after a negative number
        ("1,1", [B]),
    ],
)
def test_devices_are_those_that_cuda_would_see(visible: str | None, expected: list[Device]) -> None:
    assert visible_devices([A, B, *PARTS], visible) == expected


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_a_variable_that_hides_every_gpu_is_one_clear_error(visible: str) -> None:
    with pytest.raises(NoGpuError, match="hides every GPU: unset it, or set device: cpu"):
        visible_devices([A], visible)


def test_a_gpu_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(NoGpuError, match=r"names 7, and there is no such GPU here; there are: 0 = GPU-aa, 1 = GPU-bb"):
        visible_devices([A, B], "0,7")


def test_no_gpu_is_one_clear_error() -> None:
    with pytest.raises(NoGpuError, match="no GPU was found on this machine: set device: cpu in the recipe"):
        visible_devices([], None)


def test_nvml_lists_gpus_the_parts_of_divided_ones_and_not_those_of_other_jobs() -> None:
    cards = (
        ("GPU-x", "Card X", None),
        ("GPU-aa", "Card A", None),
        ("GPU-cc", "Card C", ("MIG-1", "MIG-2")),
        ("GPU-dd", "Card D", ()),
    )
    nvml = FakeNvml(cards=cards)
    nvml.closed_cards = {0}
    parts = [Device(1, part.uuid, part.name, part.gpu_uuid) for part in PARTS]
    assert devices_by_nvml(nvml) == [A, *parts]


SMI = """GPU 0: Card A (UUID: GPU-aa)
GPU 1: Card B (UUID: GPU-bb)
GPU 2: Card C (UUID: GPU-cc)
  MIG 1g.5gb      Device  0: (UUID: MIG-1)
  MIG 2g.10gb     Device  1: (UUID: MIG-2)
"""


def test_nvidia_smi_lists_the_same() -> None:
    assert devices_by_smi(SMI) == [A, B, *PARTS]
    assert devices_by_smi("") == []


def test_nvidia_smi_is_asked_where_nvml_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoGpuError, match="there is no nvidia-smi; install the driver"):
        list_devices()
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && /bin/cat <<'EOF'\n{SMI}EOF\n")
    program.chmod(0o700)
    assert list_devices() == [A, B, *PARTS]
    program.write_text("#!/bin/sh\necho no devices >&2\nexit 9\n")
    with pytest.raises(NoGpuError, match="nvidia-smi 'no devices'; check the driver"):
        list_devices()


def test_nvml_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(cards=(("GPU-aa", "Card A", None),)))
    assert list_devices() == [A]
