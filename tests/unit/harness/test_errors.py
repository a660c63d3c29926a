"""A message for the user is one printable line below 300 letters, and no token is in a message, a log or a record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import __main__ as door
from harness.errors import LONGEST, UserError, first_line, letters, without_secrets
from harness.records.atomic import write_record
from harness.records.code import EVALUATION
from harness.records.inputs import RowsRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.stderr import copied_stderr
from harness.step.outcomes import CannotRunError, DivergedError, out_of_memory_why, outcome_of

PLANTED = "planted-token-of-this-test"
LOOKS_SO = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678"
ECHO = f"401 for https://someone:{PLANTED[::-1]}@hub.example/api?token={PLANTED} Authorization: Bearer {LOOKS_SO}"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)


def clean(text: str) -> bool:
    return "***" in text and not any(secret in text for secret in (PLANTED, PLANTED[::-1], LOOKS_SO))


def test_a_short_message_is_as_it_was_written() -> None:
    for text in (
        "a.yaml:3: lr: a number is wanted",
        "hf_hub_download and hf_transfer are names",
        "https://hub.example/a",
    ):
        assert str(UserError(text)) == text


@pytest.mark.parametrize(
    "middle", ["x" * 5000, ", ".join(f"key{i}" for i in range(900)), "word " * 900, "a\nb\r\n\x07\u2028\ud800" * 90]
)
def test_a_long_message_loses_its_middle_and_keeps_file_and_mend(middle: str) -> None:
    said = str(UserError(f"/some/folder/study.yaml:7: methods.full.note: not {middle}; write a short text"))
    assert letters(said) < LONGEST
    assert said.isprintable()
    assert said.startswith("/some/folder/study.yaml:7: methods.full.note: ")
    assert said.endswith("; write a short text")


def test_of_a_long_path_the_name_stays() -> None:
    assert "/train.json: " in str(UserError(f"/{'deep/' * 90}train.json: not JSON; delete it and run again"))


def test_of_a_long_list_the_first_and_the_last_stay() -> None:
    said = str(UserError(f"a.yaml:1: valid keys: {', '.join(f'key{i}' for i in range(100))}"))
    assert "key0, key1, key2, key3, ... 93 more ..., key97, key98, key99" in said


def test_no_message_echoes_a_token() -> None:
    assert clean(str(UserError(ECHO)))
    assert clean(first_line(ValueError(ECHO)))
    assert clean(without_secrets(ECHO))


@pytest.mark.parametrize("error", [CannotRunError(ECHO), DivergedError(ECHO), MemoryError(ECHO)])
def test_no_reason_in_a_record_echoes_a_token(error: Exception) -> None:
    def work() -> None:
        raise error

    assert clean(str(outcome_of(work, lambda: "load")[1]))
    assert clean(out_of_memory_why(MemoryError(ECHO), "load"))


def test_no_record_holds_a_token_wherever_it_came_from(tmp_path: Path) -> None:
    record = RowsRecord(
        name="rows", files_sha256={}, rows={"train": 1}, provenance=provenance(roots=EVALUATION, inputs={})
    )
    said = record.model_copy(update={"name": ECHO})
    write_record(tmp_path / "manifest.json", said)
    assert clean((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert read(tmp_path / "manifest.json", RowsRecord).name == without_secrets(ECHO)


def test_no_log_and_no_traceback_echoes_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        raise KeyError(ECHO)

    from harness.stages import schema

    monkeypatch.setattr(schema, "run", run)
    assert door.main(["schema", "--log", str(tmp_path / "log")]) == 1
    assert clean(capsys.readouterr().err)
    with copied_stderr(tmp_path / "said"):
        print(ECHO, file=sys.stderr)
    for name in ("log", "said"):
        assert clean((tmp_path / name).read_text())
