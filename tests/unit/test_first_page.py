"""The benchmark of the first page: moments of jobs from their logs, and a page of medians."""

from __future__ import annotations

import time
from pathlib import Path

from tests.first_page import Sitting, page, read_logs


def test_a_job_lasts_from_the_birth_of_its_log_to_its_last_word(tmp_path: Path) -> None:
    log = tmp_path / "train" / "a.log"
    log.parent.mkdir()
    log.write_text("begun")
    time.sleep(0.3)
    log.write_text("done")
    ((rule, begun, ended),) = read_logs(tmp_path)
    assert rule == "train"
    assert 0.2 < ended - begun < 5


def test_the_page_has_medians_and_leaves_out_what_took_no_time() -> None:
    sittings = [Sitting(wall_s=wall, busy_s=9.0, before_s=1.0, alone_s=2.0, report_s=3.0) for wall in (10, 14, 30)]
    for sitting in sittings:
        sitting.jobs["train"], sitting.jobs["page"] = 2, 1
        sitting.job_s["train"] = sitting.wall_s
    text = page("abc", "quick", sittings)
    assert "- 10, 14, 30 s; median 14 s, standard deviation 10.6;" in text
    assert "| searches, runs and scores | 8 |" in text
    assert "| train | 2 | 14 |" in text
    assert "| page |" not in text
