"""`python -m harness plan`: what it shows of a study before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from chat_tokenizer import byte_tokenizer
from harness.records.atomic import write_json
from harness.records.code import FOUND_MODEL
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.stages import plan as stage
from harness.study.config import load_study
from harness.study.jobs import MODEL
from harness.study.paths import Paths
from harness.study.plan import resolve_study
from study_files import written


def prompts(config: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert stage.run(argparse.Namespace(config=config, all=False, cores=1)) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("prompt ")]


def test_a_tasks_prompt_is_shown_with_its_fields_then_with_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path, ("  sums:\n", "  sums:\n    prompt: plain\n"))
    assert prompts(config, capsys) == [r"prompt   sums: plain, 'Question: {instruction}\nAnswer:'"]
    (rows,) = resolve_study(load_study(config)).rows
    first = {"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2"}
    write_json(Paths().rows(rows) / "train.json", [first, first | {"instruction": "other"}])
    assert prompts(config, capsys) == [r"prompt   sums: plain, 'Question: 1 + 1?\nAnswer:'"]


def test_a_chat_template_is_shown_once_the_model_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path, ("  sums:\n", "  sums:\n    prompt: chat\n"))
    (line,) = prompts(config, capsys)
    assert line == "prompt   sums: chat, tiny: its tokenizer's own template, shown once the model is here"
    # not `inputs_needed`: a study that pretrains its model could not be run in the chat format
    (name,) = resolve_study(load_study(config, inputs_needed=False)).models
    byte_tokenizer().save_pretrained(tmp_path / "model")
    record = ModelRecord(
        name=name, folder=str(tmp_path / "model"), files_sha256={}, parameters=1, wall_s=0.0,
        provenance=provenance(roots=FOUND_MODEL, inputs={}),
    )  # fmt: skip
    write_json(Paths().output(MODEL, name), record.model_dump(mode="json"))
    (line,) = prompts(config, capsys)
    asked = r"<s><|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    assert line == f"prompt   sums: chat, tiny: '{asked}'"
