"""The tables of test items among the training rows, recomputed from the rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reporting_data as data
from harness.reporting.frames import Frames
from harness.reporting.overlap_tables import overlap_tables


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


def test_how_many_items_occur_in_the_training_rows(frames: Frames) -> None:
    counted, _ = overlap_tables(frames, data.study())
    rows = {row["suite"]: row for row in counted.display.to_dict("records")}
    assert rows["two-step"]["exact"] == f"4 ({100 * 4 / data.DOCUMENTS:.1f} %)"
    assert rows["three-step"]["numbers masked"] == "0 (0.0 %)"
    assert rows["held-out"]["13-gram"] == "0 (0.0 %)"


def test_accuracy_with_and_without_them(frames: Frames) -> None:
    _, clean = overlap_tables(frames, data.study())
    assert set(clean.raw["suite"]) == {"two-step"}, "the others share nothing"
    ok = frames.ok_runs()
    for method in ("base", "grass", "lisa"):
        runs = ok.loc[(ok["method"] == method) & (ok["task"] == "arithmetic"), "run"]
        mine = frames.documents[frames.documents["run"].isin(runs) & (frames.documents["suite"] == "two-step")]
        row = clean.raw[clean.raw["method"] == method].iloc[0]
        for column, part in (
            ("accuracy_all", mine),
            ("accuracy_without", mine[mine["document"] > 3]),
            ("accuracy_of_shared", mine[mine["document"] <= 3]),
        ):
            assert row[column] == pytest.approx(part.groupby("run")["correct"].mean().mean())
        assert (row["items_left"], row["ok_runs"]) == (data.DOCUMENTS - 4, len(runs))


def test_where_nothing_is_shared_or_known_nothing_is_said(frames: Frames) -> None:
    clean = replace(frames, overlapping=frames.overlapping.iloc[:0])
    assert [table.name for table in overlap_tables(clean, data.study())] == ["contamination"]
    assert overlap_tables(replace(clean, overlaps=frames.overlaps.iloc[:0]), data.study()) == []
