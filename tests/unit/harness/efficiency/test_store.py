"""Records of cells on disk: nothing is overwritten, and today's question finds its newest answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import efficiency_data as data
import pytest
from harness.efficiency.jobs import Reply
from harness.efficiency.plan import Entry, Unit
from harness.efficiency.record import CellRecord, ForecastRecord
from harness.efficiency.store import MeasureOptions, Store, file_name, is_stale
from harness.errors import UserError
from house import ROOT

ASKED = MeasureOptions(device="cpu", warmup_steps=5, timed_steps=10, repeats=2)
HERE = data.device_record("cpu", "cpu")


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return data.tiny_entries(tmp_path)["lora"]


def files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store.folder / "records").glob("*")}


def measure(
    store: Store, of: Entry, asked: MeasureOptions = ASKED, card: str = "cpu", speed: float = 1000.0
) -> CellRecord:
    reply = Reply(status="ok", timing=data.timing_block(0, speed), parameters=10, trainable_parameters=5)
    return store.add(Unit(of, "timing", 0), reply, asked, data.device_record("cpu", card))


def dated(record: CellRecord, started: str, **changes: object) -> CellRecord:
    origin = record.provenance.model_copy(update={"started_utc": started})
    return record.model_copy(update={"provenance": origin, **changes})


def test_a_record_is_named_by_labels_question_card_and_code(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = measure(store, entry, card="Some GPU (80 GB)")
    (name,) = files(store)
    assert name == (
        f"tiny--lean--4x1024--lora--{ASKED.sha256(entry)[:8]}--some-gpu-80-gb--{record.code_sha256[:8]}.json"
    )
    assert record.code_sha256 == record.provenance.source_sha256
    assert "baselines.lora" in record.provenance.sources
    forecast = data.forecast_record(entry, 1.0)
    assert file_name(forecast).split("--")[-2] == "forecast"


def test_nothing_is_overwritten_by_another_card_repeats_options_or_code(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    first = measure(store, entry)
    edited = replace(entry, cell=entry.cell.with_options(rank=8))
    more_repeats = replace(ASKED, repeats=5)
    kept = files(store)
    for number, (of, asked, card) in enumerate(
        [(entry, ASKED, "another"), (entry, more_repeats, "cpu"), (edited, ASKED, "cpu")], start=2
    ):
        measure(store, of, asked, card)
        assert files(store).items() >= kept.items()
        assert len(files(store)) == number
        kept = files(store)
    monkeypatch.setattr("harness.efficiency.store.measurement", lambda module: ("harness.efficiency.plan",))
    assert store.current(entry, ASKED, HERE) is None
    measure(store, entry)
    assert files(store).items() > kept.items()
    monkeypatch.undo()
    # each question still finds its own answer
    assert store.current(entry, ASKED, HERE) == first
    assert store.current(entry, ASKED, data.device_record("cpu", "another")) is not None
    assert store.current(entry, ASKED, data.device_record("cpu", "a third")) is None
    assert store.current(entry, replace(ASKED, timed_steps=20), HERE) is None
    assert store.current(edited, more_repeats, HERE) is None


def test_the_newest_record_by_todays_code_is_shown_else_the_newest(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = data.cell_record(entry, 1.0, (1.0,), device=HERE)
    old, newer = (dated(made, str(year), code_sha256=f"{year}" * 16) for year in (2020, 2021))
    store.keep(newer)
    store.keep(old)
    assert store.measured(entry, "cpu")[-1] == newer
    assert is_stale(newer, entry.cell)
    fresh, fresher = (dated(made, year, asked_sha256=year * 16) for year in ("2018", "2019"))
    store.keep(fresher)
    store.keep(fresh)
    assert store.measured(entry, "cpu") == [old, newer, fresh, fresher]
    assert store.measured(entry, "cuda") == []


def test_a_record_of_another_cell_with_the_same_labels_is_not_shown(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    measure(store, entry)
    assert len(store.measured(entry, "cpu")) == 1
    wider = entry.cell.model.model_copy(update={"intermediate_size": 64})  # type: ignore[union-attr]
    assert store.measured(replace(entry, cell=entry.cell.model_copy(update={"model": wider})), "cpu") == []
    assert store.measured(replace(entry, cell=entry.cell.with_options(rank=8)), "cpu") == []


def test_a_stale_forecast_is_returned_until_there_is_a_fresh_one(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.forecast(entry) is None
    stale = data.forecast_record(entry, 1.0, code_sha256="of yesterday")
    store.keep(stale)
    assert store.forecast(entry) == stale
    assert is_stale(stale, entry.cell)
    assert not store.has_fresh_forecast(entry)
    fresh = data.forecast_record(entry, 2.0)
    store.keep(fresh)
    assert len(files(store)) == 2
    assert store.forecast(entry) == fresh
    assert store.has_fresh_forecast(entry)
    # a measured record has a forecast by its own code beside it, or none
    assert store.predicted(entry, data.cell_record(entry, 1.0)).predicted is not None
    (tmp_path / "records" / file_name(fresh)).unlink()
    assert store.predicted(entry, data.cell_record(entry, 1.0)).predicted is None


def test_what_is_published_is_read() -> None:
    store = Store(ROOT / "results" / "published" / "efficiency")
    paths = sorted((store.folder / "records").glob("*.json"))
    records = [ForecastRecord.model_validate_json(path.read_bytes()) for path in paths]
    assert len(records) == 145
    assert [file_name(record) for record in records] == [path.name for path in paths]
    entry = data.entry(data.MAIN, "grass", "lean", "1x1024")
    found = store.forecast(entry)
    assert found is not None
    assert found.peak_bytes == 15011646976


def test_a_damaged_record_is_named_and_not_passed_over(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    measure(store, entry)
    (path,) = (tmp_path / "records").glob("*.json")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{path.name}: .*delete it and run again") as caught:
        store.measured(entry, "cpu")
    assert "\n" not in str(caught.value)


def test_a_measurement_that_was_cut_short_hides_no_complete_one(entry: Entry, tmp_path: Path) -> None:
    store = Store(tmp_path)
    complete = measure(store, entry)
    store.keep(dated(complete, "2030", asked_sha256="0" * 64, timing=()))
    assert store.measured(entry, "cpu")[-1] == complete
    store.keep(dated(complete, "2031", asked_sha256="1" * 64, timing=(), status="oom", status_why="no memory"))
    assert store.measured(entry, "cpu")[-1].status == "oom", "running out of memory is an answer"
