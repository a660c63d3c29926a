"""A job's sign says what it does now, costs a short step nothing, and fails no job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import __main__ as door
from harness import progress, sign
from harness.progress import Progress
from harness.sign import sign_of, signing, tell


def said(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sign_of(output).read_text(encoding="utf-8"))
    return found


def test_it_is_there_inside_the_block_alone(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    with signing(output):
        assert said(output)["pid"] == os.getpid()
        tell(phase="load")
        assert said(output)["phase"] == "load"
        tell(phase=None)
        assert "phase" not in said(output)
    assert list(tmp_path.iterdir()) == []
    tell(phase="load")
    assert list(tmp_path.iterdir()) == []


def test_of_two_the_inner_one_is_written(tmp_path: Path) -> None:
    outer, inner = tmp_path / "a.json", tmp_path / "b.json"
    with signing(outer):
        with signing(inner):
            tell(phase="load")
        assert not sign_of(inner).exists()
        assert "phase" not in said(outer)
        tell(phase="eval")
        assert said(outer)["phase"] == "eval"


def test_without_a_folder_there_is_none(tmp_path: Path) -> None:
    with signing(tmp_path / "gone" / "train.json"):
        tell(phase="load")
    assert not (tmp_path / "gone").exists()


def test_a_disk_that_refuses_it_fails_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with signing(tmp_path / "train.json"):
        monkeypatch.setattr(Path, "write_text", full)
        tell(phase="load")


def test_speed_is_that_of_the_last_minute_and_short_steps_write_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [0.0], []
    usual = sign._Sign.write
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sign._Sign, "write", lambda self: (written.append(now[0]), usual(self))[-1])
    output = tmp_path / "train.json"
    with signing(output), Progress(3000, "run", done=10) as work:
        assert (said(output)["done"], said(output)["total"], said(output)["label"]) == (10, 3000, "run")
        for step in range(1000):
            now[0] += 1.0 if step < 100 else 0.25  # a slow beginning is forgotten
            work.advance("loss 1.500", tokens=10)
        found = said(output)
        assert (found["note"], found["unit"]) == ("loss 1.500", "step")
        assert found["unit_s"] == pytest.approx(0.25)
        assert found["tokens_per_s"] == pytest.approx(40)
        assert found["done"] > 1010 - 5 / 0.25
    assert len(written) < 2 + 325 / sign.EVERY_S + 2


def test_the_door_signs_for_every_job_and_takes_it_away_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.stages import train

    output, seen = tmp_path / "train.json", []

    def work(_: object) -> int:
        seen.append(said(output)["pid"])
        raise ValueError("a fault")

    monkeypatch.setattr(train, "output", lambda args: output)
    monkeypatch.setattr(train, "run", work)
    words = ["train", "--spec", "x", "--threads", "1", "--checkpoint-every", "1"]
    assert door.main(words) == 1
    assert seen == [os.getpid()]
    assert list(tmp_path.iterdir()) == []
