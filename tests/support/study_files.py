"""A small study as a file, with mistakes put in: what the tests of configs and plans share."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.study.config import load_study
from harness.study.spec import Study
from harness.study.strict_yaml import ConfigError

# small, valid, and with one line for each thing that the tests below get wrong
STUDY = """\
study: mine
title: A study
seeds: [0, 1]
models:
  tiny:
    kind: pretrain
    layers: 2
    width: 16
    heads: 2
    feed_forward: 32
    corpus: {one_step_share: 0.3, fact_share: 0.8, guess_share: 0.5}
    steps: 5
    rows: 4
    length: 32
    lr: 1.0e-3
    seed: 0
tasks:
  sums:
    train: {kind: generated, family: arithmetic, seed: 1, train_rows: 40, validation_rows: 8}
    suites:
      two-step: {kind: generated, variant: two-step, seed: 2, rows: 8, scoring: number, max_new_tokens: 8}
    recipe: {steps: 12}
methods:
  full: {module: full}
  lora: {module: lora, options: {rank: 4, alpha: 8}}
  fixed: {module: full, lr: 1.0e-3}
recipe:
  steps: 10
  batch_size: 8
  micro_batch_size: 4
  max_length: 48
  loss_on: answer
  warmup_steps: 2
  max_grad_norm: 1.0
  schedule: linear
search: {grid: [1.0e-3, 3.0e-3, 1.0e-2], seeds: [100], max_extensions: 1}
observation: {every_steps: 5, rows: 4}
"""


def written(folder: Path, *edits: tuple[str, str], text: str = STUDY) -> Path:
    """The study as a file, each edit (old, new) made at the one place where `old` stands."""
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the study"
        text = text.replace(old, new)
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *edits: tuple[str, str], text: str = STUDY) -> Study:
    return load_study(written(folder, *edits, text=text))


def complaint(folder: Path, *edits: tuple[str, str], text: str = STUDY) -> str:
    """The complaint without the folder's name; that it is one line, and names the file, is checked here for all."""
    with pytest.raises(ConfigError) as caught:
        load(folder, *edits, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder / 'mine.yaml'}:")
    return message.removeprefix(f"{folder}/")
