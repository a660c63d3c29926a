"""What a run writes down of a method's beliefs, and what the study's tables read of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.records.reading import read_jsonl
from harness.reporting.frames import rows_to_frame
from harness.reporting.record_rows import believed_rows
from harness.training.logs import Log

from baselines.method import LayerTrace


def test_beliefs_show_the_temperature_in_use_and_the_layers_it_makes_effective(tmp_path: Path) -> None:
    log = Log()
    log.belief(0, LayerTrace(active=(1,), importance=(1.0, 3.0), probability=(0.5, 0.5), temperature=0.4))
    log.belief(5, LayerTrace(active=(0,), importance=(1.0, 2.0), probability=(0.0, 1.0), temperature=None))
    log.belief(9, LayerTrace(active=(1,)))
    log.write(tmp_path, [])
    rows = read_jsonl(tmp_path / "believed.jsonl")
    assert [row["temperature"] for row in rows] == [0.4, None, None]
    assert [row["effective_layers"] for row in rows] == [pytest.approx(2.0), pytest.approx(1.0), None]

    frame = rows_to_frame("believed", [layer for row in rows for layer in believed_rows("run", row)])
    assert frame[frame["step"] == 0]["temperature"].tolist() == [0.4, 0.4]
    assert frame[frame["step"] > 0]["temperature"].isna().all()


def test_beliefs_of_runs_made_before_temperatures_were_logged_are_read() -> None:
    log = Log()
    log.belief(0, LayerTrace(active=(1,), importance=(1.0, 3.0), probability=(0.5, 0.5)))
    old = {key: log.believed[0][key] for key in ("step", "active", "importance", "probability", "age_steps")}
    assert rows_to_frame("believed", believed_rows("run", old))["temperature"].isna().all()
