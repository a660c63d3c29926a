"""Both ways: the audit calls no sound script BROKEN, and every broken one that does not look like a sound one.

The test run's end prints both scores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from audited import BROKEN, DOUBTFUL, SOUND
from further import a_few
from harness.audit import judge


@pytest.mark.parametrize("name", a_few(SOUND, one_in=3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sound_script_is_not_called_broken(name: str, tmp_path: Path) -> None:
    if name == "lomo":
        pytest.importorskip("lomo_optim")
    audit = SOUND[name](tmp_path)
    assert [finding.text for finding in judge(audit.facts) if finding.verdict == "BROKEN"] == []


@pytest.mark.parametrize(
    ("name", "verdict"), [*((name, "BROKEN") for name in BROKEN), *((name, "LOOK") for name in DOUBTFUL)]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_defect_is_caught_by_the_audit(
    name: str, verdict: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    script, words = (BROKEN | DOUBTFUL)[name]
    said = [finding.text for finding in judge(script(tmp_path).facts) if finding.verdict == verdict]
    in_these = [text for text in said if words in text]
    record_property("defect", name)
    record_property("caught_by", f"audit, {verdict}: {in_these[0] if in_these else None}")
    assert in_these
