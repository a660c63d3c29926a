"""A method is added to the study by its file alone: it is planned, and in every table and figure."""

from __future__ import annotations

from pathlib import Path

import efficiency_data as data
import pytest
from harness.efficiency.plan import Entry, cells, every_group, plan
from harness.efficiency.spec import EfficiencyStudy, load_efficiency
from harness.efficiency.store import Store
from harness.reporting.efficiency.memory_table import memory_table
from harness.reporting.efficiency.published_table import published_table
from harness.reporting.efficiency.report import draw
from harness.reporting.efficiency.rows import read_rows
from harness.reporting.efficiency.speed_tables import offload_table, rehearsal_table, throughput_table
from harness.reporting.efficiency.targets import target_table

MINE = "grass-three"
EDITS = (
    ("methods:\n", f"methods:\n  {MINE}: {{module: grass, options: {{active_layers: 3, offload: move}}}}\n"),
    ("compared: [lora,", f"compared: [lora, {MINE},"),
    ("    beside:\n", f"""    beside:
      - {{method: {MINE}, options: {{offload: resident}}, settings: lean, shape: 4x1024}}
"""),
    ("more_references: [full]", f"more_references: [full, {MINE}]"),
    ("targets:\n", f"""targets:
  - {{kind: memory-ratio, method: {MINE}, against: lora, settings: lean, shape: 4x1024, good: 0.9}}
  - {{kind: peak, method: {MINE}, settings: lean, shape: 4x1024, good: 20}}
  - {{kind: overhead, method: {MINE}, model: gemma-2b, settings: lean, shape: 4x1024, good: 0.1}}
"""),
    ("{lisa: [lisa, lisa-keep]}", f"{{lisa: [lisa, lisa-keep], grass: [grass, {MINE}]}}"),
)  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> EfficiencyStudy:
    return load_efficiency(data.study_file(tmp_path, *EDITS))


def entry(study: EfficiencyStudy, words: str) -> Entry:
    return next(e for e in cells(every_group(study)) if e.words == words)


def test_it_is_in_the_plan_among_the_compared_and_once_a_cell(study: EfficiencyStudy) -> None:
    groups = plan(study, "cuda")
    assert [e.named.label for e in groups[0].entries][:2] == ["lora", MINE]
    assert f"{MINE}+offload=resident" in [e.named.label for e in groups[2].entries]
    mine = [e.words for e in cells(groups) if e.named.method == MINE]
    assert len(mine) == len(set(mine))
    assert {f"{data.MAIN}/{MINE}/plain/1x4096", f"qwen3-8b/{MINE}/lean/4x1024"} <= set(mine)
    # the order of all others is untouched
    others = [e.words for e in cells(groups) if e.named.method != MINE]
    assert others == data.words(plan(data.study(), "cuda"))
    assert f"tiny/{MINE}/lean/4x1024" in data.words(plan(study, "cpu"))


def test_it_is_in_every_table_and_figure(study: EfficiencyStudy, store: Store) -> None:
    speeds = {"lora": 1000.0, MINE: 1200.0, f"{MINE}+offload=resident": 1250.0}
    for settings, shape in (("lean", "4x1024"), ("plain", "1x1024")):
        for label, speed in speeds.items():
            if "+" in label and settings == "plain":
                continue
            of = entry(study, f"{data.MAIN}/{label}/{settings}/{shape}")
            store.keep(data.forecast_record(of, 15.0))
            store.keep(data.cell_record(of, 15.0, (speed, speed)))
    longer = entry(study, f"{data.MAIN}/{MINE}/plain/1x4096")
    store.keep(data.forecast_record(longer, 18.0))
    tiny = entry(study, f"tiny/{MINE}/lean/4x1024")
    rehearsed = data.cell_record(tiny, speeds=(9.0,), device=data.device_record("cpu", "cpu"))
    store.keep(rehearsed.model_copy(update={"memory": data.memory_block(None)}))

    rows = read_rows(study, store)
    assert study.published is not None
    published = published_table(rows, study.published, data.published())
    for table in (memory_table(rows), throughput_table(rows), offload_table(rows), published, rehearsal_table(rows)):
        assert MINE in set(table.raw["method"]), table.name
        assert MINE in table.markdown()
    throughput = throughput_table(rows).raw
    assert set(throughput[throughput["method"] == "lora"]["ratio_to_grass_three"]) == {1000 / 1200}
    goals = {row["name"]: row["measured"] for row in target_table(rows).raw.to_dict("records")}
    assert goals[f"peak memory of {MINE} to lora, lean 4x1024"] == 1.0
    assert goals[f"peak memory of {MINE} on {data.MAIN}, lean 4x1024"] == 15.0
    assert goals[f"tokens/s lost by moving moments, {MINE} on gemma-2b, lean 4x1024"] is None

    shown = {drawing.name: drawing.figure for drawing in draw(rows, data.published())}
    kinds = ("memory", "memory-by-length", "throughput", "speed-and-memory")
    assert {f"{kind}--{data.MAIN}" for kind in kinds} == shown.keys()
    for name, figure in shown.items():
        legend = [text.get_text() for box in figure.legends for text in box.get_texts()]
        ticks = [tick.get_text() for panel in figure.axes for tick in panel.get_yticklabels()]
        assert MINE in [*legend, *ticks], name
