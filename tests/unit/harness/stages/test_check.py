"""`python -m harness check`: a table of checks for one method file, and one clear line for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.__main__ import main


def test_the_untuned_model_keeps_the_contract_on_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "baselines/base.py"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["llama", "gemma", "gpt2"]
    rows = {line[:32].strip(): line[32:].split() for line in said[2:-2]}
    assert rows["promises hold"] == ["ok", "ok", "ok"]
    assert rows["two seeds differ"] == ["ok", "-", "-"]
    assert said[-1].startswith("baselines/base.py: 16 of 16 checks hold")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nothing"], "there is no method file baselines/nothing.py; there are: adagradselect,"),
        (["lisa", "--options", '{"active_layer": 1}'], "active_layer: unknown key; did you mean 'active_layers'?"),
        (["{folder}/mine.py"], "mine.py: methods are files of the folder baselines/; put the file there"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *(word.replace("{folder}", str(tmp_path)) for word in words)]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.out == ""


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from baselines.lora import Lora

    monkeypatch.setattr(Lora, "REQUIRES", ("a_package_nobody_has",))
    assert main(["check", "lora"]) == 2
    assert "needs the package a_package_nobody_has" in capsys.readouterr().err


def test_a_broken_method_is_named_with_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from baselines.base import Base

    expect = Base.expect
    monkeypatch.setattr(Base, "expect", lambda self, facts: expect(self, facts).__class__(
        layers="all", trainable_parameters=1, state_of="none"))  # fmt: skip
    assert main(["check", "base"]) == 1
    said = capsys.readouterr().out
    assert "BROKEN" in said
    assert "llama: disengaged: layers that moved: promised 4 in every period, saw [] in 0 periods" in said
