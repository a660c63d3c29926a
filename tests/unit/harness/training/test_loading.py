"""What a process reads once: the tokenizer and the rows of runs whose files are known by their hashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.training import loading
from harness.training.loading import Inputs, load


@pytest.fixture
def read_count(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    usual = loading.load_tokenizer

    def noted(path: Path) -> Any:
        seen.append(path)
        return usual(path)

    monkeypatch.setattr(loading, "load_tokenizer", noted)
    loading._read_texts.cache_clear()
    return seen


def test_trials_read_tokenizer_and_rows_once_and_other_content_anew(tmp_path: Path, read_count: list[Path]) -> None:
    found = tiny_inputs(tmp_path)
    known = replace(found, made_from={"rows train.json": "a"})

    def loaded(inputs: Inputs, **recipe: Any) -> Any:
        return load(tiny_training("full", {}, **recipe), lr=LR, seed=0, inputs=inputs, observation=None)

    first, second = loaded(known), loaded(known)
    assert len(read_count) == 1
    assert first.batches.step(0)[0]["input_ids"].tolist() == second.batches.step(0)[0]["input_ids"].tolist()
    assert first.data == second.data
    assert first.module is not second.module
    for changed in ({"loss_on": "all"}, {"max_length": 48}):
        loaded(known, **changed)
    assert len(read_count) == 3
    loaded(replace(known, made_from={"rows train.json": "b"}))
    assert len(read_count) == 4
    # files that nobody has hashed may change between two runs
    loaded(found)
    loaded(found)
    assert len(read_count) == 6
