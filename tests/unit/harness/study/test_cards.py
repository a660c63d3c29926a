"""Which card a run is sent to: the smallest that fits its forecast."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.errors import UserError
from harness.records.atomic import write_json
from harness.records.provenance import provenance
from harness.records.run import RunForecast
from harness.records.units import GIB
from harness.study.cards import CARDS, card_for, cards


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    (tmp_path / "cards.yaml").write_text("a100: 80GiB\na10: 24 GiB\n", encoding="utf-8")
    monkeypatch.setenv(CARDS, str(tmp_path / "cards.yaml"))
    return cards()


def forecast(folder: Path, needed_bytes: int | None) -> Path:
    record = RunForecast(
        name="run", longest_row_tokens=8, peak_bytes=needed_bytes, peak_phase=None, needed_bytes=needed_bytes,
        peak_why=None, provenance=provenance(roots=(), inputs={}),
    )  # fmt: skip
    write_json(folder / "forecast.json", record.model_dump(mode="json"))
    return folder / "forecast.json"


@pytest.mark.parametrize(
    ("needed_bytes", "card"),
    [(GIB, "a10"), (24 * GIB, "a10"), (24 * GIB + 1, "a100"), (100 * GIB, "a100"), (None, None)],
)
def test_the_smallest_card_that_fits_else_the_largest(
    needed_bytes: int | None, card: str | None, known: dict[str, int], tmp_path: Path
) -> None:
    assert card_for(forecast(tmp_path, needed_bytes), known) == card


def test_without_a_table_or_a_forecast_no_card_is_asked_for(known: dict[str, int], tmp_path: Path) -> None:
    assert card_for(tmp_path / "forecast.json", known) is None
    assert card_for(forecast(tmp_path, GIB), {}) is None


def test_a_table_that_is_none_is_one_line_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CARDS, str(tmp_path / "cards.yaml"))
    (tmp_path / "cards.yaml").write_text("a10: 24GiB\na100: large\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"cards.yaml:2: a100: 'large' is no amount of memory"):
        cards()
