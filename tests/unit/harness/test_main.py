"""The one door: a user's mistake is one line and exit code 2, a fault of ours a traceback and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness.__main__ import main
from harness.errors import OWN_FAULT, UserError
from harness.progress import say
from house import ROOT

EFFICIENCY = ["--config", str(ROOT / "config" / "efficiency.yaml")]
CELL = [*EFFICIENCY, "--model", "tinyllama-1.1b", "--method", "lora"]
RUN = ["--threads", "1", "--checkpoint-every", "9"]
MICRO = str(ROOT / "tests" / "pipeline" / "micro.yaml")


@pytest.mark.parametrize(
    ("words", "files", "complaint"),
    [
        ("plan --config gone.yaml", {}, "gone.yaml: no such file"),
        ("plan --config x.yaml", {"x.yaml": "study: x\nstudy: y\n"}, "x.yaml:2: the key 'study' stands twice"),
        ("plan --config x.yaml", {"x.yaml": ""}, "x.yaml:1: the file is empty; copy config/embedded.yaml"),
        (["publish", "--config", MICRO], {}, "micro is not finished (25 records and specs missing): run it first"),
        ("prefetch rows --spec gone.json", {}, "gone.json: no such file; correct the path, or run the job"),
        ("prefetch rows --spec .", {}, ".: a folder stands where a file should be; remove it"),
        ("prefetch model --spec x.json", {"x.json": "nonsense"}, "x.json: not JSON (expected ident at line 1"),
        (
            "prefetch suite --spec x.json",
            {"x.json": '{"lable": "a"}'},
            "x.json: unknown key lable; if this is the file",
        ),
        ("pretrain --threads 1 --spec x.json", {"x.json": "{}"}, "x.json: the key label is missing; if this is the"),
        (["train", "--spec", "x.json", *RUN], {"x.json": "[]"}, "x.json: Input should be an object"),
        ("search --threads 1 --checkpoint-every 1 --spec x.json", {"x.json": ""}, "x.json: not JSON (EOF"),
        ("forecast --spec x.json", {"x.json": "{}"}, "x.json: the key training is missing"),
        ("evaluate --spec x --run r --out o --threads 1 --batch-size 1", {}, "r/train.json: no such file"),
        (["collect", "--config", MICRO, "--out", "results/micro"], {}, "train.json: no such file"),
        (
            ["tables", "--config", MICRO, "--frames", "f", "--out", "o"],
            {},
            "f/runs.parquet: no such file; run the coll",
        ),
        (["figures", "--config", MICRO, "--frames", "f", "--out", "o"], {"f/runs.parquet": "x"}, "no parquet file"),
        ("check nothing", {}, "there is no method file baselines/nothing.py; there are: adagradselect,"),
        ("check lora --options {rank:8}", {}, "--options {rank:8}: not JSON ("),
        ("check lora --options [1]", {}, "--options:1: `key: value` lines are wanted, not [1]"),
        (["forecast", *CELL, "--batch", "0"], {}, "--batch 0: must be at least 1"),
        (["forecast", *CELL, "--active-layers", "2"], {}, "the method lora has no option active_layers (it has"),
        (["forecast", *CELL, "--method", "lroa"], {}, "--method lroa: it is one of"),
        (["advise", *EFFICIENCY, "--model", "tinyllama-1.1b", "--vram", "24"], {}, "'24' is no amount of memory"),
        (["efficiency", *EFFICIENCY, "--steps", "7"], {}, "--steps 7: a multiple of 5 of at least 5 is wanted"),
        ("schema --log .", {}, "--log .: nothing can be written there (Is a directory)"),
    ],
)
def test_a_mistake_of_the_users_is_one_line_and_exit_code_2(
    words: str | list[str],
    files: dict[str, str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = words.split() if isinstance(words, str) else words
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"harness {words[0]}: ")
    assert complaint in said.err
    assert said.err.count("\n") == 1


def planted(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> int:
        say("half way")
        raise error

    monkeypatch.setattr("harness.stages.schema.run", run)


@pytest.mark.parametrize("error", [ValueError("seven"), KeyError("seven"), RuntimeError("seven"), TypeError("seven")])
def test_a_fault_of_ours_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(monkeypatch, error)
    assert main(["schema"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["half way", "Traceback (most recent call last):"]
    assert lines[-2].startswith(type(error).__name__)
    assert "seven" in lines[-2]
    assert lines[-1] == f"harness schema: {OWN_FAULT}"


def test_a_missing_module_of_ours_is_a_fault_of_ours_and_a_missing_package_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("harness.nowhere", "torch.nowhere"):
        planted(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert main(["schema"]) == 1
        assert OWN_FAULT in capsys.readouterr().err
    planted(monkeypatch, ModuleNotFoundError("No module named 'a_package.part'", name="a_package.part"))
    assert main(["schema"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("harness schema: the package a_package is not installed: pip install 'grass-bench[bench]'\n")


def test_a_message_of_several_lines_is_told_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(monkeypatch, UserError("one\ntwo"))
    assert main(["schema"]) == 2
    assert capsys.readouterr().err.endswith("harness schema: one two\n")


def test_a_log_has_what_is_said_and_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "deep" / "schema.log"
    for error, code in ((ValueError("seven"), 1), (UserError("eight; do nine"), 2)):
        planted(monkeypatch, error)
        assert main(["schema", "--log", str(log)]) == code
        said = capsys.readouterr().err
        assert said.startswith("half way\n")
        assert log.read_text(encoding="utf-8") == said


def test_what_a_library_kept_of_the_stream_writes_on_after_the_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = []
    monkeypatch.setattr("harness.stages.schema.run", lambda _: kept.append(sys.stderr) or 0)
    assert main(["schema", "--log", str(tmp_path / "log")]) == 0
    print("later", file=kept[0])
    assert capsys.readouterr().err == "later\n"
    assert (tmp_path / "log").read_text(encoding="utf-8") == ""


def test_the_line_of_a_user_error_is_in_the_log_of_a_process_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "plan", "--config", "gone.yaml", "--log", "plan.log"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert (tmp_path / "plan.log").read_text(encoding="utf-8") == done.stderr
    assert done.stdout == ""
