"""Progress lines of long work say a speed that can be read, however slow the work is."""

from __future__ import annotations

import pytest
from harness import progress
from harness.progress import Progress, pace


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "1000000000.0 steps/s"),
        (0.02, "50.0 steps/s"),
        (0.24, "4.2 steps/s"),
        (0.99, "1.0 steps/s"),
        (1.0, "1.0 s/step"),
        (2.46, "2.5 s/step"),
        (9.949, "9.9 s/step"),
        (9.95, "10 s/step"),
        (20.6, "21 s/step"),
        (400.0, "400 s/step"),
    ],
)
def test_slow_units_have_seconds_each(seconds: float, said: str) -> None:
    assert pace(seconds, "step") == said


def test_a_line_of_slow_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(20, "run", done=10) as work:
        for _ in range(2):
            now[0] += 21.0
            work.advance("loss 1.500")
    assert capsys.readouterr().err == "run: 12/20 steps, 21 s/step, 2 min 48 s left, loss 1.500\n"
