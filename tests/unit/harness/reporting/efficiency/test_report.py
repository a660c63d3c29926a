"""What is made from records and forecasts: ratios between equal settings alone, tables, goals."""

from __future__ import annotations

import csv
from dataclasses import replace

import efficiency_data as data
import pytest
from harness.efficiency.goals import MemoryRatio, SpeedRatio
from harness.efficiency.store import Store
from harness.measuring.energy import COUNTS, OLDER
from harness.reporting.efficiency.memory_table import memory_table
from harness.reporting.efficiency.published_table import published_table
from harness.reporting.efficiency.report import draw
from harness.reporting.efficiency.rows import UnlikeError, ratio
from harness.reporting.efficiency.speed_tables import offload_table, rehearsal_table, throughput_table
from harness.reporting.efficiency.targets import target_table
from harness.reporting.table import Table

MAIN = "llama-2-7b"
PUBLISHED = data.published()
PAPER = data.study().published
assert PAPER is not None


def csv_rows(table: Table) -> list[dict[str, str]]:
    """What stands in the file about what runs here."""
    return [row for row in _every_row(table) if not row.get("stated_in")]


def _every_row(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(table.raw.to_csv(index=False).splitlines()))


# ---------------------------------------------------------------- ratios


def test_a_ratio_of_unlike_settings_is_refused(store: Store) -> None:
    for settings in ("plain", "lean"):
        data.forecast_methods(store, settings, "1x1024")
        data.measure_methods(store, settings, "1x1024")
    data.measure_methods(store, "lean", "4x1024")
    rows = data.rows_of(store)
    light = rows.get(MAIN, "lean", "1x1024", "grass-decoder")
    same = rows.get(MAIN, "lean", "1x1024", "lora")
    plain = rows.get(MAIN, "plain", "1x1024", "lora")
    longer = rows.get(MAIN, "lean", "4x1024", "lora")
    assert light is not None
    assert same is not None
    assert plain is not None
    assert longer is not None
    assert ratio(light.peak("measured"), same.peak("measured")) == pytest.approx(17.0 / 19.4)
    for other in (plain.peak("measured"), longer.peak("measured"), same.peak("forecast")):
        with pytest.raises(UnlikeError):
            ratio(light.peak("measured"), other)
    for slower in (plain, longer):
        with pytest.raises(UnlikeError):
            light.speed_ratios(slower)
    assert ratio(light.peak("measured"), None) is None


def test_figures_of_two_cards_have_no_ratio(store: Store) -> None:
    data.measure_methods(store, "plain", "1x1024")
    rows = data.rows_of(store)
    grass, lora = (rows.get(MAIN, "plain", "1x1024", method) for method in ("grass", "lora"))
    assert grass is not None
    assert lora is not None
    other = replace(lora, measured=data.cell_record(lora.entry, 19.4, (1.0,), device=data.device_record(name="Other")))
    with pytest.raises(UnlikeError):
        ratio(grass.peak("measured"), other.peak("measured"))
    with pytest.raises(UnlikeError):
        grass.speed_ratios(other)


def test_cells_that_are_compared_are_shown_on_one_card_and_another_is_named(store: Store) -> None:
    data.measure_methods(store, "plain", "1x1024")
    for method, started in (("lora", "2030"), ("grass", "2031")):
        entry = data.entry(MAIN, method, "plain", "1x1024")
        other = data.cell_record(entry, 1.0, (1.0,), device=data.device_record(name="Another GPU"))
        later = other.provenance.model_copy(update={"started_utc": started})
        store.keep(other.model_copy(update={"provenance": later}))
    table = memory_table(data.rows_of(store))
    assert {row["device"] for row in csv_rows(table)} == {data.CARD}
    assert "measured on Another GPU too, not shown here." in table.markdown()
    # most of the cells decide, whenever they were measured; of equals the last
    data.measure_methods(store, "lean", "1x1024", device=data.device_record(name="Another GPU"))
    rows = data.rows_of(store)
    assert {row.measured.device.name for row in rows.known(MAIN, "lean", "1x1024") if row.measured} == {"Another GPU"}


