"""The printed status: plain where it is piped, in place on a terminal, and a watch that ends by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.__main__ import main
from harness.sign import sign_of
from harness.stages import status
from harness.study.jobs import TRAIN
from harness.study.last_words import log_of, rule_of
from harness.study.paths import Paths
from harness.study.plan import Output, outputs, resolve_study
from study_files import load

WORDS = ["status", "--config", "mine.yaml"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """The outputs of a study that has not begun, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return outputs(resolve_study(load(tmp_path)), Paths())


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def runs(files: list[Output]) -> list[Output]:
    return [output for output in files if output.kind is TRAIN]


def here(**facts: Any) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **facts})


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_every_kind_of_row_and_nothing_is_written(
    files: list[Output], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running, failed, skipped, *_ = runs(files)
    put(
        sign_of(running.path),
        here(unit="step", total=300, done=120, note="loss 1.234", unit_s=2.0, tokens_per_s=5400.4, phase="steps"),
    )
    log = log_of(Paths(), *rule_of(resolve_study(load(tmp_path)), failed))
    put(log, "harness train: \x1b[2Jbad rows\n")
    put(skipped.path, '{"status": "skipped", "status_why": "needs galore-torch"}')
    before = snapshot(tmp_path)
    assert main(WORDS) == 0
    out = capsys.readouterr().out
    assert snapshot(tmp_path) == before
    assert out.startswith(
        "mine: 1 of 18 jobs done, 1 running, 15 waiting, 1 failed\n  inputs 0/4, search 0/2, train 1/6"
    )
    assert f"  train {running.name}: step 120 of 300, loss 1.234, 5,400 tokens/s, 2.0 s/step, 6 min 0 s left\n" in out
    assert f"  failed     train {failed.name}: harness train: ?[2Jbad rows ({log})\n" in out
    assert f"  skipped    train {skipped.name}: needs galore-torch\n" in out
    assert "roughly " in out
    assert "\x1b" not in out


def test_a_damaged_record_costs_the_estimate_alone(files: list[Output], capsys: pytest.CaptureFixture[str]) -> None:
    put(runs(files)[0].path, "{")
    assert main(WORDS) == 0
    out = capsys.readouterr().out
    assert "time to come: not known" in out
    assert "  damaged    train" in out


def test_it_starts_without_torch(files: list[Output]) -> None:
    code = f"import sys; from harness.__main__ import main; main({WORDS!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_terminal_gets_short_lists(
    files: list[Output], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "SHOWN", 2)
    for output in runs(files):
        put(output.path, '{"status": "oom", "status_why": "big"}')
    main(WORDS)
    assert capsys.readouterr().out.count("  oom ") == 6
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main(WORDS)
    out = capsys.readouterr().out
    assert out.count("  oom ") == 2
    assert "and 4 more" in out


# ------------------------------------------------------------ --watch


class Naps:
    """Stands in for `time.sleep`: at each nap the next thing happens; after the last one a watch must have ended."""

    def __init__(self, *happens: Any) -> None:
        self.left = list(happens)

    def __call__(self, seconds: float) -> None:
        assert seconds >= status.EVERY_S
        assert self.left, "the watch goes on for ever"
        self.left.pop(0)()


def finish(files: list[Output]) -> None:
    for output in files:
        put(output.path, '{"status": "ok"}')


def test_it_ends_when_the_page_is_there_and_prints_what_changed(
    files: list[Output], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = Naps(lambda: None, lambda: finish(files), lambda: put(Path("results/mine/report.html"), "x"))
    monkeypatch.setattr(status.time, "sleep", naps)
    assert main([*WORDS, "--watch"]) == 0
    out = capsys.readouterr().out
    assert not naps.left
    assert out.count("mine: 0 of 18") == 1
    assert out.count("mine: 18 of 18") == 2
    assert out.endswith("  finished: results/mine/report.html\n\n")
    assert "\x1b" not in out


def test_it_ends_when_whoever_was_at_work_is_gone(
    files: list[Output], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".snakemake").mkdir()
    sign = sign_of(runs(files)[0].path)
    naps = Naps(lambda: None, lambda: put(sign, here()), lambda: sign.unlink())
    monkeypatch.setattr(status.time, "sleep", naps)
    assert main([*WORDS, "--watch"]) == 0
    assert not naps.left
    assert capsys.readouterr().out.rstrip().endswith("no Snakemake works in this folder")


def test_ctrl_c_ends_it_quietly(
    files: list[Output], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", Naps(interrupted))
    assert main([*WORDS, "--watch"]) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_is_written_in_place(
    files: list[Output], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(files)
    put(Path("results/mine/report.html"), "x")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([*WORDS, "--watch"]) == 0
    assert capsys.readouterr().out.startswith("\x1b[H\x1b[2Jmine: 18 of 18")
