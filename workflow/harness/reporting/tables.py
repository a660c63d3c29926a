"""All tables of a study, made and written together."""

from __future__ import annotations

from pathlib import Path

from harness.records.atomic import whole_folder, write_json
from harness.reporting.answer import answer_table
from harness.reporting.comparison_tables import comparison_table
from harness.reporting.forgetting_table import forgetting_table
from harness.reporting.frames import Frames, refuse_link
from harness.reporting.importance_tables import importance_tables
from harness.reporting.layout import cells
from harness.reporting.lm_eval_table import lm_eval_table
from harness.reporting.overlap_tables import overlap_tables
from harness.reporting.published import load_published, published_table
from harness.reporting.published_claims import load_claims
from harness.reporting.run_tables import efficiency_table, learning_rate_table, run_table
from harness.reporting.score_tables import MEASURES, difference_table, score_table
from harness.reporting.table import Table
from harness.reporting.verdict_table import verdict_table
from harness.reporting.view_tables import view_table
from harness.study.spec import Study


def make_tables(frames: Frames, study: Study) -> list[Table]:
    """Every table, in the order of the page."""
    published = None if study.published is None else load_published(Path(study.published))
    scored = [measure for measure in MEASURES if measure.cells(study)]
    made = [
        *([answer_table(frames, study, study.question)] if study.question is not None else []),
        *(view_table(frames, study, label, published) for label in study.views),
        *(score_table(frames, study, measure) for measure in scored),
        *([lm_eval_table(frames, study)] if cells(study, "lm-eval") else []),
        *([forgetting_table(frames, study)] if study.forgetting else []),
        *(difference_table(frames, study, measure) for measure in scored),
        *overlap_tables(frames, study),
        efficiency_table(frames, study),
        learning_rate_table(frames, study),
        run_table(frames, study),
        *importance_tables(frames, study),
        *(comparison_table(frames, study, label) for label in study.comparisons),
    ]
    if study.claims is not None:
        made.append(verdict_table(frames, load_claims(Path(study.claims)), published))
    if published is not None:
        made.append(published_table(frames, published))
    return made


def write_tables(frames: Frames, study: Study, folder: Path) -> None:
    """Write every table as csv, md and tex, and `tables.json` for the page: all of them or none."""
    refuse_link(folder)
    tables = make_tables(frames, study)
    with whole_folder(folder) as temporary:
        for table in tables:
            table.write(temporary)
        write_json(temporary / "tables.json", {table.name: table.page().model_dump() for table in tables})