def test_ratios_of_speed_are_taken_repeat_by_repeat(store: Store) -> None:
    """Both methods slow down by 2 % over the repeats: their ratio does not move."""
    data.measure_methods(store, "lean", "4x1024")
    (row,) = [r for r in csv_rows(throughput_table(data.rows_of(store))) if r["method"] == "grass"]
    assert float(row["ratio_to_lora"]) == pytest.approx(1.08)
    assert float(row["ratio_to_lora_min"]) == float(row["ratio_to_lora_max"]) == pytest.approx(1.08)
    assert float(row["ratio_to_full"]) == pytest.approx(1080 / 700)
    assert float(row["tokens_per_s"]) == pytest.approx(1080 * 0.99)


def test_energy_is_the_median_of_the_repeats_that_have_it_and_says_what_it_counts(store: Store) -> None:
    data.measure_methods(store, "lean", "4x1024")
    old = throughput_table(data.rows_of(store))
    assert {row["energy_j_per_1000_tokens"] for row in csv_rows(old)} == {""}
    assert {row["energy_why"] for row in csv_rows(old)} == {OLDER}
    assert f"{OLDER}." in old.markdown()

    lora, grass = (data.entry(MAIN, method, "lean", "4x1024") for method in ("lora", "grass"))
    for of, found in ((lora, (40.0, 46.0, 42.0)), (grass, (30.0, None, 34.0))):
        record = data.cell_record(of, 9.0, (1000.0, 1000.0, 1000.0))
        blocks = tuple(
            block.model_copy(update={"energy_j_per_1000_tokens": value, "energy_why": None if value else "went back"})
            for block, value in zip(record.timing, found, strict=True)
        )
        store.keep(record.model_copy(update={"timing": blocks}))
    table = throughput_table(data.rows_of(store))
    rows = {row["method"]: row for row in csv_rows(table)}
    shown = dict(zip(table.display["method"], table.display["J/1,000 tokens"], strict=True))
    keys = ("energy_j_per_1000_tokens", "energy_j_per_1000_tokens_min", "energy_j_per_1000_tokens_max", "energy_why")
    assert [rows["lora"][key] for key in keys] == ["42.0", "40.0", "46.0", ""]
    assert [rows["grass"][key] for key in keys] == ["32.0", "30.0", "34.0", "went back"]
    assert shown["lora"] == "42.0 (40.0 to 46.0)"
    assert shown["grass"].startswith("32.0 (30.0 to 34.0)^"), "a repeat without it is marked"
    assert shown["full"].startswith("—^")
    assert any(note.startswith(COUNTS) for note in table.footnotes)
    assert "idle power included" in COUNTS


# ---------------------------------------------------------------- tables


def test_the_memory_table_has_forecast_beside_measured(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    data.measure_methods(store, "plain", "1x1024")
    table = memory_table(data.rows_of(store))
    (row,) = [r for r in csv_rows(table) if r["method"] == "grass-decoder"]
    assert int(row["forecast_peak_bytes"]) == round(17.0 * data.GIB)
    assert int(row["measured_allocated_peak_bytes"]) == round(1.02 * 17.0 * data.GIB)
    assert float(row["forecast_ratio_to_lora"]) == pytest.approx(17.0 / 19.4)
    assert float(row["forecast_relative_error"]) == pytest.approx(1 / 1.02 - 1)
    assert row["device"] == data.CARD
    line = next(line for line in table.markdown().splitlines() if "grass-decoder" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][3:9] == [
        "grass-decoder", "17.00", "0.876", "17.34", "0.876", "17.34",
    ]  # fmt: skip


def test_what_others_state_is_a_row_of_the_memory_table_and_marked(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    table = memory_table(data.rows_of(store))
    theirs = {row["method"]: row for row in _every_row(table) if row["stated_in"]}
    assert set(theirs) == {"ChunkFT", "SlideFormer", "MegaTrain"}
    chunk = theirs["ChunkFT"]
    assert (chunk["model"], chunk["length"], chunk["stated_peak_gb"]) == ("7B", "1024", "13.72")
    for row in theirs.values():
        assert row["status_why"] == "not run here: stated by its authors"
        # nothing of it is ours
        assert {row[key] for key in row if "forecast" in key or "measured" in key} == {""}
    assert theirs["MegaTrain"]["stated_peak_gb"] == ""
    lines = {name: next(line for line in table.markdown().splitlines() if f"| {name}" in line) for name in theirs}
    assert "| 13.72" in lines["ChunkFT"]
    assert "13.72" not in lines["MegaTrain"]
    assert "stated by its authors (arXiv 2605.21177), not run here: full-parameter tuning" in table.markdown()


def test_a_store_without_records_has_no_row_of_others_either(store: Store) -> None:
    assert _every_row(memory_table(data.rows_of(store))) == []


def test_out_of_memory_is_a_row_with_its_reason(store: Store) -> None:
    full = data.entry(MAIN, "full", "plain", "1x1024")
    store.keep(data.cell_record(full, status="oom", status_why="in phase update: no memory"))
    table = memory_table(data.rows_of(store))
    (row,) = csv_rows(table)
    assert (row["method"], row["status"], row["measured_allocated_peak_bytes"]) == ("full", "oom", "")
    assert "—<sup>a</sup>" in table.markdown()
    assert "- <sup>a</sup> oom: in phase update: no memory." in table.markdown()


def test_records_of_other_code_are_shown_and_marked(store: Store) -> None:
    data.measure_methods(store, "plain", "1x1024", code_sha256="of yesterday")
    assert {row["stale"] for row in csv_rows(memory_table(data.rows_of(store)))} == {"True"}
    assert "measured by other code than today's." in memory_table(data.rows_of(store)).markdown()


def test_forecasts_of_other_code_are_shown_and_marked(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024", code_sha256="of yesterday")
    rows, mark = data.rows_of(store), "forecast by other code than today's."
    assert {row["forecast_stale"] for row in csv_rows(memory_table(rows))} == {"True"}
    for table in (memory_table(rows), target_table(rows), published_table(rows, PAPER, PUBLISHED)):
        assert mark in table.markdown()
    for drawing in draw(rows, PUBLISHED):
        assert "†: forecast or measured by other code than today's." in drawing.caption
        texts = [text.get_text() for panel in drawing.figure.axes for text in panel.texts]
        texts += [text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()]
        assert any(text.endswith("†") for text in texts), drawing.name
    data.forecast_methods(store, "plain", "1x1024")
    for table in (memory_table(data.rows_of(store)), target_table(data.rows_of(store))):
        assert mark not in table.markdown()
    assert not any("†" in drawing.caption for drawing in draw(data.rows_of(store), PUBLISHED))


def test_moving_is_compared_with_resident(store: Store) -> None:
    """1225 tokens/s against 1250 are 2 % lost."""
    for variant, speed, peak in (("", 1225.0, 14.7), ("offload=resident", 1250.0, 16.2)):
        entry = data.entry(MAIN, "grass-decoder", "lean", "4x1024", variant)
        store.keep(data.cell_record(entry, peak, (speed, speed)))
    (row,) = csv_rows(offload_table(data.rows_of(store)))
    assert float(row["overhead_share"]) == pytest.approx(0.02)
    assert int(row["move_measured_peak_bytes"]) < int(row["resident_measured_peak_bytes"])
    goals = {r["name"]: r for r in csv_rows(target_table(data.rows_of(store)))}
    goal = goals["tokens/s lost by moving moments, grass-decoder, lean 4x1024"]
    assert (float(goal["measured"]), goal["reached"]) == (pytest.approx(0.02), "parity")


def test_a_goal_is_reached_or_not_in_its_own_direction() -> None:
    where = {"method": "grass", "against": "lora", "settings": "plain", "shape": "1x1024"}
    less = MemoryRatio(kind="memory-ratio", parity=0.95, good=0.93, best=0.92, **where)
    assert [less.reached(v) for v in (0.96, 0.95, 0.93, 0.9, None)] == ["none", "parity", "good", "best", None]
    more = SpeedRatio(kind="speed-ratio", parity=1.0, good=1.15, best=1.25, **where)
    assert [more.reached(v) for v in (0.99, 1.0, 1.2, 1.25)] == ["none", "parity", "good", "best"]


def test_goals_without_a_gpu_say_so(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    goals = csv_rows(target_table(data.rows_of(store)))
    assert {goal["measured"] for goal in goals} == {""}
    assert {goal["reached"] for goal in goals} == {""}
    assert "not measured on a GPU" in {goal["measured_why"] for goal in goals}
    (grass,) = [g for g in goals if g["name"] == "peak memory of grass to lora, plain 1x1024"]
    assert float(grass["forecast"]) == pytest.approx(17.4 / 19.4)
    assert "0.897 (good)" in target_table(data.rows_of(store)).markdown()


def test_goals_that_were_measured_are_judged(store: Store) -> None:
    data.measure_methods(store, "lean", "4x1024")
    goals = {r["name"]: r for r in csv_rows(target_table(data.rows_of(store)))}
    assert goals["tokens/s of grass to lora, lean 4x1024"]["reached"] == "parity"
    assert goals["tokens/s of grass-decoder to lora, lean 4x1024"]["reached"] == "best"
    assert goals["tokens/s of grass-decoder to full, lean 4x1024"]["reached"] == "good"
    probing = goals["time of one probing batch every 100 steps, grass-decoder, lean 4x1024"]
    assert (float(probing["measured"]), probing["reached"]) == (pytest.approx(0.01), "best")
    assert goals["memory of probing beyond the step's peak, grass-decoder, lean 4x1024"]["reached"] == "best"


def test_published_numbers_stand_beside_ours_under_the_papers_settings(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    data.measure_methods(store, "plain", "1x1024")
    data.measure_methods(store, "lean", "1x1024")
    table = csv_rows(published_table(data.rows_of(store), PAPER, PUBLISHED))
    assert {r["table"] for r in table} == {"Table 4", "Figure 4", "Figure 5"}
    assert {r["settings"] for r in table if r["metric"] == "peak_memory"} == {"plain"}
    grass = next(r for r in table if r["table"] == "Table 4" and (r["model"], r["method"]) == (MAIN, "grass"))
    assert (grass["published"], float(grass["measured"])) == ("19.08", pytest.approx(1.02 * 17.4))
    assert (grass["forecast_within"], grass["measured_within"]) == ("True", "True")
    assert {r["method"] for r in table if r["table"] == "Table 4"} == {
        "full",
        "lora",
        "dora",
        "lisa",
        "lisa-keep",
        "grass",
    }
    longer = [r for r in table if (r["method"], r["shape"]) == ("dora", "1x1792")]
    assert {r["measured_why"] for r in longer} == {"not measured on a GPU"}
    assert "this study has no method grass-no-overlap" in {r["measured_why"] for r in table}
    unnamed = [r for r in table if r["table"] == "Figure 4"]
    assert {(r["model"], r["model_named_by_source"], r["shape"]) for r in unnamed} == {(MAIN, "False", "1x1792")}


def test_times_of_a_cpu_are_in_no_table_or_figure_but_their_own(store: Store) -> None:
    for method in ("lora", "grass-decoder"):
        entry = data.entry("tiny", method, "lean", "4x1024", device="cpu")
        made = data.cell_record(entry, speeds=(123.0,), device=data.device_record("cpu", "cpu"))
        store.keep(made.model_copy(update={"memory": data.memory_block(None)}))
    rows = data.rows_of(store)
    for table in (memory_table(rows), throughput_table(rows), offload_table(rows)):
        assert table.raw.empty
    assert [r["cpu_tokens_per_s"] for r in csv_rows(rehearsal_table(rows))] == ["123.0", "123.0"]
    assert "Device memory, NVML's figures and MFU: not measured on a GPU." in rehearsal_table(rows).markdown()
    assert "Tokens per second of training steps: not measured on a GPU." in throughput_table(rows).markdown()
    assert list(draw(rows, PUBLISHED)) == []
